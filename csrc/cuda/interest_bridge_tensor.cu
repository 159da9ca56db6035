// The bridge on tensor cores, for widths 32, 64 and 128.
//
// A block makes T for its users in panels of 16 target dimensions and 32 hidden units, a product
// [users, s] [s, h] for each target dimension; it reads w2 once. A panel goes through shared
// memory, where its part of a user, [t, h], becomes the right operand of a small product with what
// the user's interests have there: hidden units in forward, gradients of outputs in backward. The
// gradient of T takes the same way in the other direction.
#include <algorithm>

#include "interest_bridge.cuh"
#include "tensor.cuh"

namespace mimnet_fast::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kPanel = 16;  // target dimensions of a panel
constexpr int kSlice = 32;  // its hidden units
constexpr int kGroup = 8;   // interests of a user that share a T

// Rows of w2 that a warp has in shared memory at a time, and in registers on their way there.
template <int P>
constexpr int kStage = P == 3 ? 16 : 32;

// Users of a block where there are many, and where there are few.
template <int P>
constexpr int kManyUsers = P == 3 ? 32 : 64;
constexpr int kFewUsers = 16;

MIMNET_FAST_DEVICE int lane_index() { return thread_index() % kWarp; }
MIMNET_FAST_DEVICE int warp_index() { return thread_index() / kWarp; }

// Operands of a product with P planes, of which the lane holds two rows of the left one and one
// column of the right one, in both two neighbours along the sum.

// [16, 16] of get(half, i): element i of row lane / 4 of the upper or lower half
template <int P, class Get>
MIMNET_FAST_DEVICE void make_left(uint32_t (&a)[P][4], Get get) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int i = n / 2 * 8 + lane_index() % 4 * 2;
    uint32_t pair[P];
    split(get(n % 2, i), get(n % 2, i + 1), pair);
#pragma unroll
    for (int p = 0; p < P; ++p) a[p][n] = pair[p];
  }
}

// [16, 8] of get(i): element i of column lane / 4
template <int P, class Get>
MIMNET_FAST_DEVICE void make_right(uint32_t (&b)[P][2], Get get) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int i = n * 8 + lane_index() % 4 * 2;
    uint32_t pair[P];
    split(get(i), get(i + 1), pair);
#pragma unroll
    for (int p = 0; p < P; ++p) b[p][n] = pair[p];
  }
}

// Two right operands, side by side: the [16, 16] at (row, column) of the planes, or with kTurned
// its transpose. `step` rows of the planes lie between its rows.
template <bool kTurned, int P, int C>
MIMNET_FAST_DEVICE void right_operands(const Planes<P, C>& planes, int row, int column,
                                       uint32_t (&first)[P][2], uint32_t (&second)[P][2],
                                       int step = 1) {
  uint32_t turned[P][4];
  planes.template fragment<!kTurned>(row, column, turned, step);
#pragma unroll
  for (int p = 0; p < P; ++p) {
    first[p][0] = turned[p][0];
    first[p][1] = turned[p][2];
    second[p][0] = turned[p][1];
    second[p][1] = turned[p][3];
  }
}

// One half of the rows of a left operand; the other is 0.
template <int P>
MIMNET_FAST_DEVICE void keep_half(const uint32_t (&a)[P][4], int half, uint32_t (&kept)[P][4]) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
#pragma unroll
    for (int n = 0; n < 4; ++n) kept[p][n] = n % 2 == half ? a[p][n] : 0;
  }
}

// Sixteen bytes of a row of a matrix from a column on, a multiple of their number; 0 outside.
template <int P>
class Packs {
 public:
  static constexpr int kPack = Planes<P>::kPack;

  explicit MIMNET_FAST_DEVICE Packs(const View& matrix)
      : matrix_(matrix),
        packed_(matrix.stride[1] == 1 && matrix.stride[0] % kPack == 0 && aligned(matrix, 0)) {}

  MIMNET_FAST_DEVICE Pack operator()(int row, int column) const {
    const int left = row < matrix_.size[0] ? int(matrix_.size[1]) - column : 0;
    const auto* data = static_cast<const Stored<P>*>(matrix_.data) +
                       (row * matrix_.stride[0] + column * matrix_.stride[1]);
    if (packed_ && left >= kPack) return load_pack(data);
    Pack pack{};
#pragma unroll
    for (int n = 0; n < kPack; ++n) {
      if (n >= left) continue;
      const auto value = load(data + n * matrix_.stride[1]);
      if constexpr (P == 3) {
        pack.words[n] = float_as_bits(value);
      } else {
        pack.words[n / 2] |= uint32_t(value.bits) << n % 2 * 16;
      }
    }
    return pack;
  }

