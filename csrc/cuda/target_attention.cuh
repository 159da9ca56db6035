// Attention of candidates to the interests of their users, for a tile of both by a block, in
// float32.
//
// The projections stand on the query and on the weighted sum instead of on the K interests:
// score_k = (W_K^T q) . u_k and out = W_V (sum_k a_k u_k) + b_V. They are the only large products,
// on tensor cores where D allows; between them eight lanes share a query and go over its interests
// twice, for the scores and for what the coefficients weigh. Interests that shared memory does not
// hold are read where they are.
//
// A candidate may have two heads: queries with projections of their own that look at the same
// interests, and whose results are added, each times its share. Row (head, user, candidate) of a
// tile is (head * users + user) * candidates + candidate.
#pragma once

#include "block.cuh"
#include "tensor.cuh"
#include "weight_gradients.cuh"

namespace mimnet_fast::cuda {

constexpr int kAttentionThreads = 128;
constexpr int kAttentionLanes = 8;  // of a row
constexpr int kMostHeads = 2;

// What the gradients of the parameters are summed over, [head, row of the batch, D]; null: not
// needed, or not needed here because the float32 rows of the tensor itself serve.
struct AttentionRows {
  float* query = nullptr;
  float* grad = nullptr;  // one head
  float* folded_grad = nullptr;
  float* pooled = nullptr;
  float* share = nullptr;  // D = 1
};

struct AttentionPlan {
  int heads, interests, d;
  int64_t batch;
  int candidates;          // of a user
  View query[kMostHeads];  // [B,C,D]
  View keys;               // the interests, [B,K,D]
  View capsule_mask;
  AttentionWeights weights[kMostHeads];
  float scale = 1;
  int power = 1;
  bool hard = false;
  View grad, grad_coefficients;
  AttentionRows rows;
  bool keeps_pooled = false;  // in backward, for project_pooled

  // How the work is cut, by `cut`.
  int tile_users, tile_candidates, candidate_tiles;
  int row_stride;
  bool stages_keys, stages_weights;
  float* interests_grad;  // [B,K,D] so far, where the candidates of a user make several tiles
};

// Blocks of a launch: in backward one has all candidates of its users.
MIMNET_FAST_INLINE int64_t attention_blocks(const AttentionPlan& p, bool backward) {
  return (p.batch + p.tile_users - 1) / p.tile_users * (backward ? 1 : p.candidate_tiles);
}

// The part of the batch that a block has before it.
struct AttentionTile {
  int64_t user, row;  // the first ones
  int users, candidates, first_candidate;

  MIMNET_FAST_INLINE int rows() const { return users * candidates; }
};

struct AttentionState {
  Tile keys;          // user and interest x D, or null: read where they are
  Tile key, value;    // the weights, head and D x D, or null likewise
  Tile query;         // row x D, as below
  Tile folded;        // the query as the interests see it
  Tile scores;        // row x K
  Tile coefficients;  // row x K, times the share
  Tile pooled;        // in backward null, unless the plan keeps it
  float* share;       // of a row; 0 where a user has no interest

  // Backward only
  Tile grad;  // of the output: one head
  Tile pooled_grad, folded_grad;
  Tile score_grad;    // row x K
  float* share_grad;  // of a row, where there are two heads

