// Dynamic routing of a tile of users by a block, in float32.
//
// Agreement is linear, so the logits of every pass are the first logits plus back . x, where `back`
// sums the capsules of the passes before, seen from the input space. It is all that a pass hands to
// the next: logits are never stored, and each pass goes over the inputs once, in tiles of positions
// that stay in shared memory where one holds them all. A softmax over the inputs runs along, with
// the pooled sums rescaled whenever its maximum moves.
#pragma once

#include <limits>

#include "block.cuh"
#include "squash.cuh"

namespace mimnet_fast::cuda {

constexpr float kLowest = -3e38f;
constexpr float kRemoved = -std::numeric_limits<float>::infinity();  // logit of what is not there

struct RoutingPlan {
  int length, capsules, d_in, d;
  int votes;     // inputs per user and position: 1, or one for each capsule
  int matrices;  // of the weight: none, 1 or one for each capsule
  int iterations;
  SoftmaxAxis axis;
  Padding padding;
  bool inner_squash;
  float inverse_temperature;
  Squash squash;
  View weight, logits, mask, capsule_mask;
  int users, positions;  // of a tile
};

// The weight in shared memory, matrix and D_in x D; null where it is too large to stay there.
MIMNET_FAST_INLINE Tile routing_weight_tile(const RoutingPlan& p, Arena& arena) {
  constexpr int64_t most_floats = 5 * 1024;
  const int64_t rows = int64_t(p.matrices) * p.d_in;
  if (rows == 0 || rows * tile_stride(p.d) > most_floats) return {nullptr, 0};
  return arena.tile(int(rows), p.d);
}

// A row of a tile is a user and a capsule, if nothing else is said.
struct RoutingState {
  Tile inputs;     // user, vote and position x D_in
  Tile logits;     // x position: the first ones
  Tile coupling;   // x position
  Tile pooled;     // x D_in
  Tile capsules;   // x D, not squashed; pooled itself without a weight
  Tile back;       // x D_in
  Tile weight;     // see routing_weight_tile
  float* keep;     // user and position: 1 at real items, else 0
  float* present;  // 1 at real capsules, else 0
  float* factor;   // of a row
  float* top;      // of a row: maximum and sum of a softmax over the inputs
  float* sum;

