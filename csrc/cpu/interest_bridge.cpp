#include "interest_bridge.h"

#include "ops.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

namespace {

// Terms r of columns n, from[r * row + n * column], tile by tile of kTileN columns, as numbers or
// in pairs.
template <class T>
void pack_tiles(T* to, const T* from, int64_t row, int64_t column, int64_t terms, int64_t columns,
                bool in_pairs) {
  for (int64_t n = 0; n < columns; n += kTileN) {
    const int64_t width = columns - n < kTileN ? columns - n : kTileN;
    for (int64_t r = 0; r < terms; r += in_pairs ? 2 : 1, to += kTileN) {
      const T* at = from + r * row + n * column;
      if (!in_pairs) {
        for (int64_t c = 0; c < width; ++c) to[c] = at[c * column];
        continue;
      }
      auto* bits = reinterpret_cast<int32_t*>(to);
      for (int64_t c = 0; c < width; ++c) {
        const float next = r + 1 < terms ? float(at[row + c * column]) : 0.0f;
        bits[c] = pair_of(float(at[c * column]), next);
      }
    }
  }
}

}  // namespace

template <class T>
BridgePlan<T>::BridgePlan(const View& w1_view, const View& b1_view, const View& w2_view,
                          const View& b2_view, int64_t k, int64_t source_width,
                          const Parallel& parallel)
    : w1_(w1_view), b1_(b1_view), w2_(w2_view), b2_(b2_view) {
  interests = k;
  d_interest = w1_view.size[1];
  hidden = w1_view.size[0];
  d_source = source_width;
  d_target = b2_view.size[0] / source_width;
  w1 = w1_.get();
  b1 = b1_.get();
  w2 = w2_.get();
  b2 = b2_.get();

  const int64_t most = d_target < 6 ? d_target : 6;
  const int64_t count = (d_target + most - 1) / (most > 0 ? most : 1);
  panel_ = count > 0 ? (d_target + count - 1) / count : 1;
  pairs = kPairs<T> && w2_view.dtype == DType::bfloat16 && cpu_has_pairs();
  panel_stride_ =
      (panel_ * hidden + kTileN - 1) / kTileN * kTileN * (pairs ? pairs_of(d_source) : d_source);
  packed_ = Buffer<T>(panels() * panel_stride_);
  const int64_t row = d_target * hidden;
  parallel(panels(), panel_stride_, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const T* from = w2 + panel_begin(panel) * hidden;
      T* to = packed_.get() + panel * panel_stride_;
      pack_tiles(to, from, row, 1, d_source, panel_size(panel) * hidden, pairs);
    }
  });
}

template <class T>
void BridgePlan<T>::pack_transposed(const Parallel& parallel) {
  if (!pairs) return;
  transposed_stride_ = (d_source + kTileN - 1) / kTileN * kTileN * pairs_of(panel_size(0) * hidden);
  transposed_ = Buffer<T>(panels() * transposed_stride_);
  parallel(panels(), transposed_stride_, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const T* from = w2 + panel_begin(panel) * hidden;
      T* to = transposed_.get() + panel * transposed_stride_;
      pack_tiles(to, from, 1, d_target * hidden, panel_size(panel) * hidden, d_source, true);
    }
  });
}

template <class T>
const Vec<T>* BridgePlan<T>::as_terms(Vec<T>* scratch, const Vec<T>* values, int64_t groups,
                                      int64_t stride, int64_t count) const {
  if constexpr (kPairs<T>) {
    if (pairs) {
      auto* to = reinterpret_cast<PairVec*>(scratch);
      for (int64_t g = 0; g < groups; ++g) {
        pack_pairs(to + g * pairs_of(count), values + g * stride, count);
      }
      return scratch;
    }
  }
  return values;
}