  // What is dead before something else is born shares its place with it.
  MIMNET_FAST_INLINE AttentionState(const AttentionPlan& p, Arena& arena, bool backward) {
    const int one_head = p.tile_users * p.tile_candidates, rows = p.heads * one_head;
    const auto row_tile = [&](int n) {
      return Tile{arena.floats(int64_t(n) * p.row_stride), p.row_stride};
    };
    const bool folds = bool(p.weights[0].key_weight), projects = bool(p.weights[0].value_weight);
    const Tile none{nullptr, 0};
    keys = p.stages_keys ? arena.tile(p.tile_users * p.interests, p.d) : none;
    key = p.stages_weights && folds ? arena.tile(p.heads * p.d, p.d) : none;
    value = p.stages_weights && projects ? arena.tile(p.heads * p.d, p.d) : none;
    query = row_tile(rows);
    folded = folds ? row_tile(rows) : query;
    const Tile reused = folds ? query : row_tile(rows);
    coefficients = arena.tile(rows, p.interests);
    share = arena.floats(rows);
    if (!backward) {
      scores = coefficients;
      pooled = reused;
      return;
    }
    pooled = p.keeps_pooled ? row_tile(rows) : none;
    scores = arena.tile(rows, p.interests);
    score_grad = arena.tile(rows, p.interests);
    folded_grad = reused;
    grad = row_tile(one_head);
    pooled_grad = projects ? row_tile(rows) : grad;
    share_grad = p.heads > 1 ? arena.floats(rows) : nullptr;
  }
};

// On the host: chooses the tiles and returns the bytes of shared memory that they take.
int64_t cut(AttentionPlan& plan, bool backward);
// Then, for backward: allocates what these gradients need; `queries` for sums of the caller's own.
void allocate(AttentionPlan& plan, const AttentionWeights* grads, bool queries,
              const Stream& stream);
// float32 rows of the queries: those saved, or of the tensor itself.
struct FloatRows {
  const float* data;
  int64_t stride;
};
FloatRows query_rows(const AttentionPlan& plan, int head);
// A vector as the only row of a sum of outer products, from element `first` on.
View as_row(View v, int64_t first);
// Appends the sums for the gradients of the projections.
void add_sums(const AttentionPlan& plan, const AttentionWeights* grads, OuterSum* sums, int& count);

MIMNET_FAST_DEVICE AttentionTile attention_tile(const AttentionPlan& p, int64_t user_tile,
                                                int candidate_tile) {
  AttentionTile tile;
  tile.user = user_tile * p.tile_users;
  tile.first_candidate = candidate_tile * p.tile_candidates;
  tile.row = tile.user * p.candidates + tile.first_candidate;
  const int64_t users = p.batch - tile.user;
  const int candidates = p.candidates - tile.first_candidate;
  tile.users = users < p.tile_users ? int(users) : p.tile_users;
  tile.candidates = candidates < p.tile_candidates ? candidates : p.tile_candidates;
  return tile;
}

// Rows to be saved

MIMNET_FAST_DEVICE int64_t saved_row(const AttentionPlan& p, const AttentionTile& tile, int row) {
  const int rows = tile.rows();
  return row < rows ? tile.row + row : p.batch * p.candidates + tile.row + row - rows;
}

MIMNET_FAST_DEVICE void save_row(const AttentionPlan& p, const AttentionTile& tile, int row, int d,
                                 float pooled, float folded_grad) {
  const int64_t at = saved_row(p, tile, row) * p.d + d;
  if (p.rows.pooled) store(p.rows.pooled + at, pooled);
  if (p.rows.folded_grad) store(p.rows.folded_grad + at, folded_grad);
}

MIMNET_FAST_DEVICE void save_shares(const AttentionPlan& p, const AttentionState& s,
                                    const AttentionTile& tile) {
  if (!p.rows.share) return;
  for (int row = thread_index(); row < p.heads * tile.rows(); row += block_threads()) {
    store(p.rows.share + saved_row(p, tile, row), s.share[row]);
  }
}

// Loading

// Rows of a tensor [B,C,D], as put(row of the tile, d, value).
template <class Put>
MIMNET_FAST_DEVICE void load_rows(const AttentionPlan& p, const AttentionTile& tile, const View& v,
                                  Put put) {
  const bool single = tile.candidates == 1;
  const int64_t start = tile.user * v.stride[0] + tile.first_candidate * v.stride[1];
  for (int u = 0; u < (single ? 1 : tile.users); ++u) {
    read_matrix(v, start + u * v.stride[0], single ? tile.users : tile.candidates, p.d,
                v.stride[single ? 0 : 1], v.stride[2],
                [&](int i, int d, float value) { put(u * tile.candidates + i, d, value); });
  }
}

MIMNET_FAST_DEVICE void load_queries(const AttentionPlan& p, const AttentionState& s,
                                     const AttentionTile& tile) {
  for (int h = 0; h < p.heads; ++h) {
    load_rows(p, tile, p.query[h], [&](int i, int d, float value) {
      const int row = h * tile.rows() + i;
      s.query(row, d) = value;
      if (p.rows.query) store(p.rows.query + saved_row(p, tile, row) * p.d + d, value);
    });
  }
}

MIMNET_FAST_DEVICE void load_grad(const AttentionPlan& p, const AttentionState& s,
                                  const AttentionTile& tile) {
  load_rows(p, tile, p.grad, [&](int row, int d, float value) {
    s.grad(row, d) = value;
    if (p.rows.grad) store(p.rows.grad + (tile.row + row) * p.d + d, value);
  });
}

MIMNET_FAST_DEVICE void stage_weights(const AttentionPlan& p, const AttentionState& s) {
  const auto stage_weight = [&](const Tile& to, int h, const View& w) {
    if (to.data == nullptr) return;
    read_matrix(w, 0, p.d, p.d, w.stride[0], w.stride[1],
                [&](int i, int j, float value) { to(h * p.d + i, j) = value; });
  };
  for (int h = 0; h < p.heads; ++h) {
    stage_weight(s.key, h, p.weights[h].key_weight);
    stage_weight(s.value, h, p.weights[h].value_weight);
  }
}

MIMNET_FAST_DEVICE void stage_keys(const AttentionPlan& p, const AttentionState& s,
                                   const AttentionTile& tile) {
  if (s.keys.data == nullptr) return;
  const View& v = p.keys;
  const bool even = v.stride[0] == p.interests * v.stride[1];  // one matrix for all users
  for (int u = 0; u < (even ? 1 : tile.users); ++u) {
    read_matrix(v, (tile.user + u) * v.stride[0], (even ? tile.users : 1) * p.interests, p.d,
                v.stride[1], v.stride[2],
                [&](int i, int d, float value) { s.keys(u * p.interests + i, d) = value; });
  }
}

// What stays for all candidates of the users; tensor cores take it from global memory.
template <int P>
MIMNET_FAST_DEVICE void stage(const AttentionPlan& p, const AttentionState& s,
                              const AttentionTile& tile) {
  if constexpr (P == 0) {
    stage_weights(p, s);
    stage_keys(p, s, tile);
  }
}

// Projections

// One of the projections, of every head.
struct Projection {
  View AttentionWeights::* view;
  Tile staged;
};

// Outputs of a thread along each side of a small product.
template <int D>
constexpr int kAttentionMicroTile = D == 0 || D >= 32 ? 2 : 1;

// The [16, 16] at (row, column) of a weight, read through strides of its rows and columns, as the
// left operand of a product.
template <int P>
MIMNET_FAST_DEVICE void weight_fragment(const View& w, int row, int column, int64_t row_stride,
                                        int64_t column_stride, uint32_t (&a)[P][4]) {
  const auto* data = static_cast<const Stored<P>*>(w.data);
  const int lane = thread_index() % kWarp;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t at = (row + lane / 4 + i % 2 * 8) * row_stride +
                       (column + lane % 4 * 2 + i / 2 * 8) * column_stride;
    uint32_t pair[P];
    split(widen(load(data + at)), widen(load(data + at + column_stride)), pair);
#pragma unroll
    for (int plane = 0; plane < P; ++plane) a[plane][i] = pair[plane];
  }
}

