#include "flattener.h"

#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>

#include "internals.h"

namespace sgdr {
namespace {

// Whether both have the same elements in the same order of memory, without gaps.
SGDR_INLINE bool has_layout_of(const at::Tensor& tensor, const at::Tensor& other) {
  if (!tensor.sizes().equals(other.sizes())) return false;
  if (other.is_contiguous()) return tensor.is_contiguous();
  return other.is_non_overlapping_and_dense() && tensor.strides().equals(other.strides());
}

}  // namespace

// After forward and backward the tensors' metadata is not in the caches, and a step over small
// tensors mostly waits for it. Prefetching saves a seventh of a step over 161 tensors of 1024
// elements.
SGDR_INLINE void Flattener::prefetch_ahead() const {
  constexpr size_t kParamsAhead = 4;
  if (flattened_.size() + kParamsAhead >= hints_.size()) return;
  for (const MetadataHint& hint : hints_[flattened_.size() + kParamsAhead]) hint.prefetch();
}

bool Flattener::flatten(const ParamTensors& tensors, TensorEntry& entry) {
  prefetch_ahead();
  return flatten_plain(tensors, entry) || flatten_unusual(tensors, entry);
}

SGDR_INLINE bool Flattener::is_plain(const at::Tensor& tensor) const {
  // The keys say that it is on a CPU, but not on which GPU.
  return tensor.key_set() == plain_keys_ && (device_.is_cpu() || tensor.device() == device_);
}

// All tensors are plain, of a type that the backends know, and alike in layout.
SGDR_INLINE bool Flattener::flatten_plain(const ParamTensors& tensors, TensorEntry& entry) {
  const at::Tensor& param = *tensors.param;
  const at::Tensor& grad = *tensors.grad;
  const at::Tensor* const buffer = tensors.momentum_buffer;
  const at::Tensor* const ema = tensors.ema;
  const at::Tensor* const low_precision = tensors.low_precision_param;

  entry.param_type = element_type(param);
  entry.grad_type = element_type(grad);
  entry.momentum_type = buffer == nullptr ? entry.param_type : element_type(*buffer);
  entry.low_precision_type =
      low_precision == nullptr ? ElementType::kNone : element_type(*low_precision);
  if (entry.param_type == ElementType::kNone || entry.grad_type == ElementType::kNone ||
      entry.momentum_type == ElementType::kNone ||
      (ema != nullptr && element_type(*ema) != arithmetic_type(entry.param_type)) ||
      (low_precision != nullptr && entry.param_type != ElementType::kFloat))
    return false;

  const auto fits = [&](const at::Tensor* tensor) __attribute__((always_inline)) {
    return tensor == nullptr || (is_plain(*tensor) && has_layout_of(*tensor, param));
  };
  if (!is_plain(param) || !fits(&grad) || !fits(buffer) || !fits(ema) || !fits(low_precision))
    return false;

  entry.param = param.mutable_data_ptr();
  entry.grad = grad.const_data_ptr();
  if (buffer != nullptr) entry.momentum_buffer = buffer->mutable_data_ptr();
  if (ema != nullptr) entry.ema = ema->mutable_data_ptr();
  if (low_precision != nullptr) entry.low_precision_param = low_precision->mutable_data_ptr();
  entry.numel = param.numel();
  if (device_.is_cpu()) {
    if (hints_.size() == flattened_.size()) hints_.emplace_back();
    hints_[flattened_.size()] = {MetadataHint(param), MetadataHint(grad),
                                 MetadataHint(buffer == nullptr ? param : *buffer)};
  }
  flattened_.push_back(tensors);
  return true;
}

bool Flattener::flatten_unusual(const ParamTensors& tensors, TensorEntry& entry) {
  // Of shards, only the whole tensors' shapes can tell that they do not fit.
  for (const at::Tensor* tensor :
       {tensors.grad, tensors.momentum_buffer, tensors.ema, tensors.low_precision_param}) {
    if (tensor != nullptr && !tensor->sizes().equals(tensors.param->sizes())) return false;
  }
  const at::Tensor& param =
      tensors.low_precision_param == nullptr ? *tensors.param : *tensors.low_precision_param;
  const at::Tensor* const plain_param = to_plain(*tensors.param, param, true);
  if (plain_param == nullptr) return false;
  const at::Tensor* const layout = to_layout_of(*plain_param, *plain_param, true);

  bool is_known = true;
  const auto flat = [&](const at::Tensor* tensor, bool is_written) -> const at::Tensor* {
    if (tensor == nullptr) return nullptr;
    const at::Tensor* const plain = to_plain(*tensor, param, is_written);
    const at::Tensor* const result =
        plain == nullptr ? nullptr : to_layout_of(*plain, *layout, is_written);
    is_known &= result != nullptr;
    return result;
  };
  const ParamTensors flattened = {.param = layout,
                                  .grad = flat(tensors.grad, false),
                                  .momentum_buffer = flat(tensors.momentum_buffer, true),
                                  .ema = flat(tensors.ema, true),
                                  .low_precision_param = flat(tensors.low_precision_param, true)};
  if (!is_known) return false;
  if (!flatten_plain(flattened, entry)) return false;
  if (is_subclass(param)) written_subclasses_.push_back(param);
  return true;
}

// The tensor as plain memory of real numbers, or null. It shares the tensor's storage, except for a
// lazy conjugate or negative, which is copied. A tensor to be written may be no such view, and may
// not have several elements at one address.
const at::Tensor* Flattener::to_plain(const at::Tensor& tensor, const at::Tensor& param,
                                      bool is_written) {
  at::Tensor plain = tensor;
  if (is_subclass(tensor)) {
    if (!local_tensor_) return nullptr;
    plain = local_tensor_(tensor, param);
    if (!plain.defined()) return nullptr;
  }
  if (plain.device() != device_ || plain.layout() != at::kStrided) return nullptr;
  if (is_written &&
      (plain.is_conj() || plain.is_neg() || at::has_internal_overlap(plain) == at::MemOverlap::Yes))
    return nullptr;
  plain = plain.resolve_conj().resolve_neg();
  if (plain.is_complex()) plain = at::view_as_real(plain);
  return &kept_alive_.emplace_back(std::move(plain));
}

// The tensor itself, or a copy whose elements lie in the order of another's; null if the shapes
// differ.
const at::Tensor* Flattener::to_layout_of(const at::Tensor& tensor, const at::Tensor& other,
                                          bool is_written) {
  if (!tensor.sizes().equals(other.sizes())) return nullptr;
  if (has_layout_of(tensor, other)) return &tensor;
  const c10::InferenceMode off(false);
  at::Tensor& copy =
      kept_alive_.emplace_back(at::empty_like(other, other.options().dtype(tensor.scalar_type())));
  copy.copy_(tensor);
  if (is_written) copies_.push_back({&copy, &tensor});
  return &copy;
}

void Flattener::keep_alive() {
  for (ParamTensors& tensors : flattened_) {
    for (const at::Tensor** tensor : {&tensors.param, &tensors.grad, &tensors.momentum_buffer,
                                      &tensors.ema, &tensors.low_precision_param}) {
      if (*tensor != nullptr) *tensor = &kept_alive_.emplace_back(**tensor);
    }
  }
}

void Flattener::finish() {
  for (const auto& [copy, original] : copies_) original->copy_(*copy);
  for (const ParamTensors& tensors : flattened_) {
    for (const at::Tensor* tensor :
         {tensors.param, tensors.momentum_buffer, tensors.ema, tensors.low_precision_param}) {
      if (tensor != nullptr) bump_version(*tensor);
    }
  }
  for (const at::Tensor& tensor : written_subclasses_) bump_version(tensor);
}

void Flattener::clear() {
  flattened_.clear();
  written_subclasses_.clear();
  copies_.clear();
  kept_alive_.clear();
}

}  // namespace sgdr