 private:
  const View& matrix_;  // of the kernel's arguments, which takes no register
  bool packed_;
};

// out = rows weight^T, or with kTurned rows weight
struct RowProduct {
  View rows;    // [(count, terms)], numbered through two dimensions; a row is the sum of its terms
  View weight;  // [columns, depth], with kTurned [depth, columns]
  View bias;    // none, or [columns]; then the relu follows
  View out;     // [count, columns]
  int64_t count;
  int terms, columns, depth;
};

constexpr int kProductRows = 16 * kWarps, kProductColumns = 32, kProductDepth = 64;

template <int P, bool kTurned>
MIMNET_FAST_KERNEL(kThreads, 2)
bridge_tensor_rows(RowProduct args) {
  constexpr int weight_rows = kTurned ? kProductDepth : kProductColumns;
  constexpr int weight_columns = kTurned ? kProductColumns : kProductDepth;
  constexpr int per_row = weight_columns / Planes<P>::kPack;
  Arena arena(shared_memory());
  const Planes<P, weight_columns> weight(arena, weight_rows, weight_columns);
  const Packs<P> packs(args.weight);
  const int64_t tiles = (args.count + kProductRows - 1) / kProductRows;
  const int64_t first_row = block_index() % tiles * kProductRows + warp_index() * 16;
  const int first_column = int(block_index() / tiles) * kProductColumns;
  const auto element = [&](int half, int i) {
    const int64_t row = first_row + half * 8 + lane_index() / 4;
    float sum = 0;
    if (row >= args.count || i >= args.depth) return sum;
    for (int term = 0; term < args.terms; ++term) {
      sum +=
          read(args.rows, row_offset(args.rows, row * args.terms + term) + i * args.rows.stride[2]);
    }
    return sum;
  };
  float sum[kProductColumns / 8][4] = {};
#pragma unroll 1
  for (int first = 0; first < args.depth; first += kProductDepth) {
    sync_block();
    for (int e = thread_index(); e < weight_rows * per_row; e += kThreads) {
      const int i = e / per_row, j = e % per_row * Planes<P>::kPack;
      weight.put(i, j,
                 packs(i + (kTurned ? first : first_column), j + (kTurned ? first_column : first)));
    }
    sync_block();
#pragma unroll
    for (int step = 0; step < kProductDepth; step += 16) {
      uint32_t a[P][4];
      make_left(a, [&](int half, int i) { return element(half, first + step + i); });
#pragma unroll
      for (int n = 0; n < kProductColumns / 16; ++n) {
        uint32_t b[2][P][2];
        right_operands<!kTurned>(weight, kTurned ? step : 16 * n, kTurned ? 16 * n : step, b[0],
                                 b[1]);
        multiply_add(sum[2 * n], a, b[0]);
        multiply_add(sum[2 * n + 1], a, b[1]);
      }
    }
  }
  for_each_element<kProductColumns / 8, 1>([&](int n, int, int i) {
    const int64_t row = first_row + state_row(i);
    const int column = first_column + 8 * n + state_column(i);
    if (row >= args.count || column >= args.columns) return;
    float value = sum[n][i];
    if (args.bias) value = maximum(value + read(args.bias, column * args.bias.stride[0]), 0.0f);
    write(args.out, row * args.out.stride[0] + column, value);
  });
}

template <int P, bool kTurned>
void multiply_rows(const Stream& stream, RowProduct args) {
  args.weight.size[kTurned] = args.columns;
  args.weight.size[!kTurned] = args.depth;
  Arena arena(nullptr);
  constexpr int rows = kTurned ? kProductDepth : kProductColumns;
  constexpr int columns = kTurned ? kProductColumns : kProductDepth;
  Planes<P, columns>(arena, rows, columns);
  launch(bridge_tensor_rows<P, kTurned>,
         (args.count + kProductRows - 1) / kProductRows *
             ((args.columns + kProductColumns - 1) / kProductColumns),
         kThreads, arena.bytes(), stream, args);
}

struct TensorLaunch {
  View source;        // [B, 1, D]
  View w2;            // [(s, t), h]
  Rows hidden, grad;  // of the interests, [(B, K), H] and [(B, K), D]
  Rows shift;         // [B, D]: the source times b2
  View out;           // forward
  float* partial;     // backward: of every split
  int64_t users;
  int per_user, units;
  int splits;  // of the target dimensions, or of the users
};

