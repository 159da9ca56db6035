// The per-interest bridge for the users of a block, without a matrix per interest, in float32.
//
// With T[t, h] = sum over s of source[s] w2[(s, t), h], one contraction per user, an interest costs
// only out[k, t] = sum over h of hidden[k, h] T[t, h]. The bias b2 is the weight of one further
// hidden unit, h = H, that is always 1. T is made in panels of a few t.
#pragma once

#include "block.cuh"
#include "weight_gradients.cuh"

namespace mimnet_fast::cuda {

struct BridgeWeights {
  View w1, b1, w2, b2;
};

// D: width of interests, source and output, or 0 for three widths known when the kernel runs.
// U: users of a block. `users` of the stages are those of them that exist; between stages that
// share a tile the block has to meet.
template <int D, int U>
class BridgeBlock {
  const BridgeWeights& weights_;
  Width<D> d_interest_, d_source_, d_target_;
  int interests_, hidden_, panel_;
  int w1_rows_;     // of w1 in shared memory at a time, for the hidden units
  int w1_columns_;  // likewise, for the gradient of the interests
  Tile contracted_, w1_;

 public:
  float* source;  // [D_s, U]
  Tile hidden;    // [(U, K), H + 1]
  // Backward
  Tile grad;           // of the output's columns in a panel, [(U, K), panel]
  Tile hidden_grad;    // [(U, K), H]
  float* source_grad;  // [D_s, U]

  MIMNET_FAST_INLINE BridgeBlock(Arena& arena, const BridgeWeights& weights, int interests,
                                 int64_t d_source, bool backward)
      : weights_(weights),
        d_interest_(weights.w1.size[1]),
        d_source_(d_source),
        d_target_(weights.b2.size[0] / d_source),
        interests_(interests),
        hidden_(int(weights.w1.size[0])) {
    constexpr int some_columns = 512, some_w1 = 4096;  // what is worth a stage
    panel_ = within(some_columns / (hidden_ + 1), d_target_);
    w1_rows_ = within(some_w1 / d_interest_, hidden_);
    w1_columns_ = w1_rows_ == hidden_ ? int(d_interest_) : within(some_w1 / hidden_, d_interest_);
    source = arena.floats(int64_t(U) * d_source_);
    hidden = arena.tile(U * interests_, hidden_ + 1);
    contracted_ = arena.tile(U * panel_, hidden_ + 1);
    const int w1_stride = tile_stride(d_interest_ + 1), turned_stride = tile_stride(w1_columns_);
    const int w1_floats = w1_rows_ * w1_stride, turned_floats = hidden_ * turned_stride;
    w1_ = {arena.floats(w1_floats > turned_floats ? w1_floats : turned_floats), w1_stride};
    if (!backward) return;
    grad = arena.tile(U * interests_, panel_);
    hidden_grad = arena.tile(U * interests_, hidden_);
    source_grad = arena.floats(int64_t(U) * d_source_);
  }

  MIMNET_FAST_INLINE int panel_size(int first) const { return within(panel_, d_target_ - first); }

  // hidden = relu(w1 interests + b1), meeting before the first use of `interests`
  MIMNET_FAST_DEVICE void make_hidden(int users, const Tile& interests) const {
    const int rows = users * interests_;
    for (int r = thread_index(); r < rows; r += block_threads()) hidden(r, hidden_) = 1;
    for (int first = 0; first < hidden_; first += w1_rows_) {
      const int units = within(w1_rows_, hidden_ - first);
      if (first > 0) sync_block();
      load_w1(w1_, first, units, 0, d_interest_);
      for (int h = thread_index(); h < units; h += block_threads()) {
        w1_(h, d_interest_) = read(weights_.b1, (first + h) * weights_.b1.stride[0]);
      }
      sync_block();
      multiply<kMicro, kMicro>(
          1, rows, units, d_interest_, [&](int, int r, int i) { return interests(r, i); },
          [&](int, int i, int h) { return w1_(h, i); },
          [&](int, int r, int h, float sum) {
            hidden(r, first + h) = maximum(sum + w1_(h, d_interest_), 0.0f);
          });
    }
  }

  // T of the panel that starts at target dimension `first`
  MIMNET_FAST_DEVICE void contract(int first) const {
    with_storage([&](auto storage) { contract<decltype(storage)>(first); });
  }

