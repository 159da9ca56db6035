// Between torch's stable ABI and the kernels' views.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "device.h"

namespace mimnet_fast::binding {

using torch::headeronly::ScalarType;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::Int:
      return DType::int32;
    case ScalarType::Long:
      return DType::int64;
    case ScalarType::Bool:
      return DType::boolean;
    default:
      STD_TORCH_CHECK(false, "mimnet_fast: a kernel got a tensor of a dtype it does not know");
  }
}

inline View view(const Tensor& tensor) {
  View v;
  v.data = tensor.data_ptr();
  v.dtype = dtype_of(tensor);
  v.dims = int(tensor.dim());
  STD_TORCH_CHECK(v.dims <= kMaxDims, "mimnet_fast: a kernel got a tensor of ", v.dims,
                  " dimensions");
  for (int d = 0; d < v.dims; ++d) {
    v.size[d] = tensor.size(d);
    v.stride[d] = tensor.stride(d);
  }
  if (v.dims == 0) {  // a number is a vector of one
    v.dims = 1;
    v.size[0] = v.stride[0] = 1;
  }
  return v;
}

inline View view(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? view(*tensor) : View{};
}

// [B, D] as [B, 1, D] (and [B] as [B, 1] with rank 2): one candidate per user.
inline View with_candidates(const Tensor& tensor, int rank) {
  View v = view(tensor);
  if (v.dims == rank) return v;
  for (int d = v.dims; d > 1; --d) {
    v.size[d] = v.size[d - 1];
    v.stride[d] = v.stride[d - 1];
  }
  v.size[1] = 1;
  v.stride[1] = 0;
  ++v.dims;
  return v;
}

// Whether values stand one after another, which takes a dimension less and offsets as the mask.
inline bool is_jagged(const Tensor& values, int64_t dims, const std::optional<Tensor>& mask) {
  if (values.dim() != dims) return false;
  STD_TORCH_CHECK(mask.has_value() && mask->dim() == 1 && mask->size(0) > 0,
                  "mimnet_fast: jagged histories need offsets [B+1]");
  return true;
}

// Whether a tensor has this shape, and the dtype and device of `like`.
inline bool fits(const Tensor& tensor, const Tensor& like, std::initializer_list<int64_t> sizes) {
  if (tensor.scalar_type() != like.scalar_type() || tensor.device() != like.device() ||
      tensor.dim() != int64_t(sizes.size())) {
    return false;
  }
  int64_t d = 0;
  for (const int64_t size : sizes) {
    if (tensor.size(d++) != size) return false;
  }
  return true;
}

// torch::stable::new_empty without its way through the boxed dispatcher.
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  int32_t type = 0;
  if (dtype.has_value()) {
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  }
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
      like.get(), sizes.data(), int64_t(sizes.size()), dtype.has_value() ? &type : nullptr, nullptr,
      nullptr, 0, nullptr, &made));
  return Tensor(made);
}

// What the kernels keep for backward is in the type that they accumulate in.
inline ScalarType saved_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Gradients of a backward op: like the input where its bit is set in `needs`, else an empty tensor.
template <size_t N>
std::array<Tensor, N> gradients_like(const std::array<std::optional<Tensor>, N>& inputs,
                                     const Tensor& any, int64_t needs) {
  std::array<Tensor, N> gradients;
  for (size_t i = 0; i < N; ++i) {
    const bool wanted = (needs >> i & 1) && inputs[i].has_value();
    gradients[i] = wanted ? empty(*inputs[i], inputs[i]->sizes()) : empty(any, {0});
  }
  return gradients;
}

// The view of gradient i, empty when it is not wanted.
template <size_t N>
View wanted(const std::array<Tensor, N>& gradients, int64_t needs, int i) {
  return needs >> i & 1 ? view(gradients[i]) : View{};
}

inline FusionWeights fusion_weights(const Tensor& fine_kw, const Tensor& fine_vw,
                                    const Tensor& fine_vb, const Tensor& coarse_kw,
                                    const Tensor& coarse_vw, const Tensor& coarse_vb,
                                    const Tensor& weight, const Tensor& bias) {
  return {{view(fine_kw), view(fine_vw), view(fine_vb)},
          {view(coarse_kw), view(coarse_vw), view(coarse_vb)},
          view(weight),
          view(bias)};
}

// The gradients of both attentions and the gate, in the order of the schemas, starting at `first`.
// The key biases stay out: the softmax does not see them.
template <size_t N>
FusionWeights fusion_gradients(std::array<Tensor, N>& gradients, int64_t needs, int first) {
  const auto at = [&](int i) { return wanted(gradients, needs, first + i); };
  for (const int key_bias : {1, 5}) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(gradients[first + key_bias].get()));
  }
  return {{at(0), at(2), at(3)}, {at(4), at(6), at(7)}, at(8), at(9)};
}

}  // namespace mimnet_fast::binding