struct alignas(8) FloatPair {
  float low, high;
};

// Eight rows of a tile and 16 of its columns as the columns and rows of the right operand; rows
// after `last` repeat it.
template <int Q>
MIMNET_FAST_DEVICE void row_fragment(const Tile& x, int row, int last, int column,
                                     uint32_t (&b)[Q][2]) {
  const int lane = thread_index() % kWarp, own = row + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const FloatPair x_pair = *reinterpret_cast<const FloatPair*>(
        &x(own < last ? own : last, column + lane % 4 * 2 + half * 8));
    uint32_t pair[Q];
    split(x_pair.low, x_pair.high, pair);
#pragma unroll
    for (int plane = 0; plane < Q; ++plane) b[plane][half] = pair[plane];
  }
}

// put(row, i, sum over j of W[i, j] x[row, j]), or of the transpose of W, for `rows` rows of every
// head, which lie `x_rows` apart in x. With kSum the heads are added, else each is a row.
template <int D, int P, bool kTransposed, bool kSum, class Put>
MIMNET_FAST_DEVICE void project(const AttentionPlan& p, const Projection& projection, int rows,
                                const Tile& x, int x_rows, Put put) {
  const Width<D> d(p.d);
  const int separate = kSum ? 1 : p.heads, summed = kSum ? p.heads : 1;
  if (!(p.weights[0].*projection.view)) {  // a single head
    for (int t = thread_index(); t < rows * d; t += block_threads())
      put(t / d, t % d, x(t / d, t % d));
  } else if constexpr (P == 0) {
    constexpr int T = kAttentionMicroTile<D>;
    multiply<T, T>(
        separate, rows, d, summed * d,
        [&](int n, int row, int j) {
          const int added = j < d ? 0 : 1;
          return x((n + added) * x_rows + row, j - added * d);
        },
        [&](int n, int j, int i) {
          const int head = n + (j < d ? 0 : 1);
          if (j >= d) j -= d;
          const int from = kTransposed ? j : i, to = kTransposed ? i : j;
          if (projection.staged.data) return projection.staged(head * d + from, to);
          const View& w = p.weights[head].*projection.view;
          return read(w, from * w.stride[0] + to * w.stride[1]);
        },
        [&](int n, int row, int i, float sum) { put(n * rows + row, i, sum); });
  } else {
    constexpr int kSteps = D / 16, kColumns = 4, kQ = kStatePlanes<P>;
    const int groups = (rows + 8 * kColumns - 1) / (8 * kColumns);
    const int warp = thread_index() / kWarp, warps = block_threads() / kWarp;
    for (int unit = warp; unit < separate * groups * kSteps; unit += warps) {
      const int m = unit % kSteps, n = unit / kSteps / groups;
      const int first = unit / kSteps % groups * 8 * kColumns;
      float sum[kColumns][4] = {};
      for (int head = n; head < n + summed; ++head) {
        const View& w = p.weights[head].*projection.view;
#pragma unroll 2
        for (int k = 0; k < kSteps; ++k) {
          uint32_t a[P][4];
          weight_fragment<P>(w, 16 * m, 16 * k, w.stride[kTransposed ? 1 : 0],
                             w.stride[kTransposed ? 0 : 1], a);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            if (first + 8 * c >= rows) break;
            uint32_t b[kQ][2];
            row_fragment(x, head * x_rows + first + 8 * c, head * x_rows + rows - 1, 16 * k, b);
            multiply_add(sum[c], a, b);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = first + 8 * c + state_column(i);
          if (row < rows) put(n * rows + row, 16 * m + state_row(i), sum[c][i]);
        }
      }
    }
  }
}