// U: users of the block at a time. S: hidden units of a panel.
template <int D, int P, int U, int S = kSlice>
struct Memory {
  Planes<P, D> source;  // [U, D]
  Planes<P, S> panel;   // [(t, U + 1), S]; with the spare row no two rows of a user share banks
  Planes<P, S> stage;   // of w2, [(warp, kStage<P>), S]

  explicit MIMNET_FAST_INLINE Memory(Arena& arena)
      : source(arena, U, D),
        panel(arena, kPanel * (U + 1), S),
        stage(arena, kWarps * kStage<P>, S) {}

  static int64_t bytes() {
    Arena arena(nullptr);
    Memory of_a_block(arena);
    return arena.bytes();
  }
};

// What a block works on: neighbours take other users of the same `rest`.
template <int U>
struct Share {
  int64_t first_user, rest;
  int users;

  explicit MIMNET_FAST_DEVICE Share(const TensorLaunch& args) {
    const int64_t tiles = (args.users + U - 1) / U;
    first_user = block_index() % tiles * U;
    rest = block_index() / tiles;
    count(args.users);
  }
  MIMNET_FAST_DEVICE Share(int64_t first, int64_t end) : first_user(first), rest(0) { count(end); }

  // Of interest k of a user of the block, or null.
  MIMNET_FAST_DEVICE const float* row(const Rows& rows, int per_user, int user, int k) const {
    if (user >= users || k >= per_user) return nullptr;
    return rows.data + ((first_user + user) * per_user + k) * rows.stride;
  }

 private:
  MIMNET_FAST_DEVICE void count(int64_t end) {
    users = end - first_user < U ? int(end - first_user) : U;
  }
};

// The panels of a split: first to last target dimension.
template <int D>
MIMNET_FAST_DEVICE int first_target(int split, int splits) {
  return D / kPanel * split / splits * kPanel;
}

template <int D, int P, int U, int S>
MIMNET_FAST_DEVICE void load_source(const Memory<D, P, U, S>& memory, const View& source,
                                    const Share<U>& share) {
  load_planes(memory.source, source, row_offset(source, share.first_user), share.users, U, D,
              spacing(source), source.stride[2], thread_index(), kThreads);
}

// Brings rows of w2 to the stage of the warp: the next ones are under way while those there are
// used.
template <int P, int S>
class StagedRows {
 public:
  MIMNET_FAST_DEVICE StagedRows(const Planes<P, S>& stage, const View& w2, int first_h)
      : stage_(stage), packs_(w2), first_h_(first_h) {}

  // row_of(i): of w2, for row i of the stage
  template <class RowOf>
  MIMNET_FAST_DEVICE void fetch(RowOf row_of) {
#pragma unroll
    for (int n = 0; n < kOwn; ++n) pack_[n] = packs_(row_of(row(n)), first_h_ + column(n));
  }
  MIMNET_FAST_DEVICE void put() const {
    sync_warp();
#pragma unroll
    for (int n = 0; n < kOwn; ++n) stage_.put(first_row() + row(n), column(n), pack_[n]);
    sync_warp();
  }
  static MIMNET_FAST_DEVICE int first_row() { return warp_index() * kStage<P>; }

 private:
  static constexpr int kPerRow = S / Planes<P>::kPack, kOwn = kStage<P> * kPerRow / kWarp;

  static MIMNET_FAST_DEVICE int row(int n) { return (lane_index() + n * kWarp) / kPerRow; }
  static MIMNET_FAST_DEVICE int column(int n) { return lane_index() % kPerRow * Planes<P>::kPack; }

  const Planes<P, S>& stage_;
  Packs<P> packs_;
  int first_h_;
  Pack pack_[kOwn];
};