template <class T>
void BridgePlan<T>::contract(Vec<T>* contracted, const Vec<T>* source, int64_t groups,
                             int64_t panel) const {
  const T* packed = packed_.get() + panel * panel_stride_;
  const int64_t columns = panel_size(panel) * hidden;
  if constexpr (kPairs<T>) {
    if (pairs) {
      const int64_t terms = pairs_of(d_source);
      const SharedMatrix<int32_t> w(reinterpret_cast<const int32_t*>(packed), kTileN, 1,
                                    kTileN * terms);
      return multiply_pairs({contracted, panel_ * hidden, 1},
                            {reinterpret_cast<const PairVec*>(source), terms, 1}, w, groups,
                            columns, terms, false);
    }
  }
  const SharedMatrix<T> w(packed, kTileN, 1, kTileN * d_source);
  multiply<T>({contracted, panel_ * hidden, 1}, {source, d_source, 1}, w, groups, columns, d_source,
              false);
}

template <class T>
void BridgePlan<T>::contract_backward(Vec<T>* source_grad, const Vec<T>* contracted_grad,
                                      int64_t groups, int64_t panel, Vec<T>* scratch) const {
  const int64_t stride = panel_ * hidden, count = panel_size(panel) * hidden;
  const Vec<T>* terms = as_terms(scratch, contracted_grad, groups, stride, count);
  if constexpr (kPairs<T>) {
    if (pairs) {
      const T* packed = transposed_.get() + panel * transposed_stride_;
      const SharedMatrix<int32_t> w(reinterpret_cast<const int32_t*>(packed), kTileN, 1,
                                    kTileN * pairs_of(count));
      return multiply_pairs({source_grad, d_source, 1},
                            {reinterpret_cast<const PairVec*>(terms), pairs_of(count), 1}, w,
                            groups, d_source, pairs_of(count), true);
    }
  }
  multiply<T>({source_grad, d_source, 1}, {terms, stride, 1},
              SharedMatrix<T>(w2 + panel_begin(panel) * hidden, 1, d_target * hidden), groups,
              d_source, count, true);
}

template <class T>
void bridge_hidden(const BridgePlan<T>& p, BridgeState<T>& s, const Vec<T>* interests,
                   int64_t groups) {
  multiply_relu<T>({s.hidden, p.hidden, 1}, {interests, p.d_interest, 1},
                   SharedMatrix<T>(p.w1, 1, p.d_interest), p.b1, groups * p.interests, p.hidden,
                   p.d_interest);
}

template <class T>
void bridge_forward(const BridgePlan<T>& p, BridgeState<T>& s, Vec<T>* out, const Vec<T>* interests,
                    const Vec<T>* source, int64_t groups) {
  const int64_t k = p.interests, hidden = p.hidden, d = p.d_target;
  const int64_t stride = p.panel_size(0) * hidden;
  bridge_hidden<T>(p, s, interests, groups);
  multiply<T>({s.sum, d, 1}, {source, p.d_source, 1}, SharedMatrix<T>(p.b2, d, 1), groups, d,
              p.d_source, false);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < k * d; ++i) out[g * k * d + i] = s.sum[g * d + i % d];
  }
  const Vec<T>* terms = p.as_terms(s.terms, source, groups, p.d_source, p.d_source);
  for (int64_t panel = 0; panel < p.panels(); ++panel) {
    const int64_t j = p.panel_begin(panel), size = p.panel_size(panel);
    Vec<T>* contracted = s.contracted + panel * s.panel_step;
    p.contract(contracted, terms, groups, panel);
    for (int64_t g = 0; g < groups; ++g) {
      multiply<T>({out + g * k * d + j, d, 1}, {s.hidden + g * k * hidden, hidden, 1},
                  ConstLaneMatrix<T>{contracted + g * stride, 1, hidden}, k, size, hidden, true);
    }
  }
}

