#include "memory.h"
#include "ops.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

// Row r of the flattened leading dimensions of x.
MIMNET_FAST_INLINE char* row(const View& x, int64_t r) {
  int64_t offset = 0;
  for (int d = x.dims - 2; d >= 0; --d) {
    offset += r % x.size[d] * x.stride[d];
    r /= x.size[d];
  }
  return static_cast<char*>(x.data) + offset * element_size(x.dtype);
}

template <class T, class S>
void run(const SquashArgs& args) {
  const int last = args.x.dims - 1;
  const int64_t d = args.x.size[last];
  int64_t rows = 1;
  for (int i = 0; i < last; ++i) rows *= args.x.size[i];
  const bool backward = bool(args.grad);
  const Blocks<T> blocks(rows, args.execution.parallel.threads);
  args.execution.parallel(blocks.groups, 4 * d * kLanes<T>, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(2 * d);
    Vec<T>* x = scratch.take(d);
    Vec<T>* grad = scratch.take(d);
    const auto load = [&](const View& view, Vec<T>* lanes, Group group) {
      const S* from[kLanes<T>];
      for (int w = 0; w < group.users; ++w) {
        from[w] = reinterpret_cast<const S*>(row(view, group.first + w));
      }
      load_lanes_from<T, S>(lanes, from, group.users, d, view.stride[last]);
    };
    for (int64_t g = begin; g < end; ++g) {
      const int64_t left = rows - g * kLanes<T>;
      const Group group = {g * kLanes<T>, left < kLanes<T> ? int(left) : kLanes<T>};
      load(args.x, x, group);
      if (backward) {
        load(args.grad, grad, group);
        squash_backward_lanes<T>(grad, x, d, args.squash);
      } else {
        squash_lanes<T>(x, d, args.squash);
      }
      S* to[kLanes<T>];
      for (int w = 0; w < group.users; ++w) {
        to[w] = reinterpret_cast<S*>(row(args.out, group.first + w));
      }
      store_lanes_to<T, S>(backward ? grad : x, to, group.users, d, args.out.stride[last]);
    }
  });
}

}  // namespace

void squash(const SquashArgs& args) {
  with_storage(args.x.dtype, [&](auto storage) {
    using S = decltype(storage);
    run<std::conditional_t<std::is_same_v<S, double>, double, float>, S>(args);
  });
}

void squash_backward(const SquashArgs& args) { squash(args); }

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