// panel[t, u, h] = sum over s of source[u, s] w2[(s, first_t + t), first_h + h]. Each warp makes
// some t.
template <int D, int P, int U>
MIMNET_FAST_DEVICE void make_panel(const Memory<D, P, U>& memory, const View& w2, int first_t,
                                   int first_h) {
  constexpr int per_target = D / kStage<P>, steps = kPanel / kWarps * per_target;
  const int own_t = warp_index() * (kPanel / kWarps);
  StagedRows<P, kSlice> rows(memory.stage, w2, first_h);
  const auto fetch = [&](int step) {
    const int t = first_t + own_t + step / per_target, first_s = step % per_target * kStage<P>;
    rows.fetch([&](int i) { return (first_s + i) * D + t; });
  };
  float sum[U / 16][kSlice / 8][4] = {};
  fetch(0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    rows.put();
    if (step + 1 < steps) fetch(step + 1);
#pragma unroll
    for (int s = 0; s < kStage<P>; s += 16) {
      uint32_t b[kSlice / 8][P][2];
#pragma unroll
      for (int n = 0; n < kSlice / 8; n += 2) {
        right_operands<false>(memory.stage, rows.first_row() + s, 8 * n, b[n], b[n + 1]);
      }
#pragma unroll
      for (int m = 0; m < U / 16; ++m) {
        uint32_t a[P][4];
        memory.source.template fragment<false>(16 * m, step % per_target * kStage<P> + s, a);
#pragma unroll
        for (int n = 0; n < kSlice / 8; ++n) multiply_add(sum[m][n], a, b[n]);
      }
    }
    if (step % per_target < per_target - 1) continue;
    const int first_row = (own_t + step / per_target) * (U + 1);
    for_each_element<U / 16, kSlice / 8>([&](int m, int n, int i) {
      if (i % 2 == 0) {
        memory.panel.put(first_row + 16 * m + state_row(i), 8 * n + state_column(i), sum[m][n][i],
                         sum[m][n][i + 1]);
      }
    });
    for_each_element<U / 16, kSlice / 8>([&](int m, int n, int i) { sum[m][n][i] = 0; });
  }
}

// panel[t, u, h] = sum over k of grad[u, k, first_t + t] hidden[u, k, first_h + h]. Each warp makes
// some users.
template <int D, int P, int U, int S>
MIMNET_FAST_DEVICE void make_grad_panel(const Memory<D, P, U, S>& memory, const TensorLaunch& args,
                                        const Share<U>& share, int first_t, int first_h) {
  const int at = lane_index() / 4;
#pragma unroll(P == 3 ? 1 : 2)
  for (int n = 0; n < U / kWarps; ++n) {
    const int user = warp_index() * (U / kWarps) + n;
    float sum[S / 8][4] = {};
#pragma unroll 1
    for (int first_k = 0; first_k < args.per_user; first_k += 16) {
      uint32_t a[P][4];
      make_left(a, [&](int half, int k) {
        const float* row = share.row(args.grad, args.per_user, user, first_k + k);
        return row ? load(row + first_t + half * 8 + at) : 0.0f;
      });
#pragma unroll
      for (int m = 0; m < S / 8; ++m) {
        const int h = first_h + 8 * m + at;
        uint32_t b[P][2];
        make_right(b, [&](int k) {
          const float* row = share.row(args.hidden, args.per_user, user, first_k + k);
          return row && h < args.units ? load(row + h) : 0.0f;
        });
        multiply_add(sum[m], a, b);
      }
    }
    for_each_element<S / 8, 1>([&](int m, int, int i) {
      if (i % 2 == 0) {
        memory.panel.put(state_row(i) * (U + 1) + user, 8 * m + state_column(i), sum[m][i],
                         sum[m][i + 1]);
      }
    });
  }
}

// A warp has U / 8 users in the products with their interests, two in each, of which every one has
// half of the rows.
template <int U>
constexpr int kPairs = U / kWarps / 2;
template <int U>
MIMNET_FAST_DEVICE int user_of(int pair, int half) {
  return (warp_index() * kPairs<U> + pair) * 2 + half;
}

template <int D, int P, int U>
MIMNET_FAST_KERNEL(kThreads, 1)
bridge_tensor_forward(TensorLaunch args) {
  Arena arena(shared_memory());
  const Memory<D, P, U> memory(arena);
  const Share<U> share(args);
  const int split = int(share.rest % args.splits);
  const int k = int(share.rest / args.splits) * kGroup + lane_index() / 4;
  load_source(memory, args.source, share);
#pragma unroll 1
  for (int first_t = first_target<D>(split, args.splits);
       first_t < first_target<D>(split + 1, args.splits); first_t += kPanel) {
    float out[kPairs<U>][kPanel / 8][4];
    for_each_element<kPairs<U>, kPanel / 8>([&](int pair, int n, int i) {
      const int user = user_of<U>(pair, i / 2);
      const float* shift = args.shift.data + (share.first_user + user) * args.shift.stride;
      out[pair][n][i] = user < share.users ? load(shift + first_t + 8 * n + state_column(i)) : 0.0f;
    });
#pragma unroll 1
    for (int first_h = 0; first_h < args.units; first_h += kSlice) {
      sync_block();
      make_panel(memory, args.w2, first_t, first_h);
      sync_block();
#pragma unroll
      for (int pair = 0; pair < kPairs<U>; ++pair) {
        const float* rows[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          rows[half] = share.row(args.hidden, args.per_user, user_of<U>(pair, half), k);
        }
#pragma unroll
        for (int h = 0; h < kSlice; h += 16) {
          uint32_t a[P][4];
          make_left(a, [&](int half, int i) {
            const int column = first_h + h + i;
            return rows[half] && column < args.units ? load(rows[half] + column) : 0.0f;
          });
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t kept[P][4], b[2][P][2];
            keep_half(a, half, kept);
            right_operands<true>(memory.panel, user_of<U>(pair, half), h, b[0], b[1], U + 1);
            multiply_add(out[pair][0], kept, b[0]);
            multiply_add(out[pair][1], kept, b[1]);
          }
        }
      }
    }
    for_each_element<kPairs<U>, kPanel / 8>([&](int pair, int n, int i) {
      const int user = user_of<U>(pair, i / 2);
      if (user >= share.users || k >= args.per_user) return;
      const int64_t row = (share.first_user + user) * args.per_user + k;
      write(args.out, row * D + first_t + 8 * n + state_column(i), out[pair][n][i]);
    });
  }
}

