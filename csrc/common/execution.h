// What kernels need of their caller to run.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "inline.h"

namespace mimnet_fast {

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

  // The same one step at a time, each on the thread that is free next, for steps of unequal cost.
  template <class F>
  MIMNET_FAST_INLINE void each(int64_t count, int64_t work, F&& step) const {
    std::atomic<int64_t> next{0};
    (*this)(threads, count* work / threads, [&](int64_t, int64_t) {
      for (int64_t i = next++; i < count; i = next++) step(i);
    });
  }
};

// Where kernels of an accelerator are launched. Memory that `allocate` gives is the stream's until
// the call returns.
struct Stream {
  void* handle;
  void* owner;
  void* (*allocate)(void* owner, int64_t bytes);
};

// Each device reads its own part.
struct Execution {
  Parallel parallel;
  Stream stream;
};

}  // namespace mimnet_fast
