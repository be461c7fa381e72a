// Host versions of the kernels of torch itself that no test of an optimizer gets around: fill_ and
// zero_ of any tensor, copy_ between tensors of any strides and the same dtype, and between
// contiguous tensors of any two dtypes. Copies of contiguous memory need no kernel. All others fail
// as cudaErrorInvalidDeviceFunction, with their name on stderr.
//
// Kernels are matched by a part of their mangled names, and their arguments laid out as torch 2.14
// lays them out in ATen/native/cuda/CUDALoops.cuh, MemoryAccess.cuh and
// ATen/cuda/detail/OffsetCalculator.cuh.
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "fake_cudart.h"

namespace {

template <class T>
const T& argument(const FakeLaunch* launched, int i) {
  return *static_cast<const T*>(launched->args[i]);
}

template <int kTensors>
struct Pointers {
  char* of[kTensors];  // the output first
};

// ATen/cuda/detail/OffsetCalculator.cuh: byte offsets of an element's place in each tensor.
template <int kTensors>
struct OffsetCalculator {
  int dims;
  struct {
    uint32_t divisor, magic, shift;
  } sizes[25];
  uint32_t strides[25][kTensors];

  uint32_t offset(uint32_t element, int tensor) const {
    uint32_t result = 0;
    for (int dim = 0; dim < dims; ++dim) {
      result += element % sizes[dim].divisor * strides[dim][tensor];
      element /= sizes[dim].divisor;
    }
    return result;
  }
};

// -------------------------------------------------------------------------------------------- fill

template <int kBytes>
struct alignas(kBytes) Element {
  char bytes[kBytes];
};

template <int kBytes>
struct StridedFill {
  OffsetCalculator<1> offsets;
  Pointers<1> tensors;
  Element<kBytes> value;
};

// vectorized_elementwise_kernel(int N, FillFunctor<T> f, std::array<char*, 1> data)
template <int kBytes>
void fill(const FakeLaunch* launched) {
  const int n = argument<int>(launched, 0);
  const auto& value = argument<Element<kBytes>>(launched, 1);
  char* const to = argument<Pointers<1>>(launched, 2).of[0];
  for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * kBytes, &value, kBytes);
}

// elementwise_kernel(int N, closure)
template <int kBytes>
void fill_strided(const FakeLaunch* launched) {
  const int n = argument<int>(launched, 0);
  const auto& closure = argument<StridedFill<kBytes>>(launched, 1);
  for (int i = 0; i < n; ++i)
    std::memcpy(closure.tensors.of[0] + closure.offsets.offset(i, 0), &closure.value, kBytes);
}

template <int kBytes>
void register_fill(const std::string& type) {
  const size_t contiguous[] = {sizeof(int), kBytes, sizeof(Pointers<1>)};
  const size_t strided[] = {sizeof(int), sizeof(StridedFill<kBytes>)};
  const std::string functor = "NS0_11FillFunctorI" + type + "EE";
  fake_register_kernel((functor + "St5arrayIPcLm1E").c_str(), fill<kBytes>, 3, contiguous);
  fake_register_kernel(("gpu_kernel_impl_nocastI" + functor).c_str(), fill_strided<kBytes>, 2,
                       strided);
}

// -------------------------------------------------------------------------------------------- copy

struct StridedCopy {
  OffsetCalculator<2> offsets;
  Pointers<2> tensors;
};

struct Type {
  std::string mangled;
  int bytes;
};

const Type kTypes[] = {
    {"b", 1}, {"h", 1}, {"a", 1}, {"s", 2}, {"N3c104HalfE", 2},       {"N3c108BFloat16E", 2},
    {"i", 4}, {"f", 4}, {"l", 8}, {"d", 8}, {"N3c107complexIfEE", 8}, {"N3c107complexIdEE", 16}};

// The size of what the lambda in the kernel's name takes: ...clEvEUlfE_... takes a float.
int bytes_of_lambda_parameter(const std::string& kernel) {
  for (const Type& type : kTypes) {
    if (kernel.find("_clEvEUl" + type.mangled + "E_E") != std::string::npos) return type.bytes;
  }
  throw std::runtime_error("copy of a dtype that torch_kernels.cpp does not have: " + kernel);
}