  // put(u, k, t, value) for the panel's columns of the output
  template <class Put>
  MIMNET_FAST_DEVICE void make_output(int users, int first, Put put) const {
    multiply<kMicro, kMicro>(
        users, interests_, panel_size(first), hidden_ + 1,
        [&](int u, int k, int h) { return hidden(u * interests_ + k, h); },
        [&](int u, int h, int t) { return contracted_(u * panel_ + t, h); },
        [&](int u, int k, int t, float sum) { put(u, k, first + t, sum); });
  }

  // Adds the panel's share of hidden_grad.
  MIMNET_FAST_DEVICE void add_hidden_grad(int users, int first) const {
    multiply<kMicro, kMicro>(
        users, interests_, hidden_, panel_size(first),
        [&](int u, int k, int t) { return grad(u * interests_ + k, t); },
        [&](int u, int t, int h) { return contracted_(u * panel_ + t, h); },
        [&](int u, int k, int h, float sum) {
          float& total = hidden_grad(u * interests_ + k, h);
          total = first > 0 ? total + sum : sum;
        });
  }

  // Replaces T of the panel by its gradient.
  MIMNET_FAST_DEVICE void make_contracted_grad(int users, int first) const {
    multiply<kMicro, kMicro>(
        users, panel_size(first), hidden_ + 1, interests_,
        [&](int u, int t, int k) { return grad(u * interests_ + k, t); },
        [&](int u, int k, int h) { return hidden(u * interests_ + k, h); },
        [&](int u, int t, int h, float sum) { contracted_(u * panel_ + t, h) = sum; });
  }

  // Adds the panel's share of source_grad, from the gradient of T.
  MIMNET_FAST_DEVICE void add_source_grad(int first) const {
    with_storage([&](auto storage) { add_source_grad<decltype(storage)>(first); });
  }

  // Lets nothing through hidden units that are 0.
  MIMNET_FAST_DEVICE void mask_hidden_grad(int users) const {
    for (int e = thread_index(); e < users * interests_ * hidden_; e += block_threads()) {
      const int r = e / hidden_, h = e % hidden_;
      if (!(hidden(r, h) > 0)) hidden_grad(r, h) = 0;
    }
  }

  // put(r, i, value) for the gradient of the interests, from the masked hidden_grad
  template <class Put>
  MIMNET_FAST_DEVICE void make_interests_grad(int users, Put put) const {
    for (int first = 0; first < d_interest_; first += w1_columns_) {
      const int columns = within(w1_columns_, d_interest_ - first);
      Tile w1 = w1_;
      if (w1_rows_ < hidden_) {
        w1.stride = tile_stride(w1_columns_);
        sync_block();
        load_w1(w1, 0, hidden_, first, columns);
        sync_block();
      }
      multiply<kMicro, kMicro>(
          1, users * interests_, columns, hidden_,
          [&](int, int r, int h) { return hidden_grad(r, h); },
          [&](int, int h, int i) { return w1(h, i); },
          [&](int, int r, int i, float sum) { put(r, first + i, sum); });
    }
  }

 private:
  static constexpr int kMicro = U == 1 ? 1 : U == 4 ? 2 : 4;

  struct alignas(U % 4 == 0 ? 16 : 4) OfUsers {
    float x[U];
  };

  static MIMNET_FAST_INLINE int within(int wanted, int most) {
    return wanted < 1 ? 1 : wanted < most ? wanted : most;
  }

  template <class F>
  MIMNET_FAST_DEVICE void with_storage(F f) const {
    switch (weights_.w2.dtype) {
      case DType::bfloat16:
        return f(BFloat16{});
      case DType::float16:
        return f(Float16{});
      default:
        return f(0.0f);
    }
  }

  MIMNET_FAST_DEVICE void load_w1(const Tile& to, int first_row, int rows, int first_column,
                                  int columns) const {
    const View& w1 = weights_.w1;
    read_matrix(w1, first_row * w1.stride[0] + first_column * w1.stride[1], rows, columns,
                w1.stride[0], w1.stride[1], [&](int h, int i, float value) { to(h, i) = value; });
  }

  // The weights of (t, h) for every s.
  template <class S>
  struct Column {
    const S* data;
    int64_t step;
    MIMNET_FAST_DEVICE float operator[](int s) const { return widen(load(data + s * step)); }
  };
  template <class S>
  MIMNET_FAST_DEVICE Column<S> column(int t, int h) const {
    const View &w2 = weights_.w2, &b2 = weights_.b2;
    if (h == hidden_) {
      return {static_cast<const S*>(b2.data) + t * b2.stride[0], d_target_ * b2.stride[0]};
    }
    return {static_cast<const S*>(w2.data) + t * w2.stride[0] + h * w2.stride[1],
            d_target_ * w2.stride[0]};
  }