template <class T>
void bridge_hidden_backward(const BridgePlan<T>& p, BridgeState<T>& s, const Vec<T>* out_grad,
                            const Vec<T>* source, int64_t groups) {
  const int64_t k = p.interests, hidden = p.hidden, d = p.d_target;
  const int64_t stride = p.panel_size(0) * hidden;
  const bool again = s.panel_step == 0;
  const Vec<T>* terms =
      again ? p.as_terms(s.terms, source, groups, p.d_source, p.d_source) : nullptr;
  for (int64_t panel = 0; panel < p.panels(); ++panel) {
    const int64_t j = p.panel_begin(panel), size = p.panel_size(panel);
    Vec<T>* contracted = s.contracted + panel * s.panel_step;
    if (again) p.contract(contracted, terms, groups, panel);
    for (int64_t g = 0; g < groups; ++g) {
      multiply<T>({s.hidden_grad + g * k * hidden, hidden, 1}, {out_grad + g * k * d + j, d, 1},
                  ConstLaneMatrix<T>{contracted + g * stride, hidden, 1}, k, hidden, size,
                  panel > 0);
    }
  }
  for (int64_t i = 0; i < groups * k * hidden; ++i) {
    s.hidden_grad[i] = select(s.hidden[i] > T(0), s.hidden_grad[i], Vec<T>{});
  }
}

template <class T>
void bridge_backward(const BridgePlan<T>& p, BridgeState<T>& s, Vec<T>* interests_grad,
                     Vec<T>* source_grad, const Vec<T>* out_grad, const Vec<T>* interests,
                     const Vec<T>* source, int64_t groups,
                     const BridgeRows<T>* const* rows_of_groups, const Group* places) {
  const int64_t k = p.interests, hidden = p.hidden, d = p.d_target;
  const int64_t stride = p.panel_size(0) * hidden;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t j = 0; j < d; ++j) {
      Vec<T> sum{};
      for (int64_t i = 0; i < k; ++i) sum += out_grad[(g * k + i) * d + j];
      s.sum[g * d + j] = sum;
    }
  }
  if (source_grad != nullptr) {
    multiply<T>({source_grad, p.d_source, 1}, {s.sum, d, 1}, SharedMatrix<T>(p.b2, 1, d), groups,
                p.d_source, d, false);
    for (int64_t panel = 0; panel < p.panels(); ++panel) {
      const int64_t j = p.panel_begin(panel), size = p.panel_size(panel);
      Vec<T>* gradient = s.contracted;  // of T
      for (int64_t g = 0; g < groups; ++g) {
        multiply<T>({gradient + g * stride, hidden, 1}, {out_grad + g * k * d + j, 1, d},
                    ConstLaneMatrix<T>{s.hidden + g * k * hidden, hidden, 1}, size, hidden, k,
                    false);
      }
      p.contract_backward(source_grad, gradient, groups, panel, s.terms);
    }
  }
  if (interests_grad != nullptr) {
    multiply<T>({interests_grad, p.d_interest, 1}, {s.hidden_grad, hidden, 1},
                SharedMatrix<T>(p.w1, p.d_interest, 1), groups * k, p.d_interest, hidden, false);
  }
  for (int64_t g = 0; g < groups; ++g) {
    const Group group = places[g];
    const BridgeRows<T>& rows = *rows_of_groups[g];
    save_rows<T>(rows.source.get(), rows.source.width, source + g * p.d_source, p.d_source, group);
    save_rows<T>(rows.out_grad_sum.get(), rows.out_grad_sum.width, s.sum + g * d, d, group);
    for (int64_t i = 0; i < k; ++i) {
      const int64_t r = g * k + i;
      save_rows<T>(rows.interests.get(), rows.interests.width, interests + r * p.d_interest,
                   p.d_interest, group, k, i);
      save_rows<T>(rows.hidden.get(), rows.hidden.width, s.hidden + r * hidden, hidden, group, k,
                   i);
      save_rows<T>(rows.hidden_grad.get(), rows.hidden_grad.width, s.hidden_grad + r * hidden,
                   hidden, group, k, i);
      save_rows<T>(rows.out_grad.get(), rows.out_grad.width, out_grad + r * d, d, group, k, i);
    }
  }
}