template <int D, int P>
MIMNET_FAST_DEVICE void fold_queries(const AttentionPlan& p, const AttentionState& s,
                                     const AttentionTile& tile) {
  if (!p.weights[0].key_weight) return;
  project<D, P, true, false>(p, {&AttentionWeights::key_weight, s.key}, tile.rows(), s.query,
                             tile.rows(),
                             [&](int row, int d, float value) { s.folded(row, d) = value; });
}

template <int D, int P>
MIMNET_FAST_DEVICE void project_grad(const AttentionPlan& p, const AttentionState& s,
                                     const AttentionTile& tile) {
  if (!p.weights[0].value_weight) return;
  project<D, P, true, false>(p, {&AttentionWeights::value_weight, s.value}, tile.rows(), s.grad, 0,
                             [&](int row, int d, float value) { s.pooled_grad(row, d) = value; });
}

// put(row of the tile, d, output), the heads added.
template <int D, int P, class Put>
MIMNET_FAST_DEVICE void project_pooled(const AttentionPlan& p, const AttentionState& s,
                                       const AttentionTile& tile, Put put) {
  const int rows = tile.rows();
  project<D, P, false, true>(p, {&AttentionWeights::value_weight, s.value}, rows, s.pooled, rows,
                             [&](int row, int d, float value) {
                               for (int h = 0; h < p.heads; ++h) {
                                 const View& bias = p.weights[h].value_bias;
                                 if (bias) {
                                   value +=
                                       s.share[h * rows + row] * read(bias, d * bias.stride[0]);
                                 }
                               }
                               put(row, d, value);
                             });
}

// put(row, d, gradient of the query)
template <int D, int P, class Put>
MIMNET_FAST_DEVICE void query_gradient(const AttentionPlan& p, const AttentionState& s,
                                       const AttentionTile& tile, Put put) {
  project<D, P, false, false>(p, {&AttentionWeights::key_weight, s.key}, tile.rows(), s.folded_grad,
                              tile.rows(), put);
}

// Attention

// body(row, lane, valid) for each of the lanes that share a row. All lanes of a warp come together,
// those without a row with another's and not valid.
template <class Body>
MIMNET_FAST_DEVICE void share_rows(int rows, Body body) {
  const int own = thread_index() % kWarp / kAttentionLanes;
  for (int first = thread_index() / kWarp * (kWarp / kAttentionLanes); first < rows;
       first += block_threads() / kAttentionLanes) {
    const int row = first + own;
    body(row < rows ? row : rows - 1, thread_index() % kAttentionLanes, row < rows);
  }
}