// partial[split, (b, k), h] = relu'(hidden) times the sum over t of grad[b, k, t] T[b, t, h]
template <int D, int P, int U>
MIMNET_FAST_KERNEL(kThreads, 1)
bridge_tensor_hidden_grad(TensorLaunch args) {
  Arena arena(shared_memory());
  const Memory<D, P, U> memory(arena);
  const Share<U> share(args);
  const int split = int(share.rest % args.splits);
  const int slices = (args.units + kSlice - 1) / kSlice;
  const int first_h = int(share.rest / args.splits % slices) * kSlice;
  const int k = int(share.rest / args.splits / slices) * kGroup + lane_index() / 4;
  load_source(memory, args.source, share);
  float total[kPairs<U>][kSlice / 8][4] = {};
#pragma unroll 1
  for (int first_t = first_target<D>(split, args.splits);
       first_t < first_target<D>(split + 1, args.splits); first_t += kPanel) {
    sync_block();
    make_panel(memory, args.w2, first_t, first_h);
    sync_block();
#pragma unroll
    for (int pair = 0; pair < kPairs<U>; ++pair) {
      uint32_t a[P][4];
      make_left(a, [&](int half, int i) {
        const float* row = share.row(args.grad, args.per_user, user_of<U>(pair, half), k);
        return row ? load(row + first_t + i) : 0.0f;
      });
#pragma unroll(P == 3 ? 1 : 2)
      for (int half = 0; half < 2; ++half) {
        uint32_t kept[P][4];
        keep_half(a, half, kept);
#pragma unroll
        for (int n = 0; n < kSlice / 8; n += 2) {
          uint32_t b[2][P][2];
          right_operands<false>(memory.panel, user_of<U>(pair, half), 8 * n, b[0], b[1], U + 1);
          multiply_add(total[pair][n], kept, b[0]);
          multiply_add(total[pair][n + 1], kept, b[1]);
        }
      }
    }
  }
  for_each_element<kPairs<U>, kSlice / 8>([&](int pair, int n, int i) {
    const int user = user_of<U>(pair, i / 2), h = first_h + 8 * n + state_column(i);
    const float* hidden = share.row(args.hidden, args.per_user, user, k);
    if (!hidden || h >= args.units) return;
    const int64_t row = (split * args.users + share.first_user + user) * args.per_user + k;
    store(args.partial + row * args.units + h, load(hidden + h) > 0 ? total[pair][n][i] : 0.0f);
  });
}