  MIMNET_FAST_INLINE RoutingState(const RoutingPlan& p, Arena& arena) {
    const int rows = p.users * p.capsules;
    inputs = arena.tile(p.users * p.votes * p.positions, p.d_in);
    logits = arena.tile(rows, p.positions);
    coupling = arena.tile(rows, p.positions);
    pooled = arena.tile(rows, p.d_in);
    capsules = p.matrices > 0 ? arena.tile(rows, p.d) : pooled;
    back = arena.tile(rows, p.d_in);
    weight = routing_weight_tile(p, arena);
    keep = arena.floats(p.users * p.positions);
    present = arena.floats(rows);
    factor = arena.floats(rows);
    top = arena.floats(rows);
    sum = arena.floats(rows);
  }
};

// Outputs of a thread along each side of a small product.
template <int D>
constexpr int kMicroTile = D >= 32  ? 4
                           : D == 0 ? 2
                                    : 1;

MIMNET_FAST_DEVICE void load_routing_weight(const RoutingPlan& p, const Tile& weight) {
  if (weight.data == nullptr) return;
  const View& w = p.weight;
  for (int n = 0; n < p.matrices; ++n) {
    read_matrix(w, w.dims == 3 ? n * w.stride[0] : 0, p.d_in, p.d, w.stride[w.dims - 2],
                w.stride[w.dims - 1],
                [&](int i, int j, float value) { weight(n * p.d_in + i, j) = value; });
  }
}

MIMNET_FAST_DEVICE float routing_weight(const RoutingPlan& p, const Tile& weight, int n, int i,
                                        int j) {
  if (weight.data != nullptr) return weight(n * p.d_in + i, j);
  const View& w = p.weight;
  return read(
      w, (w.dims == 3 ? n * w.stride[0] : 0) + i * w.stride[w.dims - 2] + j * w.stride[w.dims - 1]);
}

// What goes with positions `start` to `start + count` of users `first` to `first + users`.
MIMNET_FAST_DEVICE void load_routing_options(const RoutingPlan& p, const RoutingState& s,
                                             int64_t first, int users, int start, int count) {
  const int rows = users * p.capsules;
  const View& logits = p.logits;
  for (int t = thread_index(); t < rows * count; t += block_threads()) {
    const int row = t / count, l = t % count, u = row / p.capsules, k = row % p.capsules;
    const int64_t user = logits.size[0] == 1 ? 0 : first + u;
    s.logits(row, l) = logits ? read(logits, user * logits.stride[0] + k * logits.stride[1] +
                                                 (start + l) * logits.stride[2])
                              : 0.0f;
  }
  const View& mask = p.mask;
  for (int t = thread_index(); t < users * count; t += block_threads()) {
    const int u = t / count, l = t % count;
    const int64_t item = (first + u) * mask.stride[0];
    const bool real = !mask || (mask.dtype == DType::boolean
                                    ? read_flag(mask, item + (start + l) * mask.stride[1])
                                    : start + l < read_integer(mask, item));
    s.keep[u * p.positions + l] = real ? 1.0f : 0.0f;
  }
  const View& present = p.capsule_mask;
  for (int row = thread_index(); row < rows; row += block_threads()) {
    const int u = row / p.capsules, k = row % p.capsules;
    const bool real =
        !present || read_flag(present, (first + u) * present.stride[0] + k * present.stride[1]);
    s.present[row] = real ? 1.0f : 0.0f;
  }
}

MIMNET_FAST_INLINE bool removes_padding(const RoutingPlan& p) {
  return p.axis == SoftmaxAxis::inputs && p.padding == Padding::ignore;
}

// Softmax over the capsules of each position, in place.
MIMNET_FAST_DEVICE void couple_capsules(const RoutingPlan& p, const RoutingState& s, int users,
                                        int count) {
  const int k = p.capsules;
  for (int t = thread_index(); t < users * count; t += block_threads()) {
    const int u = t / count, l = t % count;
    float top = kLowest, sum = 0;
    for (int row = u * k; row < (u + 1) * k; ++row) {
      if (s.present[row] > 0) top = maximum(top, s.coupling(row, l));
    }
    for (int row = u * k; row < (u + 1) * k; ++row) {
      const float e = s.present[row] > 0 ? exponential(s.coupling(row, l) - top) : 0.0f;
      s.coupling(row, l) = e;
      sum += e;
    }
    const float kept = p.padding == Padding::fill_before ? 1.0f : s.keep[u * p.positions + l];
    const float scale = sum > 0 ? kept / sum : 0.0f;
    for (int row = u * k; row < (u + 1) * k; ++row) s.coupling(row, l) *= scale;
  }
}

// Goes on with a softmax over the inputs: the tile becomes exponentials under the maximum so far,
// and `factor` what earlier sums have to be multiplied with.
MIMNET_FAST_DEVICE void couple_inputs(const RoutingPlan& p, const RoutingState& s, int rows,
                                      bool is_first, int count) {
  const int lane = thread_index() % kWarp;
  for (int row = thread_index() / kWarp; row < rows; row += block_threads() / kWarp) {
    const float before = is_first ? kLowest : s.top[row];
    float top = before, sum = 0;
    for (int l = lane; l < count; l += kWarp) top = maximum(top, s.coupling(row, l));
    top = warp_max(top);
    for (int l = lane; l < count; l += kWarp) {
      const float e = exponential(s.coupling(row, l) - top);
      sum += e;
      const float kept = s.keep[row / p.capsules * p.positions + l];
      s.coupling(row, l) = p.padding == Padding::zero_after ? e * kept : e;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      s.factor[row] = exponential(before - top);
      s.sum[row] = is_first ? sum : s.sum[row] * s.factor[row] + sum;
      s.top[row] = top;
    }
    sync_warp();
  }
}

// put(row, lane, |x|^2, x . y) of each row of two tiles, which may be one, by the `kRowLanes` lanes
// that share the row.
constexpr int kRowLanes = 8;
template <class Put>
MIMNET_FAST_DEVICE void reduce_rows(int rows, int width, const Tile& x, const Tile& y, Put put) {
  const int lane = thread_index() % kRowLanes, step = block_threads() / kRowLanes;
  for (int first = 0; first < rows; first += step) {
    const int row = first + thread_index() / kRowLanes;
    float norm2 = 0, dot = 0;
    for (int d = lane; row < rows && d < width; d += kRowLanes) {
      norm2 += x(row, d) * x(row, d);
      dot += x(row, d) * y(row, d);
    }
    for (int mask = kRowLanes / 2; mask > 0; mask /= 2) {
      norm2 += shuffle_xor(norm2, mask);
      dot += shuffle_xor(dot, mask);
    }
    if (row < rows) put(row, lane, norm2, dot);
  }
}

// factor of a row = what squashes it, or 1.
MIMNET_FAST_DEVICE void squash_factors(const RoutingPlan& p, int rows, const Tile& capsules,
                                       bool wanted, float* factor) {
  reduce_rows(rows, p.d, capsules, capsules, [&](int row, int lane, float norm2, float) {
    if (lane == 0) factor[row] = wanted ? squash_factor(norm2, p.squash).factor : 1.0f;
  });
}

// The gradient of squashed capsules becomes that of the capsules.
MIMNET_FAST_DEVICE void squash_backward(const RoutingPlan& p, int rows, const Tile& capsules,
                                        const Tile& grad) {
  reduce_rows(rows, p.d, capsules, grad, [&](int row, int lane, float norm2, float dot) {
    const SquashFactor<float> f = squash_factor(norm2, p.squash);
    const float along = norm2 > 0 ? 2 * f.radial * (dot / norm2) : 0.0f;
    for (int d = lane; d < p.d; d += kRowLanes) {
      grad(row, d) = f.factor * grad(row, d) + along * capsules(row, d);
    }
  });
}

// put(row, j, sum over i of x[row, i] weight[i, j]) for a weight there is.
template <int D, class Put>
MIMNET_FAST_DEVICE void times_weight(const RoutingPlan& p, const Tile& weight, int rows,
                                     const Tile& x, Put put) {
  constexpr int T = kMicroTile<D>;
  multiply<T, T>(
      p.matrices, rows / p.matrices, Width<D>(p.d), Width<D>(p.d_in),
      [&](int n, int r, int i) { return x(r * p.matrices + n, i); },
      [&](int n, int i, int j) { return routing_weight(p, weight, n, i, j); },
      [&](int n, int r, int j, float sum) { put(r * p.matrices + n, j, sum); });
}

// put(row, i, sum over j of x[row, j] weight[i, j]), which is x itself without a weight.
template <int D, class Put>
MIMNET_FAST_DEVICE void times_weight_transposed(const RoutingPlan& p, const Tile& weight, int rows,
                                                const Tile& x, Put put) {
  constexpr int T = kMicroTile<D>;
  const Width<D> d_in(p.d_in);
  if (p.matrices == 0) {
    for (int t = thread_index(); t < rows * d_in; t += block_threads()) {
      put(t / d_in, t % d_in, x(t / d_in, t % d_in));
    }
  } else {
    multiply<T, T>(
        p.matrices, rows / p.matrices, d_in, Width<D>(p.d),
        [&](int n, int r, int j) { return x(r * p.matrices + n, j); },
        [&](int n, int j, int i) { return routing_weight(p, weight, n, i, j); },
        [&](int n, int r, int i, float sum) { put(r * p.matrices + n, i, sum); });
  }
}

// put(set, l, d, gradient of the input) for `count` positions, a set being a user, or a user and a
// capsule where each has its own inputs.
template <int D, class Put>
MIMNET_FAST_DEVICE void input_gradient(const RoutingPlan& p, int users, int count,
                                       const Tile& coupling, const Tile& grad_pooled, Put put) {
  constexpr int T = kMicroTile<D>;
  const int per_set = p.capsules / p.votes;
  multiply<T, T>(
      users * p.votes, count, Width<D>(p.d_in), per_set,
      [&](int n, int l, int k) { return coupling(n * per_set + k, l); },
      [&](int n, int k, int d) { return grad_pooled(n * per_set + k, d); }, put);
}

// All passes. `load(start, count)` puts the inputs of positions into shared memory. In the last
// pass `last(start, count)` finds their couplings there or, with a softmax over the inputs, the
// logits of which they will be the softmax. Leaves pooled, capsules, top and sum to all threads.
template <int D, class Load, class Last>
MIMNET_FAST_DEVICE void route(const RoutingPlan& p, const RoutingState& s, int64_t first, int users,
                              Load load, Last last) {
  constexpr int T = kMicroTile<D>;
  const Width<D> d_in(p.d_in);
  const int rows = users * p.capsules, sets = users * p.votes, per_set = p.capsules / p.votes;
  const bool over_inputs = p.axis == SoftmaxAxis::inputs;
  for (int step = 1;; ++step) {
    const bool is_last = step == p.iterations;
    for (int start = 0; start < p.length; start += p.positions) {
      const int count = p.length - start < p.positions ? p.length - start : p.positions;
      if (step == 1 || p.positions < p.length) {
        sync_block();  // until nobody reads the tile before
        load(start, count);
        load_routing_options(p, s, first, users, start, count);
      }
      sync_block();
      const auto score = [&](int n, int i, int l, float agreement) {
        const int row = n * per_set + i;
        const bool real = s.keep[n / p.votes * p.positions + l] > 0;
        float logit = (s.logits(row, l) + agreement) * p.inverse_temperature;
        if (!real && p.padding == Padding::fill_before) logit = float(kPaddingLogit);
        if (!real && removes_padding(p)) logit = kRemoved;
        s.coupling(row, l) = logit;
      };
      if (step == 1) {
        for (int t = thread_index(); t < rows * count; t += block_threads()) {
          const int row = t / count;
          score(row / per_set, row % per_set, t % count, 0);
        }
      } else {
        multiply<T, T>(
            sets, per_set, count, d_in,
            [&](int n, int i, int d) { return s.back(n * per_set + i, d); },
            [&](int n, int d, int l) { return s.inputs(n * p.positions + l, d); }, score);
      }
      sync_block();
      if (over_inputs) {
        if (is_last) {
          last(start, count);
          sync_block();
        }
        couple_inputs(p, s, rows, start == 0, count);
      } else {
        couple_capsules(p, s, users, count);
      }
      sync_block();
      if (is_last && !over_inputs) last(start, count);
      multiply<T, T>(
          sets, per_set, d_in, count,
          [&](int n, int i, int l) { return s.coupling(n * per_set + i, l); },
          [&](int n, int l, int d) { return s.inputs(n * p.positions + l, d); },
          [&](int n, int i, int d, float sum) {
            const int row = n * per_set + i;
            float& pooled = s.pooled(row, d);
            pooled = start == 0 ? sum : (over_inputs ? pooled * s.factor[row] : pooled) + sum;
          });
    }
    sync_block();
    if (over_inputs) {
      for (int t = thread_index(); t < rows * d_in; t += block_threads()) {
        const int row = t / d_in;
        s.pooled(row, t % d_in) *= s.sum[row] > 0 ? s.present[row] / s.sum[row] : 0.0f;
      }
      sync_block();
    }
    if (p.matrices > 0) {
      times_weight<D>(p, s.weight, rows, s.pooled,
                      [&](int row, int j, float sum) { s.capsules(row, j) = sum; });
      sync_block();
    }
    if (is_last) return;
    squash_factors(p, rows, s.capsules, p.inner_squash, s.factor);
    sync_block();
    times_weight_transposed<D>(p, s.weight, rows, s.capsules, [&](int row, int i, float sum) {
      const float update = s.factor[row] * sum;
      s.back(row, i) = step == 1 ? update : s.back(row, i) + update;
    });
  }
}

}  // namespace mimnet_fast::cuda