// elementwise_kernel(int N, closure), same dtype
void copy_strided(const FakeLaunch* launched) {
  const int n = argument<int>(launched, 0);
  const auto& [offsets, tensors] = argument<StridedCopy>(launched, 1);
  const int bytes = bytes_of_lambda_parameter(launched->kernel);
  for (int i = 0; i < n; ++i)
    std::memcpy(tensors.of[0] + offsets.offset(i, 0), tensors.of[1] + offsets.offset(i, 1), bytes);
}

// Calls visit(pointer of the dtype's C++ type).
template <class Visit>
void with_type(c10::ScalarType dtype, char* pointer, const Visit& visit) {
  switch (dtype) {
#define CASE(T, name)                     \
  case c10::ScalarType::name:             \
    visit(reinterpret_cast<T*>(pointer)); \
    break;
    AT_FORALL_SCALAR_TYPES_AND3(Bool, Half, BFloat16, CASE)
#undef CASE
    default:
      throw std::runtime_error("copy between dtypes: not one of those that torch_kernels.cpp has");
  }
}

void convert(c10::ScalarType from_type, char* from, c10::ScalarType to_type, char* to, int n) {
  with_type(from_type, from, [&](const auto* source) {
    with_type(to_type, to, [&]<class T>(T* target) {
      for (int i = 0; i < n; ++i) target[i] = static_cast<T>(source[i]);
    });
  });
}

// ATen/native/cuda/MemoryAccess.cuh: LoadWithCast<1>, StoreWithCast<1>
struct CastedTensor {
  c10::ScalarType dtype;
  uint32_t element_bytes;
};

// unrolled_elementwise_kernel(int N, f, std::array<char*, 2> data, offsets, offsets, LoadWithCast,
// StoreWithCast)
void copy_converting(const FakeLaunch* launched) {
  const auto& tensors = argument<Pointers<2>>(launched, 2);
  convert(argument<CastedTensor>(launched, 5).dtype, tensors.of[1],
          argument<CastedTensor>(launched, 6).dtype, tensors.of[0], argument<int>(launched, 0));
}

// vectorized_elementwise_kernel(int N, f, std::array<char*, 2> data)
template <c10::ScalarType to>
void copy_float_to(const FakeLaunch* launched) {
  const auto& tensors = argument<Pointers<2>>(launched, 2);
  convert(c10::ScalarType::Float, tensors.of[1], to, tensors.of[0], argument<int>(launched, 0));
}

void register_fill(const Type& type) {
  switch (type.bytes) {
    case 1:
      return register_fill<1>(type.mangled);
    case 2:
      return register_fill<2>(type.mangled);
    case 4:
      return register_fill<4>(type.mangled);
    case 8:
      return register_fill<8>(type.mangled);
    default:
      return register_fill<16>(type.mangled);
  }
}

[[maybe_unused]] const bool registered = [] {
  for (const Type& type : kTypes) register_fill(type);

  const size_t strided[] = {sizeof(int), sizeof(StridedCopy)};
  fake_register_kernel("22gpu_kernel_impl_nocastIZZZNS0_23direct_copy_kernel_cuda", copy_strided, 2,
                       strided);
  const size_t converting[] = {
      sizeof(int), 1, sizeof(Pointers<2>), 1, 1, sizeof(CastedTensor), sizeof(CastedTensor)};
  fake_register_kernel("27unrolled_elementwise_kernelIZZZNS0_23direct_copy_kernel_cuda",
                       copy_converting, 7, converting);
  const size_t from_float[] = {sizeof(int), 1, sizeof(Pointers<2>)};
  fake_register_kernel(
      "ZNS0_24float16_copy_kernel_cudaERNS_18TensorIteratorBaseEEUlfE_St5arrayIPcLm2E",
      copy_float_to<c10::ScalarType::Half>, 3, from_float);
  fake_register_kernel(
      "ZNS0_25bfloat16_copy_kernel_cudaERNS_18TensorIteratorBaseEEUlfE_St5arrayIPcLm2E",
      copy_float_to<c10::ScalarType::BFloat16>, 3, from_float);
  return true;
}();

}  // namespace