// partial[split, b, s] = sum over t and h of dT[b, t, h] w2[(s, t), h]. A warp makes 16 s of some
// users.
template <int D, int P, int U>
MIMNET_FAST_KERNEL(kThreads, 1)
bridge_tensor_source_grad(TensorLaunch args) {
  constexpr int jobs = D / 16 * (U / 16),
                kTiles = jobs > kWarps ? jobs / kWarps : 1;  // of 16 users, of a warp
  constexpr int kTargets = kStage<P> / 16;                   // on the stage
  Arena arena(shared_memory());
  const Memory<D, P, U> memory(arena);
  const Share<U> share(args);
  const int split = int(share.rest);
  const int first_s = warp_index() % (D / 16) * 16;
  const int first_user = warp_index() / (D / 16) * kTiles * 16;
  float total[kTiles][2][4] = {};
#pragma unroll 1
  for (int first_h = 0; first_h < args.units; first_h += kSlice) {
    StagedRows<P, kSlice> rows(memory.stage, args.w2, first_h);
#pragma unroll 1
    for (int first_t = first_target<D>(split, args.splits);
         first_t < first_target<D>(split + 1, args.splits); first_t += kPanel) {
      const auto fetch = [&](int t) {
        rows.fetch([&](int i) { return (first_s + i % 16) * D + first_t + t + i / 16; });
      };
      sync_block();
      make_grad_panel(memory, args, share, first_t, first_h);
      sync_block();
      if (first_user >= U) continue;
      fetch(0);
#pragma unroll 1
      for (int t = 0; t < kPanel; t += kTargets) {
        rows.put();
        if (t + kTargets < kPanel) fetch(t + kTargets);
#pragma unroll
        for (int n = 0; n < kTargets; ++n) {
#pragma unroll
          for (int h = 0; h < kSlice; h += 16) {
            uint32_t b[2][P][2];
            right_operands<true>(memory.stage, rows.first_row() + 16 * n, h, b[0], b[1]);
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
              uint32_t a[P][4];
              memory.panel.template fragment<false>((t + n) * (U + 1) + first_user + 16 * m, h, a);
              multiply_add(total[m][0], a, b[0]);
              multiply_add(total[m][1], a, b[1]);
            }
          }
        }
      }
    }
  }
  for_each_element<kTiles, 2>([&](int m, int n, int i) {
    const int user = first_user + 16 * m + state_row(i);
    if (user >= share.users) return;
    const int64_t row = split * args.users + share.first_user + user;
    store(args.partial + row * D + first_s + 8 * n + state_column(i), total[m][n][i]);
  });
}

// Hidden units and s of a block that makes the gradient of w2: it has them in registers for a
// panel.
template <int D, int P>
constexpr int kW2Slice = D < (P == 3 ? 64 : 128) ? 32 : 16;
template <int D, int P>
constexpr int kW2Sources = P == 3 && D == 128 ? 64 : D;

// partial[split, (s, t), h] = sum over users of source[b, s] dT[b, t, h]. Each warp makes some t.
template <int D, int P, int U>
MIMNET_FAST_KERNEL(kThreads, 1)
bridge_tensor_w2_grad(TensorLaunch args) {
  constexpr int S = kW2Slice<D, P>, kTargets = kPanel / kWarps, kSources = kW2Sources<D, P>;
  Arena arena(shared_memory());
  const Memory<D, P, U, S> memory(arena);
  const int64_t split = block_index() % args.splits, panel = block_index() / args.splits;
  const int first_t = int(panel % (D / kPanel)) * kPanel;
  const int first_s = int(panel / (D / kPanel) % (D / kSources)) * kSources;
  const int first_h = int(panel / (D / kPanel) / (D / kSources)) * S;
  const int64_t tiles = (args.users + U - 1) / U;
  float total[kTargets][kSources / 16][S / 8][4] = {};
#pragma unroll 1
  for (int64_t tile = tiles * split / args.splits; tile < tiles * (split + 1) / args.splits;
       ++tile) {
    const Share<U> share(tile * U, args.users);
    sync_block();
    load_source(memory, args.source, share);
    make_grad_panel(memory, args, share, first_t, first_h);
    sync_block();
#pragma unroll
    for (int target = 0; target < kTargets; ++target) {
      const int first_row = (warp_index() * kTargets + target) * (U + 1);
#pragma unroll(P == 1 ? U / 16 : 1)
      for (int user = 0; user < U; user += 16) {
        uint32_t b[S / 8][P][2];
#pragma unroll
        for (int n = 0; n < S / 8; n += 2) {
          right_operands<false>(memory.panel, first_row + user, 8 * n, b[n], b[n + 1]);
        }
#pragma unroll
        for (int m = 0; m < kSources / 16; ++m) {
          uint32_t a[P][4];
          memory.source.template fragment<true>(user, first_s + 16 * m, a);
#pragma unroll
          for (int n = 0; n < S / 8; ++n) multiply_add(total[target][m][n], a, b[n]);
        }
      }
    }
  }
#pragma unroll
  for (int target = 0; target < kTargets; ++target) {
    const int t = first_t + warp_index() * kTargets + target;
    for_each_element<kSources / 16, S / 8>([&](int m, int n, int i) {
      const int s = first_s + 16 * m + state_row(i), h = first_h + 8 * n + state_column(i);
      if (h >= args.units) return;
      store(args.partial + ((split * D + s) * D + t) * args.units + h, total[target][m][n][i]);
    });
  }
}

// Rows as float32, for the sums of the parameters.
struct RowCopies {
  static constexpr int kMost = 4;
  View from[kMost];  // none: ones
  Rows to[kMost];    // none: not wanted
  int64_t rows[kMost];
  int columns[kMost];
};

