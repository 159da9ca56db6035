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

// Whether a tensor is of a type that kernels compute in or convert.
inline bool is_floating(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  if (tensor.dim() != int64_t(sizes.size())) return false;
  int64_t d = 0;
  for (const int64_t size : sizes) {
    if (tensor.size(d++) != size) return false;
  }
  return true;
}

// Whether a tensor has this shape, and the dtype and device of `like`.
inline bool fits(const Tensor& tensor, const Tensor& like, std::initializer_list<int64_t> sizes) {
  return tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device() &&
         has_shape(tensor, sizes);
}

// The same of a tensor that may be absent.
inline bool fits(const std::optional<Tensor>& tensor, const Tensor& like,
                 std::initializer_list<int64_t> sizes) {
  return !tensor.has_value() || fits(*tensor, like, sizes);
}

// Whether a mask that may be absent is one of this shape, on the device of `like`.
inline bool is_mask(const std::optional<Tensor>& mask, const Tensor& like,
                    std::initializer_list<int64_t> sizes) {
  return !mask.has_value() || (mask->scalar_type() == ScalarType::Bool &&
                               mask->device() == like.device() && has_shape(*mask, sizes));
}

// Whether what says where histories end is that: a mask [B, L], lengths [B] or offsets [B+1].
inline bool tells_lengths(const std::optional<Tensor>& mask, const Tensor& like, int64_t batch,
                          int64_t length, bool jagged) {
  if (!mask.has_value() || mask->dim() == 2) return !jagged && is_mask(mask, like, {batch, length});
  const bool integers =
      mask->scalar_type() == ScalarType::Long || mask->scalar_type() == ScalarType::Int;
  return integers && mask->device() == like.device() &&
         has_shape(*mask, {jagged ? batch + 1 : batch});
}

// Refuses what no kernel could run on. The Python function of the op finds out what is wrong, and
// looks at nothing before.
inline void check_fit(bool fit, const char* op) {
  STD_TORCH_CHECK(fit, "mimnet_fast: the tensors do not fit each other; mimnet_fast.ops.", op,
                  " says which one");
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

// Both attentions and the gate.
struct FusionTensors {
  const Tensor &fine_kw, &fine_kb, &fine_vw, &fine_vb;
  const Tensor &coarse_kw, &coarse_kb, &coarse_vw, &coarse_vb;
  const Tensor &weight, &bias;

  bool fit(const Tensor& like, int64_t d) const {
    const auto attention = [&](const Tensor& kw, const Tensor& kb, const Tensor& vw,
                               const Tensor& vb) {
      return fits(kw, like, {d, d}) && fits(kb, like, {d}) && fits(vw, like, {d, d}) &&
             fits(vb, like, {d});
    };
    return attention(fine_kw, fine_kb, fine_vw, fine_vb) &&
           attention(coarse_kw, coarse_kb, coarse_vw, coarse_vb) && fits(weight, like, {2 * d}) &&
           (fits(bias, like, {1}) || fits(bias, like, {}));
  }

  FusionWeights weights() const {
    return {{view(fine_kw), view(fine_vw), view(fine_vb)},
            {view(coarse_kw), view(coarse_vw), view(coarse_vb)},
            view(weight),
            view(bias)};
  }
};

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
