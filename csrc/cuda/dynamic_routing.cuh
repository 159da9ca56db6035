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
#include "tensor.cuh"

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

// What goes with the inputs of a tile. A row is a user and a capsule here and below.
struct RoutingOptions {
  Tile logits;     // row x position: the first ones
  float* keep;     // user and position: 1 at real items, else 0
  float* present;  // row: 1 at real capsules, else 0

  MIMNET_FAST_INLINE RoutingOptions(const RoutingPlan& p, int users, Arena& arena)
      : logits(arena.tile(users * p.capsules, p.positions)),
        keep(arena.floats(users * p.positions)),
        present(arena.floats(users * p.capsules)) {}
};

struct RoutingState {
  Tile inputs;  // user, vote and position x D_in
  RoutingOptions options;
  Tile coupling;  // row x position
  Tile pooled;    // row x D_in
  Tile capsules;  // row x D, not squashed; pooled itself without a weight
  Tile back;      // row x D_in
  Tile weight;    // see routing_weight_tile
  float* factor;  // row
  float* top;     // row: maximum and sum of a softmax over the inputs
  float* sum;

  MIMNET_FAST_INLINE RoutingState(const RoutingPlan& p, Arena& arena) : options(p, p.users, arena) {
    const int rows = p.users * p.capsules;
    inputs = arena.tile(p.users * p.votes * p.positions, p.d_in);
    coupling = arena.tile(rows, p.positions);
    pooled = arena.tile(rows, p.d_in);
    capsules = p.matrices > 0 ? arena.tile(rows, p.d) : pooled;
    back = arena.tile(rows, p.d_in);
    weight = routing_weight_tile(p, arena);
    factor = arena.floats(rows);
    top = arena.floats(rows);
    sum = arena.floats(rows);
  }
};

// Outputs of a thread along each side of a small product.
template <int D>
constexpr int kMicroTile = D == 0   ? 2
                           : D < 32 ? 1
                                    : 4;

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

// For positions `start` to `start + count` of users `first` to `first + users`, by `threads`
// threads of which the caller is number `thread`.
MIMNET_FAST_DEVICE void load_routing_options(const RoutingPlan& p, const RoutingOptions& options,
                                             int64_t first, int users, int start, int count,
                                             int thread, int threads) {
  const int rows = users * p.capsules;
  const View& logits = p.logits;
  for (int t = thread; t < rows * count; t += threads) {
    const int row = t / count, l = t % count, u = row / p.capsules, k = row % p.capsules;
    const int64_t user = logits.size[0] == 1 ? 0 : first + u;
    options.logits(row, l) = logits ? read(logits, user * logits.stride[0] + k * logits.stride[1] +
                                                       (start + l) * logits.stride[2])
                                    : 0.0f;
  }
  const View& mask = p.mask;
  for (int t = thread; t < users * count; t += threads) {
    const int u = t / count, l = t % count;
    const int64_t item = (first + u) * mask.stride[0];
    const bool real = !mask || (mask.dtype == DType::boolean
                                    ? read_flag(mask, item + (start + l) * mask.stride[1])
                                    : start + l < read_integer(mask, item));
    options.keep[u * p.positions + l] = real ? 1.0f : 0.0f;
  }
  const View& present = p.capsule_mask;
  for (int row = thread; row < rows; row += threads) {
    const int u = row / p.capsules, k = row % p.capsules;
    const bool real =
        !present || read_flag(present, (first + u) * present.stride[0] + k * present.stride[1]);
    options.present[row] = real ? 1.0f : 0.0f;
  }
}

// A routing logit, ready for the softmax.
MIMNET_FAST_DEVICE float routing_logit(const RoutingPlan& p, float logit, bool real) {
  if (!real && p.padding == Padding::fill_before) return float(kPaddingLogit);
  if (!real && p.padding == Padding::ignore && p.axis == SoftmaxAxis::inputs) return kRemoved;
  return logit * p.inverse_temperature;
}

// What a padded position keeps of its coupling after the softmax.
MIMNET_FAST_DEVICE float kept_coupling(const RoutingPlan& p, float keep) {
  return p.padding == Padding::fill_before ? 1.0f : keep;
}

