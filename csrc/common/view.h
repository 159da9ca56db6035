// Tensors as the kernels see them: plain data, no torch.
#pragma once

#include <cstdint>

#include "inline.h"

namespace mimnet_fast {

enum class DType : int32_t { float32, float64, bfloat16, float16, int32, int64, boolean };

constexpr int kMaxDims = 4;

// A strided tensor of up to four dimensions; sizes and strides are counted in elements.
struct View {
  void* data = nullptr;  // null: the tensor was not given
  DType dtype = DType::float32;
  int dims = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  MIMNET_FAST_INLINE explicit operator bool() const { return data != nullptr; }
};

MIMNET_FAST_INLINE int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64:
      return 8;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
      return 2;
    case DType::boolean:
      break;
  }
  return 1;
}

}  // namespace mimnet_fast