template <class T>
void add_bridge_gradients(const BridgePlan<T>& p, const BridgeRows<T>& rows, int64_t batch,
                          const BridgeGradientViews& views, WeightGradients<T>& gradients) {
  const int64_t users = batch * p.interests;
  gradients.add({rows.hidden_grad.get(), rows.hidden_grad.width, rows.interests.get(),
                 rows.interests.width, users, p.hidden, p.d_interest, views.w1});
  gradients.add_sum(rows.hidden_grad.get(), rows.hidden_grad.width, users, p.hidden, views.b1);
  View b2 = views.b2;  // as [D_s, D_t]
  b2.dims = 2;
  b2.stride[1] = views.b2.stride[0];
  b2.stride[0] = views.b2.stride[0] * p.d_target;
  gradients.add({rows.source.get(), rows.source.width, rows.out_grad_sum.get(),
                 rows.out_grad_sum.width, batch, p.d_source, p.d_target, b2});
}

template <class T>
BridgeW2Gradient<T>::BridgeW2Gradient(const BridgePlan<T>& p, const BridgeRows<T>& rows,
                                      int64_t batch, const View& grad_w2, int64_t threads)
    : plan_(p), rows_(rows), batch_(batch), out_(grad_w2) {
  width_ = (p.d_target + 2 * threads - 1) / (2 * threads);
  if (width_ > kWidth) width_ = kWidth;
  units_ = grad_w2 ? (p.d_target + width_ - 1) / width_ : 0;
}

// grad_w2[i, j, h] = sum_b source[b, i] M[b, j, h] with M[b, j, h] = sum_k out_grad[b, k, j]
// hidden[b, k, h].
template <class T>
void BridgeW2Gradient<T>::run(int64_t unit, Scratch<T> scratch) const {
  const BridgePlan<T>& p = plan_;
  const int64_t j0 = unit * width_;
  const int64_t width = p.d_target - j0 < width_ ? p.d_target - j0 : width_;
  const int64_t k = p.interests, vectors = rows_.hidden.width / kLanes<T>;
  const int64_t row = width * vectors;  // vectors of one M, and of one row of the sum
  Vec<T>* m = scratch.take(kChunk * row);
  Vec<T>* sum = scratch.take(p.d_source * row);
  const int64_t source_width = padded<T>(p.d_source);
  auto* source_pairs = reinterpret_cast<int32_t*>(
      scratch.take(p.pairs ? pairs_of(kChunk) * source_width / kLanes<T> : 0));
  for (int64_t i = 0; i < p.d_source * row; ++i) sum[i] = Vec<T>{};
  for (int64_t b0 = 0; b0 < batch_; b0 += kChunk) {
    const int64_t users = batch_ - b0 < kChunk ? batch_ - b0 : kChunk;
    for (int64_t b = 0; b < users; ++b) {
      const int64_t first = (b0 + b) * k;
      const Vec<T>* hidden =
          reinterpret_cast<const Vec<T>*>(rows_.hidden.get() + first * rows_.hidden.width);
      const T* grad = rows_.out_grad.get() + first * rows_.out_grad.width + j0;
      multiply<T>({m + b * row, 1, vectors}, {hidden, 1, vectors},
                  SharedMatrix<T>(grad, rows_.out_grad.width, 1), vectors, width, k, false);
    }
    const T* source = rows_.source.get() + b0 * rows_.source.width;
    if constexpr (kPairs<T>) {
      if (p.pairs) {
        for (int64_t b = 0; b < users; b += 2) {
          const bool two = b + 1 < users;
          const T* first = source + b * rows_.source.width;
          int32_t* to = source_pairs + b / 2 * source_width;
          for (int64_t i = 0; i < p.d_source; ++i) {
            to[i] = pair_of(first[i], two ? first[rows_.source.width + i] : 0.0f);
          }
          // In place: the pairs of two users take the first half of what is behind them.
          pack_pairs(reinterpret_cast<PairVec*>(m) + b / 2 * row, m + b * row,
                     two ? m + (b + 1) * row : nullptr, row);
        }
        multiply_pairs({sum, 1, row}, {reinterpret_cast<const PairVec*>(m), 1, row},
                       SharedMatrix<int32_t>(source_pairs, source_width, 1), row, p.d_source,
                       pairs_of(users), true);
        continue;
      }
    }
    multiply<T>({sum, 1, row}, {m, 1, row}, SharedMatrix<T>(source, rows_.source.width, 1), row,
                p.d_source, users, true);
  }
  for (int64_t i = 0; i < p.d_source; ++i) {
    store_sums<T>(sum + i * row, width, p.hidden, out_, i * p.d_target + j0, 0);
  }
}