// Softmax over the capsules of each position, in place.
MIMNET_FAST_DEVICE void couple_capsules(const RoutingPlan& p, const RoutingState& s, int users,
                                        int count) {
  const int k = p.capsules;
  for (int t = thread_index(); t < users * count; t += block_threads()) {
    const int u = t / count, l = t % count;
    float top = kLowest, sum = 0;
    for (int row = u * k; row < (u + 1) * k; ++row) {
      if (s.options.present[row] > 0) top = maximum(top, s.coupling(row, l));
    }
    for (int row = u * k; row < (u + 1) * k; ++row) {
      const float e = s.options.present[row] > 0 ? exponential(s.coupling(row, l) - top) : 0.0f;
      s.coupling(row, l) = e;
      sum += e;
    }
    const float kept = kept_coupling(p, s.options.keep[u * p.positions + l]);
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
      s.coupling(row, l) = e * kept_coupling(p, s.options.keep[row / p.capsules * p.positions + l]);
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

// What a softmax over the inputs turns exponentials into couplings with.
MIMNET_FAST_DEVICE float coupling_scale(float sum, float present) {
  return sum > 0 ? present / sum : 0.0f;
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
        load_routing_options(p, s.options, first, users, start, count, thread_index(),
                             block_threads());
      }
      sync_block();
      const auto score = [&](int n, int i, int l, float agreement) {
        const int row = n * per_set + i;
        const bool real = s.options.keep[n / p.votes * p.positions + l] > 0;
        s.coupling(row, l) = routing_logit(p, s.options.logits(row, l) + agreement, real);
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
        s.pooled(row, t % d_in) *= coupling_scale(s.sum[row], s.options.present[row]);
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

// The same for one user by a warp on tensor cores, where D_in = D = 16 R and K <= 8 N. Capsules are
// the columns of its state (tensor.cuh), of which a lane holds two in each eight: [n][j], j < 2.

// What a warp holds in shared memory for its user.
template <int P, int R, int N>
struct RoutingWarp {
  Planes<P, 16 * R> inputs;
  RoutingOptions options;
  ParkedState<R, N> back, parking;

  MIMNET_FAST_INLINE RoutingWarp(const RoutingPlan& p, Arena& arena)
      : inputs(arena, p.positions, 16 * R), options(p, 1, arena), back(arena), parking(arena) {}
};

template <int R, int N>
struct RoutedUser {
  float pooled[R][N][4];
  float capsules[R][N][4];     // not squashed
  float top[N][2], sum[N][2];  // of a softmax over the inputs
};

MIMNET_FAST_DEVICE bool is_present(const RoutingPlan& p, const RoutingOptions& options, int k) {
  return k < p.capsules && options.present[k] > 0;
}

// Softmax of 16 positions over the capsules; `kept` of the lane's positions.
template <int N>
MIMNET_FAST_DEVICE void couple_capsules(const RoutingPlan& p, const RoutingOptions& options,
                                        const float (&kept)[2], float (&c)[1][N][4]) {
  float top[2] = {kLowest, kLowest}, sum[2] = {};
  for_each_element<1, N>([&](int, int n, int i) {
    if (!is_present(p, options, 8 * n + state_column(i))) c[0][n][i] = kRemoved;
    top[i / 2] = maximum(top[i / 2], c[0][n][i]);
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) top[half] = max_columns(top[half]);
  for_each_element<1, N>([&](int, int n, int i) {
    c[0][n][i] = exponential(c[0][n][i] - top[i / 2]);
    sum[i / 2] += c[0][n][i];
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = sum_columns(sum[half]);
    sum[half] = sum[half] > 0 ? kept[half] / sum[half] : 0.0f;
  }
  for_each_element<1, N>([&](int, int n, int i) { c[0][n][i] *= sum[i / 2]; });
}

// Goes on with the softmax over the inputs by 16 positions; the sums stay those of a lane.
template <int R, int N>
MIMNET_FAST_DEVICE void couple_inputs(const float (&kept)[2], float (&c)[1][N][4],
                                      RoutedUser<R, N>& user) {
  float factor[N][2];
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float before = user.top[n][j];
      user.top[n][j] = maximum(before, max_rows(maximum(c[0][n][j], c[0][n][2 + j])));
      factor[n][j] = exponential(before - user.top[n][j]);
      user.sum[n][j] *= factor[n][j];
    }
  }
  scale_columns(user.pooled, [&](int n, int j) { return factor[n][j]; });
  for_each_element<1, N>([&](int, int n, int i) {
    const float e = exponential(c[0][n][i] - user.top[n][i % 2]);
    user.sum[n][i % 2] += e;
    c[0][n][i] = e * kept[i / 2];
  });
}

// out = x through the weight or its transpose, or x itself without one.
template <bool kTransposed, int P, int R, int N>
MIMNET_FAST_DEVICE void times_weight(const RoutingPlan& p, const Planes<P, 16 * R>& weight,
                                     const ParkedState<R, N>& parking, const float (&x)[R][N][4],
                                     float (&out)[R][N][4]) {
  const bool copied = p.matrices == 0;
  for_each_element<R, N>([&](int m, int n, int i) { out[m][n][i] = copied ? x[m][n][i] : 0.0f; });
  if (copied) return;
  parking.park(x);
  multiply<!kTransposed>(out, weight, 0, 0, parking);
}

// All passes. `load(start, count, padded)` puts the inputs of positions into shared memory and
// zeros after them; `last(position, k, value)` gets what it gets in `route`, from the lane that
// holds it.
template <int P, int R, int N, class Load, class Last>
MIMNET_FAST_DEVICE void route_user(const RoutingPlan& p, const Planes<P, 16 * R>& weight,
                                   const RoutingWarp<P, R, N>& s, int64_t number,
                                   RoutedUser<R, N>& user, Load load, Last last) {
  constexpr int Q = kStatePlanes<P>;
  const bool over_inputs = p.axis == SoftmaxAxis::inputs;
  uint32_t operand[R][N][Q][2];
  for (int step = 1;; ++step) {
    const bool is_last = step == p.iterations;
    for_each_element<R, N>([&](int m, int n, int i) { user.pooled[m][n][i] = 0; });
#pragma unroll
    for (int n = 0; n < N; ++n) {
      user.top[n][0] = user.top[n][1] = kLowest;
      user.sum[n][0] = user.sum[n][1] = 0;
    }
    for (int start = 0; start < p.length; start += p.positions) {
      const int count = p.length - start < p.positions ? p.length - start : p.positions;
      if (step == 1 || p.positions < p.length) {
        sync_warp();  // until nobody reads the tile before
        load(start, count, (count + 15) / 16 * 16);
        load_routing_options(p, s.options, number, 1, start, count, thread_index() % kWarp, kWarp);
        sync_warp();
      }
#pragma unroll 1
      for (int row = 0; row < count; row += 16) {
        float c[1][N][4] = {};
        if (step > 1) multiply<false>(c, s.inputs, row, 0, operand);
        float keep[2], kept[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int l = row + state_row(2 * half);
          keep[half] = l < count ? s.options.keep[l] : 0.0f;
          kept[half] = l < count ? kept_coupling(p, keep[half]) : 0.0f;
        }
        const auto put = [&](int n, int i, float value) {
          const int l = row + state_row(i), k = 8 * n + state_column(i);
          if (is_last && l < count && k < p.capsules) last(start + l, k, value);
        };
        for_each_element<1, N>([&](int, int n, int i) {
          const int l = row + state_row(i), k = 8 * n + state_column(i);
          const float first = l < count && k < p.capsules ? s.options.logits(k, l) : 0.0f;
          float& x = c[0][n][i];
          x = l < count ? routing_logit(p, first + x, keep[i / 2] > 0) : kRemoved;
          if (over_inputs) put(n, i, kept[i / 2] > 0 ? x : kRemoved);
        });
        if (over_inputs) {
          couple_inputs(kept, c, user);
        } else {
          couple_capsules(p, s.options, kept, c);
          for_each_element<1, N>([&](int, int n, int i) { put(n, i, c[0][n][i]); });
        }
        uint32_t coupling[1][N][Q][2];
        as_operand(c, coupling);
        multiply<true>(user.pooled, s.inputs, row, 0, coupling);
      }
    }
    if (over_inputs) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) user.sum[n][j] = sum_rows(user.sum[n][j]);
      }
      scale_columns(user.pooled, [&](int n, int j) {
        const bool present = is_present(p, s.options, 8 * n + state_column(j));
        return coupling_scale(user.sum[n][j], present ? 1.0f : 0.0f);
      });
    }
    times_weight<false>(p, weight, s.parking, user.pooled, user.capsules);
    if (is_last) return;
    if (p.inner_squash) {
      float norm2[N][2];
      dot_columns(user.capsules, user.capsules, norm2);
      scale_columns(user.capsules,
                    [&](int n, int j) { return squash_factor(norm2[n][j], p.squash).factor; });
    }
    float update[R][N][4];
    times_weight<true>(p, weight, s.parking, user.capsules, update);
    for_each_element<R, N>([&](int m, int n, int i) {
      if (step > 1) update[m][n][i] += s.back(m, n, i);
    });
    s.back.park(update);
    as_operand(update, operand);
  }
}

}  // namespace mimnet_fast::cuda