MIMNET_FAST_KERNEL(kThreads, 4) bridge_copy_rows(RowCopies args) {
  for (int n = 0; n < RowCopies::kMost; ++n) {
    if (!args.to[n].data) continue;
    const View& from = args.from[n];
    for (int64_t e = block_index() * kThreads + thread_index(); e < args.rows[n] * args.columns[n];
         e += grid_blocks() * kThreads) {
      const int64_t row = e / args.columns[n];
      const int column = int(e % args.columns[n]);
      save(args.to[n], row, column,
           from ? read(from, row_offset(from, row) + column * from.stride[2]) : 1.0f);
    }
  }
}

float* floats(const Stream& stream, int64_t count) {
  return static_cast<float*>(stream.allocate(stream.owner, 4 * count));
}

View matrix_view(void* data, DType dtype, int64_t stride, int64_t column_stride = 1) {
  View v;
  v.data = data;
  v.dtype = dtype;
  v.dims = 2;
  v.stride[0] = stride;
  v.stride[1] = column_stride;
  return v;
}

View rows_view(const Rows& rows) {
  View v = matrix_view(rows.data, DType::float32, rows.stride);
  v.size[1] = v.stride[2] = 1;
  return v;
}

int64_t tiles_of(int64_t users, int per_tile) { return (users + per_tile - 1) / per_tile; }

// hidden = relu(w1 interests + b1)
template <int P>
void make_hidden(const BridgeLaunch& call, const Rows& hidden, const Stream& stream) {
  const View& w1 = call.weights.w1;
  multiply_rows<P, false>(
      stream,
      {call.interests, w1, call.weights.b1, matrix_view(hidden.data, DType::float32, hidden.stride),
       call.users * call.per_user, 1, int(w1.size[0]), int(w1.size[1])});
}

// f(U) of the blocks that serve a call: few users where there are few, or little shared memory.
template <int D, int P, class F>
void with_users(int64_t users, F f) {
  const DeviceLimits limits = device_limits();
  constexpr int many = kManyUsers<P>;
  if (users >= int64_t(many) * limits.multiprocessors / 4 &&
      Memory<D, P, many>::bytes() <= limits.shared_memory) {
    return f(std::integral_constant<int, many>{});
  }
  f(std::integral_constant<int, kFewUsers>{});
}

// How many blocks share what `blocks` could do alone.
int splits_for(int64_t blocks, int64_t most) {
  return int(
      std::clamp<int64_t>(device_limits().multiprocessors / std::max<int64_t>(1, blocks), 1, most));
}

TensorLaunch tensor_launch(const BridgeLaunch& call, const Rows& hidden) {
  TensorLaunch args{};
  args.source = call.source;
  args.w2 = call.weights.w2;
  args.hidden = hidden;
  args.users = call.users;
  args.per_user = call.per_user;
  args.units = int(call.weights.w1.size[0]);
  return args;
}

template <int D, int P>
void forward(const BridgeLaunch& call, const Stream& stream) {
  const int64_t units = call.weights.w1.size[0];
  const Rows hidden{floats(stream, call.users * call.per_user * units), units};
  make_hidden<P>(call, hidden, stream);
  TensorLaunch args = tensor_launch(call, hidden);
  args.out = call.out;
  args.shift = {floats(stream, call.users * D), D};
  const View& b2 = call.weights.b2;
  multiply_rows<P, true>(stream, {call.source,
                                  matrix_view(b2.data, b2.dtype, D * b2.stride[0], b2.stride[0]),
                                  {},
                                  matrix_view(args.shift.data, DType::float32, D),
                                  call.users,
                                  1,
                                  D,
                                  D});
  const int64_t groups = (call.per_user + kGroup - 1) / kGroup;
  with_users<D, P>(call.users, [&](auto u) {
    const int64_t blocks = tiles_of(call.users, u) * groups;
    args.splits = splits_for(blocks, D / kPanel);
    launch(bridge_tensor_forward<D, P, u>, blocks * args.splits, kThreads, Memory<D, P, u>::bytes(),
           stream, args);
  });
}

