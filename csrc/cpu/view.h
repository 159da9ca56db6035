// Tensors as the kernels see them, and how they run in parallel: plain data, no torch.
#pragma once

#include <cstdint>
#include <type_traits>

// Code that several instruction sets share must not exist out of line: the linker would keep one
// copy, perhaps the one that the processor at hand cannot run.
#define MIMNET_FAST_INLINE inline __attribute__((always_inline))

namespace mimnet_fast::cpu {

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

// Runs body(context, begin, end) over [0, count), the range cut among the caller's threads into
// pieces of at least `grain`.
struct Parallel {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, int64_t grain, void* context, Body body);
  int64_t threads;

  // `work` is the cost of one step in multiply-adds; too little of it stays on the calling thread.
  template <class F>
  MIMNET_FAST_INLINE void operator()(int64_t count, int64_t work, F&& body) const {
    using Function = typename std::remove_reference<F>::type;
    constexpr int64_t worth_a_thread = 200000;
    run(count, 1 + worth_a_thread / (work + 1), const_cast<void*>(static_cast<const void*>(&body)),
        [](void* context, int64_t begin, int64_t end) {
          (*static_cast<Function*>(context))(begin, end);
        });
  }
};

}  // namespace mimnet_fast::cpu