namespace {

// Loads lanes of `view` for a group. With one source per interest a "user" is the pair (b, k).
template <class T>
class Pairs {
 public:
  Pairs(const BridgeArgs& args)
      : interests_(args.interests.size[1]), own_source_(args.source.dims == 3) {}

  bool own_source() const { return own_source_; }
  int64_t batch(int64_t b) const { return own_source_ ? b * interests_ : b; }
  int64_t interests() const { return own_source_ ? 1 : interests_; }

  void load(Vec<T>* lanes, const View& view, Group group) const {
    if (!own_source_) {
      if (view.dims == 2) return load_rows<T>(lanes, view, group);
      return load_matrix<T>(lanes, view, group);
    }
    with_storage(view.dtype, [&](auto storage) {
      using S = decltype(storage);
      const S* rows[kLanes<T>];
      each_row<const S>(rows, view, group);
      load_lanes_from<T, S>(lanes, rows, group.users, view.size[2], view.stride[2]);
    });
  }

  void store(const Vec<T>* lanes, const View& view, Group group) const {
    if (!own_source_) {
      if (view.dims == 2) return store_rows<T>(lanes, view, group);
      return store_matrix<T>(lanes, view, group);
    }
    with_storage(view.dtype, [&](auto storage) {
      using S = decltype(storage);
      S* rows[kLanes<T>];
      each_row<S>(rows, view, group);
      store_lanes_to<T, S>(lanes, rows, group.users, view.size[2], view.stride[2]);
    });
  }

 private:
  template <class P>
  void each_row(P** rows, const View& view, Group group) const {
    for (int w = 0; w < group.users; ++w) {
      const int64_t pair = group.first + w;
      rows[w] = reinterpret_cast<P*>(at(view, pair / interests_, pair % interests_));
    }
  }