template <int D, int P>
void backward(const BridgeLaunch& call, const BridgeRows& rows, const View& grad_w2,
              const Stream& stream) {
  const int64_t count = call.users * call.per_user;
  const int units = int(call.weights.w1.size[0]);
  const RowCopies copies{{call.source, call.interests, call.grad, {}},
                         {call.rows.source,
                          call.rows.interests,
                          call.rows.grad,
                          {rows.hidden.data + units, rows.hidden.stride}},
                         {call.users, count, count, count},
                         {D, D, D, 1}};
  launch(bridge_copy_rows, std::min<int64_t>(count, 8 * device_limits().multiprocessors), kThreads,
         0, stream, copies);
  make_hidden<P>(call, rows.hidden, stream);
  TensorLaunch args = tensor_launch(call, rows.hidden);
  args.grad = rows.grad;
  PartialSum sums[3];
  int sum_count = 0;
  with_users<D, P>(call.users, [&](auto u) {
    const int64_t bytes = Memory<D, P, u>::bytes(), tiles = tiles_of(call.users, u);
    const int64_t blocks = tiles * tiles_of(units, kSlice) * tiles_of(call.per_user, kGroup);
    args.splits = splits_for(blocks, D / kPanel);
    args.partial = floats(stream, args.splits * count * units);
    sums[sum_count++] = {
        args.partial, args.splits, count, units,
        matrix_view(rows.hidden_grad.data, DType::float32, rows.hidden_grad.stride)};
    launch(bridge_tensor_hidden_grad<D, P, u>, blocks * args.splits, kThreads, bytes, stream, args);
    if (!call.grad_source) return;
    args.splits = splits_for(tiles, D / kPanel);
    args.partial = floats(stream, (args.splits + 1) * call.users * D);
    sums[sum_count++] = {args.partial, args.splits + 1, call.users, D,
                         matrix_view(call.grad_source.data, call.grad_source.dtype, D)};
    launch(bridge_tensor_source_grad<D, P, u>, tiles * args.splits, kThreads, bytes, stream, args);
    const View& b2 = call.weights.b2;
    multiply_rows<P, false>(
        stream, {rows_view(rows.grad),
                 matrix_view(b2.data, b2.dtype, D * b2.stride[0], b2.stride[0]),
                 {},
                 matrix_view(args.partial + args.splits * call.users * D, DType::float32, D),
                 call.users,
                 call.per_user,
                 D,
                 D});
  });
  if (grad_w2) {
    with_users<D, P>(call.users, [&](auto u) {
      constexpr int users = std::min<int>(u, 32);
      const int64_t blocks = D / kPanel * (D / kW2Sources<D, P>)*tiles_of(units, kW2Slice<D, P>);
      args.splits = splits_for(blocks, std::max<int64_t>(1, call.users / (4 * users)));
      args.partial = floats(stream, int64_t(args.splits) * D * D * units);
      sums[sum_count++] = {args.partial, args.splits, D * D, units,
                           matrix_view(grad_w2.data, grad_w2.dtype, units)};
      launch(bridge_tensor_w2_grad<D, P, users>, blocks * args.splits, kThreads,
             Memory<D, P, users, kW2Slice<D, P>>::bytes(), stream, args);
    });
  }
  add_parts(stream, sums, sum_count);
  if (call.grad_interests) {
    multiply_rows<P, true>(stream,
                           {rows_view(rows.hidden_grad),
                            call.weights.w1,
                            {},
                            matrix_view(call.grad_interests.data, call.grad_interests.dtype, D),
                            count,
                            1,
                            D,
                            units});
  }
}

template <int N>
using Number = std::integral_constant<int, N>;

// f(D, P)
template <class F>
auto with_sizes(const BridgeLaunch& args, F f) {
  const auto with_planes = [&](auto d) {
    switch (planes_of(args.source.dtype)) {
      case 1:
        return f(d, Number<1>{});
      case 2:
        return f(d, Number<2>{});
      default:
        return f(d, Number<3>{});
    }
  };
  switch (args.source.size[2]) {
    case 32:
      return with_planes(Number<32>{});
    case 64:
      return with_planes(Number<64>{});
    default:
      return with_planes(Number<128>{});
  }
}

}  // namespace

bool tensor_cores_serve(const BridgeLaunch& args) {
  const int64_t d = args.source.size[2];
  const bool fits = (d == 32 || d == 64 || d == 128) && args.interests.size[2] == d &&
                    (args.grad ? args.grad : args.out).size[2] == d && evenly_spaced(args.source);
  return fits && with_sizes(args, [](auto d, auto p) {
           return Memory<d, p, kFewUsers>::bytes() <= device_limits().shared_memory;
         });
}

void tensor_bridge(const BridgeLaunch& args, const Stream& stream) {
  with_sizes(args, [&](auto d, auto p) { forward<d, p>(args, stream); });
}

void tensor_bridge_backward(const BridgeLaunch& args, const BridgeRows& rows, const View& grad_w2,
                            const Stream& stream) {
  with_sizes(args, [&](auto d, auto p) { backward<d, p>(args, rows, grad_w2, stream); });
}

}  // namespace mimnet_fast::cuda