MIMNET_FAST_DEVICE float row_sum(float value) {
  for (int mask = kAttentionLanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
MIMNET_FAST_DEVICE float row_max(float value) {
  for (int mask = kAttentionLanes / 2; mask > 0; mask /= 2) {
    value = maximum(value, shuffle_xor(value, mask));
  }
  return value;
}

// Raw scores, and in backward what comes to the coefficients through the weighted sum. interest(k,
// d) reads those of the row's user.
template <int D, bool kBackward, class Interest>
MIMNET_FAST_DEVICE void score_row(const AttentionPlan& p, const AttentionState& s, int row,
                                  int lane, bool valid, Interest interest) {
  constexpr int kAtOnce = 4;
  const Width<D> d(p.d);
  for (int first = 0; first < p.interests; first += kAtOnce) {
    float score[kAtOnce] = {}, grad[kAtOnce] = {};
#pragma unroll 4
    for (int start = 0; start < d; start += kAttentionLanes) {
      const int j = start + lane;
      if (j >= d) continue;
      const float folded = s.folded(row, j);
      const float pooled_grad = kBackward ? s.pooled_grad(row, j) : 0.0f;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int k = first + n;
        const float u = interest(k < p.interests ? k : p.interests - 1, j);
        score[n] += folded * u;
        if (kBackward) grad[n] += pooled_grad * u;
      }
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const float score_sum = row_sum(score[n]);
      const float grad_sum = kBackward ? row_sum(grad[n]) : 0.0f;
      if (valid && lane == n && first + n < p.interests) {
        s.scores(row, first + n) = score_sum;
        if (kBackward) s.score_grad(row, first + n) = grad_sum;
      }
    }
  }
}

MIMNET_FAST_DEVICE float whole_power(float x, int n) {
  float y = 1;
  for (int i = 0; i < n; ++i) y *= x;
  return y;
}

// Scores to coefficients, and in backward the gradients of the coefficients to those of the scores.
// present(k) tells whether the row's user has that interest; more_grad(k) is what comes to its
// coefficient from outside.
template <bool kBackward, class Present, class MoreGrad>
MIMNET_FAST_DEVICE void weigh_row(const AttentionPlan& p, const AttentionState& s, int row,
                                  int lane, bool valid, Present present, MoreGrad more_grad) {
  constexpr float lowest = -3e38f;
  const int count = valid ? p.interests : 0;
  const auto scaled = [&](int k) {
    return present(k) ? p.scale * whole_power(s.scores(row, k), p.power) : lowest;
  };
  float top = lowest;
  for (int k = lane; k < count; k += kAttentionLanes) top = maximum(top, scaled(k));
  top = row_max(top);
  float best = float(p.interests);  // the first of the best
  for (int k = count - 1 - lane; p.hard && k >= 0; k -= kAttentionLanes) {
    if (scaled(k) == top) best = float(k);
  }
  best = -row_max(-best);
  float sum = 0, reference = lowest;
  for (int k = lane; k < count; k += kAttentionLanes) {
    const float score = scaled(k);
    float a = p.hard ? (float(k) == best ? 1.0f : 0.0f) : exponential(score - top);
    if (!present(k)) a = 0;
    if (kBackward) {
      s.score_grad(row, k) += more_grad(k);
      if (a == 1) reference = maximum(reference, s.score_grad(row, k));
    }
    s.coefficients(row, k) = a;
    sum += a;
  }
  sum = row_sum(sum);
  const float share = sum > 0 ? s.share[row] : 0.0f, inverse = sum > 0 ? 1 / sum : 0.0f;
  if (valid && lane == 0) s.share[row] = share;
  if constexpr (kBackward) {
    // The gradients are centred around that of the heaviest interest: where it takes nearly
    // everything, what is left of the others is small and must not come out of a difference.
    reference = row_max(reference);
    if (sum <= 0) reference = 0;
    float mean = 0;
    for (int k = lane; k < count; k += kAttentionLanes) {
      mean += s.coefficients(row, k) * inverse * (s.score_grad(row, k) - reference);
    }
    mean = row_sum(mean);
    for (int k = lane; k < count; k += kAttentionLanes) {
      const float a = s.coefficients(row, k) * inverse * share;
      const float slope =
          p.hard ? 0.0f : p.scale * float(p.power) * whole_power(s.scores(row, k), p.power - 1);
      s.score_grad(row, k) = a * (s.score_grad(row, k) - reference - mean) * slope;
      s.coefficients(row, k) = a;
    }
    if (s.share_grad && valid && lane == 0) s.share_grad[row] += reference + mean;
  } else {
    for (int k = lane; k < count; k += kAttentionLanes) {
      s.coefficients(row, k) *= inverse * share;
    }
  }
}

// put(row, d, weighted sum of the interests, that with the gradients of the scores as weights).
template <int D, bool kBackward, class Interest, class Put>
MIMNET_FAST_DEVICE void pool_row(const AttentionPlan& p, const AttentionState& s, int row, int lane,
                                 bool valid, Interest interest, Put put) {
  constexpr int kChunk = D == 0 || D >= 32 ? 4 : (D + kAttentionLanes - 1) / kAttentionLanes;
  const Width<D> d(p.d);
  const int count = valid ? p.interests : 0;
  for (int start = 0; start < d; start += kChunk * kAttentionLanes) {
    float pooled[kChunk] = {}, folded_grad[kChunk] = {};
#pragma unroll 2
    for (int k = 0; k < count; ++k) {
      const float a = s.coefficients(row, k), g = kBackward ? s.score_grad(row, k) : 0.0f;
#pragma unroll
      for (int n = 0; n < kChunk; ++n) {
        const int j = start + n * kAttentionLanes + lane;
        const float u = j < d ? interest(k, j) : 0.0f;
        pooled[n] += a * u;
        if (kBackward) folded_grad[n] += g * u;
      }
    }
#pragma unroll
    for (int n = 0; n < kChunk; ++n) {
      const int j = start + n * kAttentionLanes + lane;
      if (valid && j < d) put(row, j, pooled[n], folded_grad[n]);
    }
  }
}

// Between the projections: scores, coefficients and pooled, in backward with their gradients.
// put(row, d, pooled, gradient of folded) may overwrite the query.
template <int D, int P, bool kBackward, class Put>
MIMNET_FAST_DEVICE void attend(const AttentionPlan& p, const AttentionState& s,
                               const AttentionTile& tile, Put put) {
  const int rows = tile.rows();
  share_rows(p.heads * rows, [&](int row, int lane, bool valid) {
    const int in_head = row < rows ? row : row - rows;
    const int u = in_head / tile.candidates, c = in_head % tile.candidates;
    const View &keys = p.keys, &mask = p.capsule_mask, &more = p.grad_coefficients;
    const int64_t from = (tile.user + u) * keys.stride[0];
    // Of another kernel's making they may be float32 next to narrower weights.
    const bool floats = P == 3 || keys.dtype == DType::float32;
    const int64_t bytes = floats ? 4 : 2;
    const char* own = static_cast<const char*>(keys.data) + from * bytes;
    const int64_t to_next = keys.stride[1] * bytes, step = keys.stride[2] * bytes;
    const auto interest = [&](int k, int j) {
      if constexpr (P == 0) {
        return s.keys.data ? s.keys(u * p.interests + k, j)
                           : read(keys, from + k * keys.stride[1] + j * keys.stride[2]);
      } else {
        const char* address = own + k * to_next + j * step;
        return floats ? load(reinterpret_cast<const float*>(address))
                      : widen(load(reinterpret_cast<const Stored<P>*>(address)));
      }
    };
    score_row<D, kBackward>(p, s, row, lane, valid, interest);
    sync_warp();
    weigh_row<kBackward>(
        p, s, row, lane, valid,
        [&](int k) {
          return !mask || read_flag(mask, (tile.user + u) * mask.stride[0] + k * mask.stride[1]);
        },
        [&](int k) {
          return more ? read(more, (tile.user + u) * more.stride[0] +
                                       (tile.first_candidate + c) * more.stride[1] +
                                       k * more.stride[2])
                      : 0.0f;
        });
    sync_warp();
    pool_row<D, kBackward>(p, s, row, lane, valid, interest, put);
  });
}

template <int D, int P>
MIMNET_FAST_DEVICE void attend_forward(const AttentionPlan& p, const AttentionState& s,
                                       const AttentionTile& tile) {
  attend<D, P, false>(p, s, tile,
                      [&](int row, int d, float pooled, float) { s.pooled(row, d) = pooled; });
}

template <int D, int P>
MIMNET_FAST_DEVICE void attend_backward(const AttentionPlan& p, const AttentionState& s,
                                        const AttentionTile& tile) {
  attend<D, P, true>(p, s, tile, [&](int row, int d, float pooled, float folded_grad) {
    s.folded_grad(row, d) = folded_grad;
    if (s.pooled.data) s.pooled(row, d) = pooled;
    save_row(p, tile, row, d, pooled, folded_grad);
  });
}

// put(user of the tile, k, d, gradient of the interest from the candidates of the tile).
template <int D, class Put>
MIMNET_FAST_DEVICE void interests_gradient(const AttentionPlan& p, const AttentionState& s,
                                           const AttentionTile& tile, Put put) {
  constexpr int T = kAttentionMicroTile<D>;
  const int twice = 2 * tile.candidates, to_next_head = (tile.users - 1) * tile.candidates;
  // Number e of a user's terms is of row e / 2, counted through its candidates and heads.
  const auto row = [&](int u, int e) {
    return u * tile.candidates + e / 2 + (e < twice ? 0 : to_next_head);
  };
  multiply<T, T>(
      tile.users, p.interests, Width<D>(p.d), p.heads * twice,
      [&](int u, int k, int e) {
        return (e % 2 == 0 ? s.coefficients : s.score_grad)(row(u, e), k);
      },
      [&](int u, int e, int d) { return (e % 2 == 0 ? s.pooled_grad : s.folded)(row(u, e), d); },
      put);
}

// Adds the tiles of a user's candidates, which come in order to the same thread.
MIMNET_FAST_DEVICE void write_interests_gradient(const AttentionPlan& p, int candidate_tile,
                                                 const View& out, int64_t at, float value) {
  if (candidate_tile > 0) value += load(p.interests_grad + at);
  if (candidate_tile + 1 < p.candidate_tiles) {
    store(p.interests_grad + at, value);
  } else {
    write(out, at, value);
  }
}

// Launches

// An attention is its plan and what forward<D, P>() and backward<D, P>() do with it.
template <bool kBackward, int D, int P, class Attention>
MIMNET_FAST_DEVICE void run_attention(const Attention& attention) {
  if constexpr (kBackward) {
    attention.template backward<D, P>();
  } else {
    attention.template forward<D, P>();
  }
}

template <bool kBackward, int D, class Attention>
MIMNET_FAST_KERNEL(kAttentionThreads, 4)
attention_kernel(Attention attention) {
  run_attention<kBackward, D, 0>(attention);
}

template <bool kBackward, int D, int P, class Attention>
MIMNET_FAST_KERNEL(kAttentionThreads, 4)
attention_tensor_kernel(Attention attention) {
  run_attention<kBackward, D, P>(attention);
}

template <bool kBackward, int D, class Attention>
auto attention_kernel_for(DType dtype) {
  switch (planes_of(dtype)) {
    case 1:
      return attention_tensor_kernel<kBackward, D, 1, Attention>;
    case 2:
      return attention_tensor_kernel<kBackward, D, 2, Attention>;
    default:
      return attention_tensor_kernel<kBackward, D, 3, Attention>;
  }
}

template <bool kBackward, class Attention>
auto attention_kernel_for(const AttentionPlan& p) {
  const AttentionWeights& w = p.weights[0];
  const DType dtype = w.key_weight     ? w.key_weight.dtype
                      : w.value_weight ? w.value_weight.dtype
                                       : p.keys.dtype;
  switch (p.d) {
    case 8:
      return attention_kernel<kBackward, 8, Attention>;
    case 10:
      return attention_kernel<kBackward, 10, Attention>;
    case 16:
      return attention_kernel<kBackward, 16, Attention>;
    case 32:
      return attention_kernel_for<kBackward, 32, Attention>(dtype);
    case 64:
      return attention_kernel_for<kBackward, 64, Attention>(dtype);
    case 128:
      return attention_kernel_for<kBackward, 128, Attention>(dtype);
    default:
      return attention_kernel<kBackward, 0, Attention>;
  }
}

template <bool kBackward, class Attention>
void start_attention(const Attention& attention, int64_t shared_bytes, const Stream& stream) {
  const AttentionPlan& p = attention.plan;
  launch(attention_kernel_for<kBackward, Attention>(p), attention_blocks(p, kBackward),
         kAttentionThreads, shared_bytes, stream, attention);
}

}  // namespace mimnet_fast::cuda