  int64_t interests_;
  bool own_source_;
};

template <class T>
void forward(const BridgeArgs& args) {
  const Pairs<T> pairs(args);
  const int64_t batch = pairs.batch(args.interests.size[0]), k = pairs.interests();
  const BridgePlan<T> p(args.w1, args.b1, args.w2, args.b2, k,
                        args.source.size[args.source.dims - 1], args.execution.parallel);
  const Blocks<T> blocks(batch, args.execution.parallel.threads);
  const int64_t g_most = blocks.per_block;
  args.execution.parallel(
      blocks.count, p.work() * kLanes<T> * g_most, [&](int64_t begin, int64_t end) {
        const int64_t own = g_most * (k * p.d_interest + p.d_source + k * p.d_target);
        Scratch<T> scratch(own + BridgeState<T>::vectors(p, g_most, false));
        Vec<T>* interests = scratch.take(g_most * k * p.d_interest);
        Vec<T>* source = scratch.take(g_most * p.d_source);
        Vec<T>* out = scratch.take(g_most * k * p.d_target);
        BridgeState<T> state(p, g_most, false, scratch);
        for (int64_t block = begin; block < end; ++block) {
          const int64_t groups = blocks.size(block);
          for (int64_t g = 0; g < groups; ++g) {
            pairs.load(interests + g * k * p.d_interest, args.interests, blocks.group(block, g));
            pairs.load(source + g * p.d_source, args.source, blocks.group(block, g));
          }
          bridge_forward<T>(p, state, out, interests, source, groups);
          for (int64_t g = 0; g < groups; ++g) {
            pairs.store(out + g * k * p.d_target, args.out, blocks.group(block, g));
          }
        }
      });
}

template <class T>
void backward(const BridgeArgs& args) {
  const Pairs<T> pairs(args);
  const int64_t batch = pairs.batch(args.interests.size[0]), k = pairs.interests();
  BridgePlan<T> p(args.w1, args.b1, args.w2, args.b2, k, args.source.size[args.source.dims - 1],
                  args.execution.parallel);
  if (args.grad_source) p.pack_transposed(args.execution.parallel);
  BridgeRows<T> rows(p, batch);
  const Blocks<T> blocks(batch, args.execution.parallel.threads);
  const int64_t g_most = blocks.per_block;
  args.execution.parallel(
      blocks.count, p.work() * kLanes<T> * g_most, [&](int64_t begin, int64_t end) {
        const int64_t own = g_most * (2 * k * p.d_interest + 2 * p.d_source + k * p.d_target);
        Scratch<T> scratch(own + BridgeState<T>::vectors(p, g_most, false));
        Vec<T>* interests = scratch.take(g_most * k * p.d_interest);
        Vec<T>* interests_grad = scratch.take(g_most * k * p.d_interest);
        Vec<T>* source = scratch.take(g_most * p.d_source);
        Vec<T>* source_grad = scratch.take(g_most * p.d_source);
        Vec<T>* grad = scratch.take(g_most * k * p.d_target);
        BridgeState<T> state(p, g_most, false, scratch);
        const BridgeRows<T>* const rows_of_groups[Blocks<T>::kMost] = {&rows, &rows, &rows, &rows};
        Group places[Blocks<T>::kMost];
        for (int64_t block = begin; block < end; ++block) {
          const int64_t groups = blocks.size(block);
          for (int64_t g = 0; g < groups; ++g) {
            pairs.load(interests + g * k * p.d_interest, args.interests, blocks.group(block, g));
            pairs.load(source + g * p.d_source, args.source, blocks.group(block, g));
            pairs.load(grad + g * k * p.d_target, args.grad, blocks.group(block, g));
            places[g] = blocks.group(block, g);
          }
          bridge_hidden<T>(p, state, interests, groups);
          bridge_hidden_backward<T>(p, state, grad, source, groups);
          bridge_backward<T>(p, state, args.grad_interests ? interests_grad : nullptr,
                             args.grad_source ? source_grad : nullptr, grad, interests, source,
                             groups, rows_of_groups, places);
          for (int64_t g = 0; g < groups; ++g) {
            const Group group = blocks.group(block, g);
            if (args.grad_interests) {
              pairs.store(interests_grad + g * k * p.d_interest, args.grad_interests, group);
            }
            if (args.grad_source) {
              pairs.store(source_grad + g * p.d_source, args.grad_source, group);
            }
          }
        }
      });
  WeightGradients<T> gradients;
  add_bridge_gradients(p, rows, batch, {args.grad_w1, args.grad_b1, args.grad_w2, args.grad_b2},
                       gradients);
  const BridgeW2Gradient<T> w2(p, rows, batch, args.grad_w2, args.execution.parallel.threads);
  run_gradients(gradients, w2, p.work() * batch, args.execution.parallel);
}

}  // namespace

void interest_bridge(const BridgeArgs& args) {
  args.interests.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void interest_bridge_backward(const BridgeArgs& args) {
  args.interests.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

#define MIMNET_FAST_INSTANTIATE(T)                                                               \
  template class BridgePlan<T>;                                                                  \
  template class BridgeW2Gradient<T>;                                                            \
  template void bridge_hidden<T>(const BridgePlan<T>&, BridgeState<T>&, const Vec<T>*, int64_t); \
  template void bridge_forward<T>(const BridgePlan<T>&, BridgeState<T>&, Vec<T>*, const Vec<T>*, \
                                  const Vec<T>*, int64_t);                                       \
  template void bridge_hidden_backward<T>(const BridgePlan<T>&, BridgeState<T>&, const Vec<T>*,  \
                                          const Vec<T>*, int64_t);                               \
  template void bridge_backward<T>(const BridgePlan<T>&, BridgeState<T>&, Vec<T>*, Vec<T>*,      \
                                   const Vec<T>*, const Vec<T>*, const Vec<T>*, int64_t,         \
                                   const BridgeRows<T>* const*, const Group*);                   \
  template void add_bridge_gradients<T>(const BridgePlan<T>&, const BridgeRows<T>&, int64_t,     \
                                        const BridgeGradientViews&, WeightGradients<T>&);
MIMNET_FAST_INSTANTIATE(float)
MIMNET_FAST_INSTANTIATE(double)

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