  // A thread makes T(t, h) of all users, so that a block reads w2 once.
  template <class S>
  MIMNET_FAST_DEVICE void contract(int first) const {
    const int columns = panel_size(first) * (hidden_ + 1);
    for (int c = thread_index(); c < columns; c += block_threads()) {
      const int t = c / (hidden_ + 1), h = c % (hidden_ + 1);
      const Column<S> w = column<S>(first + t, h);
      OfUsers sum{};
#pragma unroll(D ? D : 8)
      for (int s = 0; s < d_source_; ++s) {
        const float weight = w[s];
        const OfUsers from = reinterpret_cast<const OfUsers*>(source)[s];
#pragma unroll
        for (int u = 0; u < U; ++u) sum.x[u] += weight * from.x[u];
      }
#pragma unroll
      for (int u = 0; u < U; ++u) contracted_(u * panel_ + t, h) = sum.x[u];
    }
  }

  // A warp makes a few s of all users; its lanes share the columns.
  template <class S>
  MIMNET_FAST_DEVICE void add_source_grad(int first) const {
    constexpr int few = kMicro;
    const int lane = thread_index() % kWarp;
    const int columns = panel_size(first) * (hidden_ + 1);
    for (int s0 = thread_index() / kWarp * few; s0 < d_source_;
         s0 += block_threads() / kWarp * few) {
      float sum[few][U] = {};
      for (int c = lane; c < columns; c += kWarp) {
        const int t = c / (hidden_ + 1), h = c % (hidden_ + 1);
        const Column<S> w = column<S>(first + t, h);
        float weight[few];
#pragma unroll
        for (int i = 0; i < few; ++i) weight[i] = w[s0 + i < d_source_ ? s0 + i : s0];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const float value = contracted_(u * panel_ + t, h);
#pragma unroll
          for (int i = 0; i < few; ++i) sum[i][u] += weight[i] * value;
        }
      }
#pragma unroll
      for (int i = 0; i < few; ++i) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const float total = warp_sum(sum[i][u]);
          if (lane != u || s0 + i >= d_source_) continue;
          float& to = source_grad[(s0 + i) * U + u];
          to = first > 0 ? to + total : total;
        }
      }
    }
  }
};

// float32 rows in the order of the users.
struct Rows {
  float* data;
  int64_t stride;
};

// What the gradients of the parameters are made of.
struct BridgeRows {
  Rows source;     // [B, D_s]
  Rows interests;  // [(B, K), D_i]
  Rows hidden;     // [(B, K), H + 1]
  Rows hidden_grad;
  Rows grad;  // [(B, K), D_t], of the output
};

constexpr int kBridgeSums = 4;
// The gradients of the parameters of `gradients`, for `users` with so many interests each.
void bridge_sums(OuterSum (&sums)[kBridgeSums], const BridgeRows& rows,
                 const BridgeWeights& gradients, const BridgeWeights& weights, int64_t users,
                 int interests, int64_t d_source);

// A call of the op. Views of users and interests are [B, K, columns], or [B, 1, columns] for one
// row per user; rows are numbered through both dimensions.
struct BridgeLaunch {
  View interests, source, out, grad, grad_interests, grad_source;
  BridgeWeights weights;
  BridgeRows rows;  // null: not to be written
  int64_t users;
  int per_user;  // interests
};

MIMNET_FAST_INLINE int64_t row_offset(const View& v, int64_t row) {
  return row / v.size[1] * v.stride[0] + row % v.size[1] * v.stride[1];
}
// Whether rows are a fixed number of elements apart, and that number.
MIMNET_FAST_INLINE bool evenly_spaced(const View& v) {
  return v.size[1] == 1 || v.size[0] == 1 || v.stride[0] == v.size[1] * v.stride[1];
}
MIMNET_FAST_INLINE int64_t spacing(const View& v) { return v.stride[v.size[1] == 1 ? 0 : 1]; }

MIMNET_FAST_DEVICE void save(const Rows& rows, int64_t row, int column, float value) {
  if (rows.data) store(rows.data + row * rows.stride + column, value);
}

// The same on tensor cores, for one width of interests, source and output.
bool tensor_cores_serve(const BridgeLaunch& args);
void tensor_bridge(const BridgeLaunch& args, const Stream& stream);
// `rows` are complete, those of args only what is to be written. Leaves the gradient of w2 and the
// rows.
void tensor_bridge_backward(const BridgeLaunch& args, const BridgeRows& rows, const View& grad_w2,
                            const Stream& stream);

}  // namespace mimnet_fast::cuda
