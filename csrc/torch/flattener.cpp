#include "flattener.h"

#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>

#include <algorithm>

#include "internals.h"

namespace sgdr {

// How a tensor's elements lie in memory.
class Layout {
 public:
  SGDR_INLINE explicit Layout(const at::Tensor& tensor)
      : tensor_(tensor), sizes_(tensor.sizes()), is_contiguous_(tensor.is_contiguous()) {}

  // Whether another tensor has the same elements in the same order, both without gaps.
  SGDR_INLINE bool is_of(const at::Tensor& other) const {
    const at::IntArrayRef sizes = other.sizes();
    if (sizes.size() != sizes_.size()) return false;
    for (size_t i = 0; i < sizes.size(); ++i) {  // equals() takes longer for so few
      if (sizes[i] != sizes_[i]) return false;
    }
    if (is_contiguous_) return other.is_contiguous();
    return tensor_.is_non_overlapping_and_dense() && other.strides().equals(tensor_.strides());
  }

 private:
  const at::Tensor& tensor_;
  at::IntArrayRef sizes_;
  bool is_contiguous_;
};

namespace {

// Whether writing one of the tensors changes another. Only a gradient may be the parameter itself,
// or the low-precision one where the parameter is its master.
bool share_memory(const ParamTensors& tensors) {
  const at::Tensor* const state[] = {tensors.momentum_buffer, tensors.ema,
                                     tensors.low_precision_param};
  const auto overlap = [](const at::Tensor* a, const at::Tensor* b) {
    if (a == nullptr || b == nullptr) return at::MemOverlapStatus::No;
    return at::get_overlap_status(*a, *b);
  };
  const auto is_safe = [](at::MemOverlapStatus status) {
    return status == at::MemOverlapStatus::No || status == at::MemOverlapStatus::TooHard;
  };
  for (size_t i = 0; i < std::size(state); ++i) {
    if (!is_safe(overlap(state[i], tensors.param))) return true;
    const at::MemOverlapStatus with_grad = overlap(state[i], tensors.grad);
    const bool may_be_grad = state[i] == tensors.low_precision_param;
    if (!is_safe(with_grad) && !(may_be_grad && with_grad == at::MemOverlapStatus::Full))
      return true;
    for (size_t j = 0; j < i; ++j) {
      if (!is_safe(overlap(state[i], state[j]))) return true;
    }
  }
  return overlap(tensors.grad, tensors.param) == at::MemOverlapStatus::Partial;
}

// The same for tensors without gaps.
SGDR_INLINE bool share_memory(const TensorEntry& entry) {
  struct Range {
    uintptr_t begin, end;

    Range(const void* memory, int64_t numel, ElementType type)
        : begin(reinterpret_cast<uintptr_t>(memory)),
          end(memory == nullptr ? begin
                                : begin + static_cast<uintptr_t>(numel) * element_size(type)) {}

    bool meets(const Range& other) const { return begin < other.end && other.begin < end; }
  };
  const Range param(entry.param, entry.numel, entry.param_type);
  const Range grad(entry.grad, entry.numel, entry.grad_type);
  const Range buffer(entry.momentum_buffer, entry.numel, entry.momentum_type);
  if (buffer.meets(param) || buffer.meets(grad)) return true;
  if (param.meets(grad) && param.begin != grad.begin) return true;
  if (entry.ema == nullptr && entry.low_precision_param == nullptr) return false;
  const Range ema(entry.ema, entry.numel, arithmetic_type(entry.param_type));
  const Range low_precision(entry.low_precision_param, entry.numel, entry.low_precision_type);
  if (low_precision.meets(grad) && low_precision.begin != grad.begin) return true;
  return ema.meets(param) || ema.meets(grad) || ema.meets(buffer) || low_precision.meets(param) ||
         low_precision.meets(buffer) || low_precision.meets(ema);
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

// Inlines torch's many small functions, which take a quarter of the instructions.
[[gnu::flatten]] bool Flattener::flatten(const ParamTensors& tensors, TensorEntry& entry) {
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

  if (!is_plain(param)) return false;
  const Layout layout(param);
  const auto fits = [&](const at::Tensor* tensor) __attribute__((always_inline)) {
    return tensor == nullptr || (is_plain(*tensor) && layout.is_of(*tensor));
  };
  if (!fits(&grad) || !fits(buffer) || !fits(ema) || !fits(low_precision)) return false;

  entry.param = address_of(param);
  entry.grad = const_address_of(grad);
  if (buffer != nullptr) entry.momentum_buffer = address_of(*buffer);
  if (ema != nullptr) entry.ema = address_of(*ema);
  if (low_precision != nullptr) entry.low_precision_param = address_of(*low_precision);
  entry.numel = param.numel();
  if (share_memory(entry)) return false;
  if (device_.is_cpu()) {
    if (hints_.size() == flattened_.size()) hints_.emplace_back();
    hints_[flattened_.size()] = {MetadataHint(param), MetadataHint(grad),
                                 MetadataHint(buffer == nullptr ? param : *buffer)};
  }
  flattened_.push_back(tensors);
  if (owns_) own(flattened_.back());
  return true;
}

[[gnu::noinline]] bool Flattener::flatten_unusual(ParamTensors tensors, TensorEntry& entry) {
  own(tensors);
  for (const at::Tensor* tensor : {tensors.param, tensors.grad, tensors.momentum_buffer,
                                   tensors.ema, tensors.low_precision_param}) {
    if (tensor == nullptr) continue;
    if (tensor->layout() != at::kStrided) return false;
    // Of shards, only the whole tensors' shapes can tell that they do not fit.
    if (!tensor->sizes().equals(tensors.param->sizes())) return false;
  }
  const at::Tensor& param =
      tensors.low_precision_param == nullptr ? *tensors.param : *tensors.low_precision_param;
  bool is_known = true;
  const auto plain = [&](const at::Tensor* tensor, bool is_written) -> const at::Tensor* {
    if (tensor == nullptr) return nullptr;
    const at::Tensor* const result = to_plain(*tensor, param, is_written);
    is_known &= result != nullptr;
    return result;
  };
  const ParamTensors all_plain = {.param = plain(tensors.param, true),
                                  .grad = plain(tensors.grad, false),
                                  .momentum_buffer = plain(tensors.momentum_buffer, true),
                                  .ema = plain(tensors.ema, true),
                                  .low_precision_param = plain(tensors.low_precision_param, true)};
  if (!is_known || share_memory(all_plain)) return false;
  const at::Tensor* const layout = to_layout_of(*all_plain.param, *all_plain.param, true);
  if (layout == nullptr) return false;
  const auto flat = [&](const at::Tensor* tensor, bool is_written) -> const at::Tensor* {
    if (tensor == nullptr) return nullptr;
    const at::Tensor* const result = to_layout_of(*tensor, *layout, is_written);
    is_known &= result != nullptr;
    return result;
  };
  const ParamTensors flattened = {.param = layout,
                                  .grad = flat(all_plain.grad, false),
                                  .momentum_buffer = flat(all_plain.momentum_buffer, true),
                                  .ema = flat(all_plain.ema, true),
                                  .low_precision_param = flat(all_plain.low_precision_param, true)};
  if (!is_known || !flatten_plain(flattened, entry)) return false;
  if (is_subclass(param)) written_subclasses_.push_back(param);
  return true;
}

// The tensor as plain memory of real numbers, or null. It shares the tensor's storage, except for a
// lazy conjugate or negative and for a gradient of integers or made in inference mode, which are
// copied. A tensor to be written may not have several elements at one address.
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
      (plain._is_zerotensor() || at::has_internal_overlap(plain) == at::MemOverlap::Yes))
    return nullptr;
  const c10::InferenceMode off(false);
  if (plain.is_conj() || plain.is_neg()) {
    const at::Tensor& lazy = kept_alive_.emplace_back(plain);
    plain = plain.resolve_conj().resolve_neg();
    if (is_written) copies_.push_back({&kept_alive_.emplace_back(plain), &lazy});
  }
  if (!is_written && (plain.is_inference() || plain._is_zerotensor())) plain = plain.clone();
  if (!is_written && at::isIntegralType(plain.scalar_type(), /*includeBool=*/true))
    plain = plain.to(param.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  if (plain.is_complex()) plain = at::view_as_real(plain);
  return &kept_alive_.emplace_back(std::move(plain));
}

// The tensor itself, or a copy whose elements lie in the order of another's; null if the shapes
// differ, or if a second copy of the same memory would be written back.
const at::Tensor* Flattener::to_layout_of(const at::Tensor& tensor, const at::Tensor& other,
                                          bool is_written) {
  if (!tensor.sizes().equals(other.sizes())) return nullptr;
  if (Layout(other).is_of(tensor)) return &tensor;
  for (const Copy& before : copies_) {
    if (is_written && tensor.numel() != 0 && before.original->data_ptr() == tensor.data_ptr())
      return nullptr;
  }
  const c10::InferenceMode off(false);
  at::Tensor& copy =
      kept_alive_.emplace_back(at::empty_like(other, other.options().dtype(tensor.scalar_type())));
  copy.copy_(tensor);
  if (is_written) copies_.push_back({&copy, &tensor});
  return &copy;
}

void Flattener::own() {
  if (owns_) return;
  owns_ = true;
  for (ParamTensors& tensors : flattened_) own(tensors);
}

void Flattener::own(ParamTensors& tensors) {
  for (const at::Tensor** tensor : {&tensors.param, &tensors.grad, &tensors.momentum_buffer,
                                    &tensors.ema, &tensors.low_precision_param}) {
    if (*tensor != nullptr) *tensor = own(*tensor);
  }
}

const at::Tensor* Flattener::own(const at::Tensor* tensor) {
  // A tensor may get another storage (.data = ...) while its old one is in use.
  if (tensor->has_storage()) kept_storages_.push_back(tensor->storage());
  return &kept_alive_.emplace_back(*tensor);
}

bool Flattener::copies_shared_memory() const {
  if (copies_.empty()) return false;
  struct Written {
    uintptr_t begin, end;
    bool is_copied;
  };
  std::vector<Written> all;
  // With what lies in gaps between the elements: an overlap there may be none.
  const auto add = [&](const at::Tensor* tensor, bool is_copied) {
    if (tensor == nullptr || tensor->numel() == 0) return;
    int64_t last = 0;
    for (int64_t dim = 0; dim < tensor->dim(); ++dim)
      last += (tensor->size(dim) - 1) * tensor->stride(dim);
    const auto begin = reinterpret_cast<uintptr_t>(tensor->const_data_ptr());
    all.push_back({begin, begin + (last + 1) * tensor->element_size(), is_copied});
  };
  for (const ParamTensors& tensors : flattened_) {
    for (const at::Tensor* tensor :
         {tensors.param, tensors.momentum_buffer, tensors.ema, tensors.low_precision_param})
      add(tensor, false);
  }
  for (const Copy& copy : copies_) add(copy.original, true);
  std::ranges::sort(all, {}, &Written::begin);
  uintptr_t end = 0, end_of_copied = 0;
  for (const Written& written : all) {
    if (written.begin < (written.is_copied ? end : end_of_copied)) return true;
    end = std::max(end, written.end);
    if (written.is_copied) end_of_copied = std::max(end_of_copied, written.end);
  }
  return false;
}

void Flattener::finish() {
  // A copy may be of another copy, made before it.
  for (auto it = copies_.rbegin(); it != copies_.rend(); ++it) it->original->copy_(*it->copy);
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
  kept_storages_.clear();
  owns_ = false;
}

}  // namespace sgdr
