#include <algorithm>

#include "memory.h"
#include "ops.h"
#include "rows.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

// Rows (vectors along the last dimension) of a tensor. The kernel computes on rows of T that are a
// fixed step apart: in place where they are that, else in a copy, which `scratch` vectors hold.
template <class T, class S>
class Rows {
 public:
  explicit Rows(const View& view) : view_(view), d_(view ? view.size[view.dims - 1] : 0) {
    regular_ = d_ <= 1 || view.stride[view.dims - 1] == 1;
    step_ = d_;
    int64_t rows = 1;
    for (int d = view.dims - 2; d >= 0; --d) {
      if (view.size[d] == 1) continue;
      if (rows == 1) step_ = view.stride[d];
      regular_ = regular_ && view.stride[d] == rows * step_;
      rows *= view.size[d];
    }
    scratch = in_place() ? 0 : d_;
  }

  // Where to compute; `copy` is memory for a copy.
  GroupRows<T> room(Group group, Vec<T>* copy) const {
    if (!in_place()) return {reinterpret_cast<T*>(copy), d_};
    return {reinterpret_cast<T*>(data()) + group.first * step_, step_};
  }

  GroupRows<T> load(Group group, Vec<T>* copy) const {
    const GroupRows<T> rows = room(group, copy);
    if (in_place()) return rows;
    if (dense()) {
      widen_all(rows.first, data() + group.first * d_, group.users * d_);
    } else {
      each(group, [&](int64_t i, const S& x) { rows.first[i] = widen<T>(x); });
    }
    return rows;
  }

  void store(Group group, GroupRows<T> rows) const {
    if (in_place()) return;
    if (dense()) {
      narrow_all(data() + group.first * d_, rows.first, group.users * d_);
    } else {
      each(group, [&](int64_t i, S& x) { x = narrow<S>(rows.first[i]); });
    }
  }

  int64_t scratch;

 private:
  bool in_place() const { return std::is_same_v<S, T> && regular_; }
  bool dense() const { return regular_ && step_ == d_; }
  S* data() const { return static_cast<S*>(view_.data); }

  // Calls f(i, element) for element i of the group, element e of all rows in turn.
  template <class F>
  MIMNET_FAST_INLINE void each(Group group, F&& f) const {
    S* row[kLanes<T>];
    for (int w = 0; w < group.users; ++w) {
      row[w] = data();
      int64_t rest = group.first + w;
      for (int d = view_.dims - 2; d >= 0; --d) {
        row[w] += rest % view_.size[d] * view_.stride[d];
        rest /= view_.size[d];
      }
    }
    const int64_t stride = view_.stride[view_.dims - 1];
    for (int64_t e = 0; e < d_; ++e) {
      for (int w = 0; w < group.users; ++w) f(w * d_ + e, row[w][e * stride]);
    }
  }

  View view_;
  int64_t d_, step_;
  bool regular_;
};

template <class T>
void squash_rows(GroupRows<T> out, GroupRows<T> x, int rows, int64_t d, const Squash& squash) {
  const Vec<T> norm2 = dot_rows<T>(x, x, rows, d);
  const Vec<T> factor = squash_factor<LaneMath<T>>(norm2, squash).factor;
  for_rows<T>(rows, d, [&](int w, auto one) {
    for_vectors<T>(one, d, [&](int64_t e, auto count) {
      store(out[w] + e, factor[w] * load(x[w] + e, count), count);
    });
  });
}

template <class T>
void squash_backward_rows(GroupRows<T> out, GroupRows<T> grad, GroupRows<T> x, int rows, int64_t d,
                          const Squash& squash) {
  const Vec<T> norm2 = dot_rows<T>(x, x, rows, d);
  const Vec<T> dot = dot_rows<T>(x, grad, rows, d);
  const SquashGradient<T> f = squash_gradient<T>(norm2, dot, squash);
  for_rows<T>(rows, d, [&](int w, auto one) {
    for_vectors<T>(one, d, [&](int64_t e, auto count) {
      store(out[w] + e, f.of_grad[w] * load(grad[w] + e, count) + f.of_x[w] * load(x[w] + e, count),
            count);
    });
  });
}

template <class T, class S>
void run(const SquashArgs& args) {
  constexpr int n = kLanes<T>;
  const int last = args.x.dims - 1;
  const int64_t d = args.x.size[last];
  int64_t rows = 1;
  for (int i = 0; i < last; ++i) rows *= args.x.size[i];
  const Rows<T, S> x(args.x), grad(args.grad), out(args.out);
  args.execution.parallel((rows + n - 1) / n, 4 * d * n, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(x.scratch + grad.scratch + out.scratch);
    Vec<T>* const x_copy = scratch.take(x.scratch);
    Vec<T>* const grad_copy = scratch.take(grad.scratch);
    Vec<T>* const out_copy = scratch.take(out.scratch);
    for (int64_t g = begin; g < end; ++g) {
      const Group group = {g * n, int(std::min<int64_t>(n, rows - g * n))};
      const GroupRows<T> from = x.load(group, x_copy), to = out.room(group, out_copy);
      if (args.grad) {
        squash_backward_rows<T>(to, grad.load(group, grad_copy), from, group.users, d, args.squash);
      } else {
        squash_rows<T>(to, from, group.users, d, args.squash);
      }
      out.store(group, to);
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
