// The bridge on tensor cores, for widths 32, 64 and 128.
//
// Two warps serve 8 users, the columns of their products, and a few interests of each at a time;
// each has half of the hidden units at hand. T of one target dimension is the product of w2 in
// shared memory with the source, [hidden units, users]; the hidden units of an interest lie in
// registers in the same places, so that the sums over interests or hidden units that follow need no
// exchange but one at the end. The block shares w2, and blocks share the target dimensions where
// there are few users.
#include <algorithm>

#include "interest_bridge.cuh"
#include "tensor.cuh"

namespace mimnet_fast::cuda {
namespace {

constexpr int kMostThreads = 256;
constexpr int kUsers = 8;  // of a pair of warps
constexpr int kPair = 2;
constexpr int kInterests = 8;       // at a time
constexpr int kTiles = 2;           // of 16 hidden units of a warp, at a time
constexpr int kHalf = 16 * kTiles;  // hidden units of a warp, at a time
constexpr int kSlice = kPair * kHalf;
constexpr int kPanel = 16;       // target dimensions whose outputs are written together
constexpr int kGradStride = 66;  // floats of a target dimension in a panel of gradients

// Target dimensions whose part of w2 is in shared memory at a time: about 64 KB.
template <int D, int P>
constexpr int kGroup = P * D <= 64    ? 8
                       : P * D <= 128 ? 4
                       : P * D <= 192 ? 2
                                      : 1;

struct TensorLaunch {
  BridgeLaunch call;
  int slices;          // of hidden units that have their own blocks
  int splits;          // of target dimensions, likewise
  Rows hidden_grad;    // [(B, K), H] for every split
  float* source_grad;  // [B, D_s] for every split, or null: straight to its view
};

// What a warp works on.
struct Place {
  int64_t first_user;
  int users, slice, split;
  int member;  // of the pair

  explicit MIMNET_FAST_DEVICE Place(const TensorLaunch& args) {
    const int warp = thread_index() / kWarp, pairs = block_threads() / kWarp / kPair;
    const int per_block = pairs * kUsers;
    const int64_t tiles = (args.call.users + per_block - 1) / per_block;
    const int rest = int(block_index() / tiles);
    split = rest % args.splits;
    slice = rest / args.splits;
    first_user = block_index() % tiles * per_block + warp / kPair * kUsers;
    member = warp % kPair;
    const int64_t left = args.call.users - first_user;
    users = left < 0 ? 0 : left < kUsers ? int(left) : kUsers;
  }
  template <int D>
  MIMNET_FAST_DEVICE int first_panel(const TensorLaunch& args, int of_split) const {
    return D / kPanel * of_split / args.splits;
  }
};

MIMNET_FAST_DEVICE int lane_index() { return thread_index() % kWarp; }
// The column of the lane in a right operand.
MIMNET_FAST_DEVICE int operand_column() { return lane_index() / 4; }

// [16, 8] as the right operand of a product, from get(row) in the lane's column.
template <int P, class Get>
MIMNET_FAST_DEVICE void make_operand(uint32_t (&b)[P][2], Get get) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + lane_index() % 4 * 2;
    uint32_t pair[P];
    split(get(row), get(row + 1), pair);
#pragma unroll
    for (int p = 0; p < P; ++p) b[p][half] = pair[p];
  }
}

// The rows of the user in the lane's column of a right operand, 0 where there is no such row.
template <int P>
class UserRows {
 public:
  MIMNET_FAST_DEVICE UserRows(const View& v, const Place& place, int rows)
      : view_(v), rows_(operand_column() < place.users ? rows : 0) {
    const int64_t first = (place.first_user + operand_column()) * rows;
    data_ = static_cast<const Stored<P>*>(v.data) + (rows_ > 0 ? row_offset(v, first) : 0);
  }
  MIMNET_FAST_DEVICE float operator()(int row, int column) const {
    return row < rows_ ? widen(load(data_ + row * view_.stride[1] + column * view_.stride[2]))
                       : 0.0f;
  }

 private:
  const View& view_;  // of the kernel's arguments, which takes no register
  const Stored<P>* data_;
  int rows_;
};

template <int D, int P>
struct TensorMemory {
  Planes<P> w1;   // [kSlice, D], in the same place as w2
  Planes<P> w2;   // [(kGroup, D), kSlice]
  Planes<P> b2;   // [D, kPanel]
  float* panels;  // of the warps

  MIMNET_FAST_INLINE TensorMemory(Arena& arena, int warps, int panel_floats)
      : w1([&] {
          Arena same_place = arena;
          return Planes<P>(same_place, kSlice, D);
        }()),
        w2(arena, kGroup<D, P> * D, kSlice),
        b2(arena, D, kPanel),
        panels(arena.floats(int64_t(warps) * panel_floats)) {
    static_assert(kGroup<D, P> * D * (2 * kSlice + 16) >= kSlice * (2 * D + 16));
  }
};

// Up to sixteen bytes of elements that lie `stride` elements apart, then zeros.
template <int P>
MIMNET_FAST_DEVICE Pack gather_some(const View& v, int64_t offset, int64_t stride, int count) {
  Pack pack{};
#pragma unroll
  for (int n = 0; n < Planes<P>::kPack; ++n) {
    if (n >= count) continue;
    if constexpr (P == 3) {
      pack.words[n] = load(static_cast<const uint32_t*>(v.data) + offset + n * stride);
    } else {
      const uint16_t bits = load(static_cast<const uint16_t*>(v.data) + offset + n * stride);
      pack.words[n / 2] |= uint32_t(bits) << (n % 2 * 16);
    }
  }
  return pack;
}

// planes[(g, s), h] = w2[(s, first_t + g), first_h + h], by the whole block
template <int D, int P>
MIMNET_FAST_DEVICE void load_w2(const Planes<P>& planes, const View& w2, int first_t, int first_h) {
  constexpr int kPack = Planes<P>::kPack, per_row = kSlice / kPack;
  const int units = int(w2.size[1]) - first_h;
  const bool packed = w2.stride[1] == 1 && w2.stride[0] % kPack == 0 && aligned(w2, first_h);
#pragma unroll 4
  for (int p = thread_index(); p < kGroup<D, P> * D * per_row; p += block_threads()) {
    const int row = p / per_row, h = p % per_row * kPack;
    const int64_t offset =
        (int64_t(row % D) * D + first_t + row / D) * w2.stride[0] + (first_h + h) * w2.stride[1];
    planes.put(row, h,
               packed && h + kPack <= units
                   ? load_pack(static_cast<const Stored<P>*>(w2.data) + offset)
                   : gather_some<P>(w2, offset, w2.stride[1], units - h));
  }
}

// planes[s, t] = b2[s, first_t + t], by the whole block
template <int D, int P>
MIMNET_FAST_DEVICE void load_b2(const Planes<P>& planes, const View& b2, int first_t) {
  const int64_t step = b2.stride[0];
  load_planes(planes, b2, first_t * step, D, D, kPanel, D * step, step, thread_index(),
              block_threads());
}

// hidden[k] = relu(w1 interests[first_k + k] + b1) of the warp's half of the slice at first_h
template <int D, int P>
MIMNET_FAST_DEVICE void make_hidden(float (&hidden)[kInterests][kTiles][4],
                                    const TensorLaunch& args, const Place& place,
                                    const Planes<P>& w1, const UserRows<P>& interests, int first_k,
                                    int first_h) {
  const BridgeWeights& weights = args.call.weights;
  const int units = int(weights.w1.size[0]) - first_h;
  sync_block();
  load_planes(w1, weights.w1, first_h * weights.w1.stride[0], units < kSlice ? units : kSlice,
              kSlice, D, weights.w1.stride[0], weights.w1.stride[1], thread_index(),
              block_threads());
  sync_block();
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int h = place.member * kHalf + 16 * m + state_row(i);
      const float bias = h < units ? read(weights.b1, (first_h + h) * weights.b1.stride[0]) : 0.0f;
#pragma unroll
      for (int k = 0; k < kInterests; ++k) hidden[k][m][i] = bias;
    }
  }
#pragma unroll 1
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[kTiles][P][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      w1.template fragment<false>(place.member * kHalf + 16 * m, 16 * step, a[m]);
    }
#pragma unroll
    for (int k = 0; k < kInterests; ++k) {
      uint32_t b[P][2];
      make_operand(b, [&](int i) { return interests(first_k + k, 16 * step + i); });
#pragma unroll
      for (int m = 0; m < kTiles; ++m) multiply_add(hidden[k][m], a[m], b);
    }
  }
#pragma unroll
  for (int k = 0; k < kInterests; ++k) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) hidden[k][m][i] = maximum(hidden[k][m][i], 0.0f);
    }
  }
}

template <int D, int P>
MIMNET_FAST_DEVICE void load_source(uint32_t (&source)[D / 16][1][P][2], const TensorLaunch& args,
                                    const Place& place) {
  const UserRows<P> row(args.call.source, place, 1);
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    make_operand(source[step][0], [&](int s) { return row(0, 16 * step + s); });
  }
}

// The warp's half of T, from w2 of a target dimension at `row`: independent sums side by side
template <int D, int P>
MIMNET_FAST_DEVICE void contract(float (&t)[kTiles][1][4], const Planes<P>& w2, int row, int column,
                                 const uint32_t (&source)[D / 16][1][P][2]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) t[m][0][i] = 0;
  }
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      uint32_t a[P][4];
      w2.template fragment<true>(row + 16 * step, column + 16 * m, a);
      multiply_add(t[m][0], a, source[step][0]);
    }
  }
}

// Eight sums over the lanes that hold the same columns. Halving what is left at each exchange, the
// lane ends with the sum of number lane / 4, for its two columns.
MIMNET_FAST_DEVICE void sum_and_scatter(float (&x)[2 * kInterests]) {
#pragma unroll
  for (int step = 0; step < 3; ++step) {
    const int half = kInterests >> step, mask = 2 * half;
    const bool upper = lane_index() & mask;
#pragma unroll
    for (int n = 0; n < kInterests; ++n) {
      if (n >= half) continue;
      const float kept = upper ? x[n + half] : x[n], sent = upper ? x[n] : x[n + half];
      x[n] = kept + shuffle_xor(sent, mask);
    }
  }
}

// Gradients of the output in a panel of the warp, [t, k, user]

template <int P>
MIMNET_FAST_DEVICE void load_grad(float* panel, const UserRows<P>& grad, int first_t, int first_k) {
  constexpr int each = kPanel / 4;
  const int t = lane_index() % 4 * each;
  sync_warp();
#pragma unroll 2
  for (int k = 0; k < kInterests; ++k) {
#pragma unroll
    for (int n = 0; n < each; ++n) {
      panel[(t + n) * kGradStride + k * kUsers + operand_column()] =
          grad(first_k + k, first_t + t + n);
    }
  }
  sync_warp();
}

struct alignas(8) Pair {
  float of_column[2];
};
// For the two columns of the lane.
MIMNET_FAST_DEVICE Pair grad_pair(const float* panel, int t, int k) {
  return *reinterpret_cast<const Pair*>(panel + t * kGradStride + k * kUsers + state_column(0));
}

template <int D, int P>
MIMNET_FAST_KERNEL(kMostThreads, 1)
bridge_tensor_forward(TensorLaunch args) {
  const BridgeLaunch& call = args.call;
  Arena arena(shared_memory());
  constexpr int rows = kUsers * kInterests;
  const TensorMemory<D, P> memory(arena, block_threads() / kWarp, rows * (kPanel + 1));
  const int warp = thread_index() / kWarp;
  const Tile out{memory.panels, kPanel + 1};  // [(warp, user, k), t]
  const Place place(args);
  const UserRows<P> interests(call.interests, place, call.per_user);
  const int hidden_units = int(call.weights.w1.size[0]);
  const bool once = call.per_user <= kInterests && hidden_units <= kSlice;
  uint32_t source[D / 16][1][P][2];
  load_source<D, P>(source, args, place);
  float hidden[kInterests][kTiles][4];
  if (once) make_hidden<D>(hidden, args, place, memory.w1, interests, 0, 0);
  const int first_panel = place.first_panel<D>(args, place.split);
  const int last_panel = place.first_panel<D>(args, place.split + 1);
#pragma unroll 1
  for (int first_t = first_panel * kPanel; first_t < last_panel * kPanel; first_t += kPanel) {
    sync_block();
    load_b2<D>(memory.b2, call.weights.b2, first_t);
    sync_block();
    float shift[1][1][4] = {};  // [t, user]
    multiply<true>(shift, memory.b2, 0, 0, source);
#pragma unroll 1
    for (int first_k = 0; first_k < call.per_user; first_k += kInterests) {
#pragma unroll 1
      for (int first_h = 0; first_h < hidden_units; first_h += kSlice) {
        if (!once) make_hidden<D>(hidden, args, place, memory.w1, interests, first_k, first_h);
#pragma unroll 1
        for (int t = 0; t < kPanel; ++t) {
          if (t % kGroup<D, P> == 0) {
            sync_block();
            load_w2<D>(memory.w2, call.weights.w2, first_t + t, first_h);
            sync_block();
          }
          float contracted[kTiles][1][4];
          contract<D>(contracted, memory.w2, t % kGroup<D, P> * D, place.member * kHalf, source);
          float sum[2 * kInterests] = {};
#pragma unroll
          for (int k = 0; k < kInterests; ++k) {
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                sum[2 * k + i % 2] += hidden[k][m][i] * contracted[m][0][i];
              }
            }
          }
          sum_and_scatter(sum);
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            const float of_half = t < 8 ? shift[0][0][column] : shift[0][0][2 + column];
            const float of_user = shuffle(of_half, t % 8 * 4 + lane_index() % 4);
            const int row = (state_column(0) + column) * kInterests + lane_index() / 4;
            float& to = out(warp * rows + row, t);
            to = sum[column] + (first_h > 0 ? to : place.member == 0 ? of_user : 0.0f);
          }
        }
      }
      sync_block();
      for (int e = place.member * kWarp + lane_index(); e < rows * kPanel; e += kPair * kWarp) {
        const int t = e % kPanel, r = e / kPanel, k = r % kInterests, user = r / kInterests;
        if (user >= place.users || first_k + k >= call.per_user) continue;
        const int64_t row = (place.first_user + user) * call.per_user + first_k + k;
        const int first_row = warp / kPair * kPair * rows + r;
        write(call.out, row * D + first_t + t, out(first_row, t) + out(first_row + rows, t));
      }
    }
  }
}

// Leaves the rows that the gradients of the parameters are made of, and those of hidden_grad for
// the target dimensions of the block.
template <int D, int P>
MIMNET_FAST_KERNEL(kMostThreads, 1)
bridge_tensor_hidden_grad(TensorLaunch args) {
  const BridgeLaunch& call = args.call;
  Arena arena(shared_memory());
  const TensorMemory<D, P> memory(arena, block_threads() / kWarp, kPanel * kGradStride);
  float* panel = memory.panels + thread_index() / kWarp * kPanel * kGradStride;
  const Place place(args);
  const UserRows<P> interests(call.interests, place, call.per_user);
  const UserRows<P> grad_rows(call.grad, place, call.per_user);
  const int units = int(call.weights.w1.size[0]), first_h = place.slice * kSlice;
  const int first_panel = place.first_panel<D>(args, place.split);
  const int last_panel = place.first_panel<D>(args, place.split + 1);
  uint32_t source[D / 16][1][P][2];
  load_source<D, P>(source, args, place);
#pragma unroll 1
  for (int first_k = 0; first_k < call.per_user; first_k += kInterests) {
    float state[kInterests][kTiles][4];  // hidden units, then their gradients
    make_hidden<D>(state, args, place, memory.w1, interests, first_k, first_h);
    uint32_t alive[kInterests * kTiles / 8] = {};  // a bit for each
    const auto visit = [&](auto f) {               // f(element, bit, row, h) for those that exist
#pragma unroll
      for (int k = 0; k < kInterests; ++k) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int h = first_h + place.member * kHalf + 16 * m + state_row(i);
            const int user = state_column(i);
            if (user < place.users && first_k + k < call.per_user && h < units) {
              f(state[k][m][i], (k * kTiles + m) * 4 + i,
                (place.first_user + user) * call.per_user + first_k + k, h);
            }
          }
        }
      }
    };
    visit([&](float& hidden, int bit, int64_t row, int h) {
      if (place.split == 0) save(call.rows.hidden, row, h, hidden);
      if (hidden > 0) alive[bit / 32] |= 1u << bit % 32;
    });
#pragma unroll
    for (int k = 0; k < kInterests; ++k) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state[k][m][i] = 0;
      }
    }
#pragma unroll 1
    for (int first_t = first_panel * kPanel; first_t < last_panel * kPanel; first_t += kPanel) {
      load_grad(panel, grad_rows, first_t, first_k);
#pragma unroll 1
      for (int t = 0; t < kPanel; ++t) {
        if (t % kGroup<D, P> == 0) {
          sync_block();
          load_w2<D>(memory.w2, call.weights.w2, first_t + t, first_h);
          sync_block();
        }
        float contracted[kTiles][1][4];
        contract<D>(contracted, memory.w2, t % kGroup<D, P> * D, place.member * kHalf, source);
#pragma unroll
        for (int k = 0; k < kInterests; ++k) {
          const Pair grad = grad_pair(panel, t, k);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              state[k][m][i] += contracted[m][0][i] * grad.of_column[i % 2];
            }
          }
        }
      }
    }
    visit([&](float& grad, int bit, int64_t row, int h) {
      const int64_t of_split = place.split * call.users * call.per_user;
      save(args.hidden_grad, of_split + row, h, alive[bit / 32] >> bit % 32 & 1 ? grad : 0.0f);
    });
  }
  if (place.slice > 0 || place.split > 0 || place.member > 0) return;
  const int user = operand_column();
  if (user >= place.users) return;
  const UserRows<P> source_row(call.source, place, 1);
  for (int j = lane_index() % 4; j < D; j += 4) {
    save(call.rows.source, place.first_user + user, j, source_row(0, j));
  }
  for (int k = 0; k < call.per_user; ++k) {
    const int64_t row = (place.first_user + user) * call.per_user + k;
    for (int j = lane_index() % 4; j < D; j += 4) {
      save(call.rows.interests, row, j, interests(k, j));
      save(call.rows.grad, row, j, grad_rows(k, j));
    }
    if (lane_index() % 4 == 0) save(call.rows.hidden, row, units, 1);
  }
}

template <int D, int P>
MIMNET_FAST_KERNEL(kMostThreads, 1)
bridge_tensor_source_grad(TensorLaunch args) {
  constexpr int Q = kStatePlanes<P>;
  const BridgeLaunch& call = args.call;
  Arena arena(shared_memory());
  const TensorMemory<D, P> memory(arena, block_threads() / kWarp, kPanel * kGradStride);
  float* panel = memory.panels + thread_index() / kWarp * kPanel * kGradStride;
  const Place place(args);
  const UserRows<P> interests(call.interests, place, call.per_user);
  const UserRows<P> grad_rows(call.grad, place, call.per_user);
  const int units = int(call.weights.w1.size[0]);
  const int first_panel = place.first_panel<D>(args, place.split);
  const int last_panel = place.first_panel<D>(args, place.split + 1);
  float total[D / 16][1][4] = {};  // [s, user]
#pragma unroll 1
  for (int first_k = 0; first_k < call.per_user; first_k += kInterests) {
#pragma unroll 1
    for (int first_h = 0; first_h < units; first_h += kSlice) {
      float hidden[kInterests][kTiles][4];
      make_hidden<D>(hidden, args, place, memory.w1, interests, first_k, first_h);
#pragma unroll 1
      for (int first_t = first_panel * kPanel; first_t < last_panel * kPanel; first_t += kPanel) {
        load_grad(panel, grad_rows, first_t, first_k);
        if (first_h == 0) {
          sync_block();
          load_b2<D>(memory.b2, call.weights.b2, first_t);
          sync_block();
          uint32_t grad_sum[1][1][Q][2];
          make_operand(grad_sum[0][0], [&](int t) {
            float sum = 0;
#pragma unroll
            for (int k = 0; k < kInterests; ++k) {
              sum += panel[t * kGradStride + k * kUsers + operand_column()];
            }
            return sum;
          });
          if (place.member == 0) multiply<false>(total, memory.b2, 0, 0, grad_sum);
        }
#pragma unroll 1
        for (int t = 0; t < kPanel; ++t) {
          if (t % kGroup<D, P> == 0) {
            sync_block();
            load_w2<D>(memory.w2, call.weights.w2, first_t + t, first_h);
            sync_block();
          }
          float contracted_grad[kTiles][1][4] = {};
#pragma unroll
          for (int k = 0; k < kInterests; ++k) {
            const Pair grad = grad_pair(panel, t, k);
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                contracted_grad[m][0][i] += hidden[k][m][i] * grad.of_column[i % 2];
              }
            }
          }
          uint32_t operand[kTiles][1][Q][2];
          as_operand(contracted_grad, operand);
          multiply<false>(total, memory.w2, t % kGroup<D, P> * D, place.member * kHalf, operand);
        }
      }
    }
  }
  // The pair's sum
  static_assert(kUsers * D <= kPanel * kGradStride);
  sync_warp();
  if (place.member > 0) {
    for_each_element<D / 16, 1>([&](int m, int n, int i) {
      panel[state_column(i) * D + 16 * m + state_row(i)] = total[m][n][i];
    });
  }
  sync_block();
  if (place.member > 0) return;
  const float* other = panel + kPanel * kGradStride;
  for_each_element<D / 16, 1>([&](int m, int n, int i) {
    const int s = 16 * m + state_row(i), user = state_column(i);
    if (user >= place.users) return;
    const float value = total[m][n][i] + other[user * D + s];
    const int64_t to = (place.first_user + user) * D + s;
    if (args.source_grad) {
      store(args.source_grad + place.split * call.users * D + to, value);
    } else {
      write(call.grad_source, to, value);
    }
  });
}

struct InterestsGradLaunch {
  View w1, out;
  Rows hidden_grad;
  int64_t rows;
};

// A warp takes 8 rows of hidden_grad as the columns of its product.
template <int D, int P>
MIMNET_FAST_KERNEL(kMostThreads, 1)
bridge_tensor_interests_grad(InterestsGradLaunch args) {
  constexpr int Q = kStatePlanes<P>;
  Arena arena(shared_memory());
  const Planes<P> w1(arena, kHalf, D);
  const int units = int(args.w1.size[0]);
  const int64_t per_block = kMostThreads / kWarp * kUsers;
  const int warp_row = thread_index() / kWarp * kUsers;
#pragma unroll 1
  for (int64_t block_row = block_index() * per_block; block_row < args.rows;
       block_row += grid_blocks() * per_block) {
    const int64_t row = block_row + warp_row + operand_column();
    const float* grad = args.hidden_grad.data + row * args.hidden_grad.stride;
    float total[D / 16][1][4] = {};  // [i, row]
#pragma unroll 1
    for (int first_h = 0; first_h < units; first_h += kHalf) {
      const int left = units - first_h;
      sync_block();
      load_planes(w1, args.w1, first_h * args.w1.stride[0], left < kHalf ? left : kHalf, kHalf, D,
                  args.w1.stride[0], args.w1.stride[1], thread_index(), kMostThreads);
      sync_block();
      uint32_t operand[kTiles][1][Q][2];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        make_operand(operand[m][0], [&](int h) {
          return row < args.rows && 16 * m + h < left ? load(grad + first_h + 16 * m + h) : 0.0f;
        });
      }
      multiply<true>(total, w1, 0, 0, operand);
    }
#pragma unroll
    for (int m = 0; m < D / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t to = block_row + warp_row + state_column(i);
        if (to < args.rows) write(args.out, to * D + 16 * m + state_row(i), total[m][0][i]);
      }
    }
  }
}

struct W2GradLaunch {
  View source;
  Rows hidden, grad;
  int64_t users;
  int per_user, units, parts;
  float* partial;  // [parts, (s, t), h], or null: straight to out
  View out;
};

// Hidden units of a block, as many as leave room for the sums of all s in registers.
template <int D>
constexpr int kW2Tiles = D == 32 ? 4 : 2;
constexpr int kW2Users = 16;  // at a time: the depth of a product
constexpr int kW2Targets = kMostThreads / kWarp;

// grad_w2[s, t, h] = sum over users of source[s] dT[t, h] with dT[t, h] = sum over k of grad[k, t]
// hidden[k, h]. A warp makes one t, and what it has of dT, [hidden units, users], already is the
// right operand.
template <int D, int P>
MIMNET_FAST_KERNEL(kMostThreads, 1)
bridge_tensor_w2_grad(W2GradLaunch args) {
  constexpr int Q = kStatePlanes<P>, tiles = kW2Tiles<D>, slice = 16 * tiles;
  constexpr int hidden_stride = slice + 4;  // the lanes of a warp meet different banks
  Arena arena(shared_memory());
  const Planes<P> source(arena, kW2Users, D);
  float* hidden = arena.floats(kInterests * kW2Users * hidden_stride);  // [k, user, h]
  float* grad = arena.floats(kW2Targets * kInterests * kW2Users);       // [t, k, user]
  const int64_t part = block_index() % args.parts, unit = block_index() / args.parts;
  const int first_t = int(unit % (D / kW2Targets)) * kW2Targets;
  const int first_h = int(unit / (D / kW2Targets)) * slice, units = args.units - first_h;
  const int target = thread_index() / kWarp;
  const int64_t groups = (args.users + kW2Users - 1) / kW2Users;
  const int64_t begin = groups * part / args.parts * kW2Users;
  const int64_t end = groups * (part + 1) / args.parts * kW2Users;
  float total[D / 16][2 * tiles][4] = {};  // [s, h]
#pragma unroll 1
  for (int64_t first_user = begin; first_user < end; first_user += kW2Users) {
    const int users = args.users - first_user < kW2Users ? int(args.users - first_user) : kW2Users;
    float contracted_grad[tiles][2][4] = {};  // [h, user]
#pragma unroll 1
    for (int first_k = 0; first_k < args.per_user; first_k += kInterests) {
      sync_block();
      if (first_k == 0) {
        load_planes(source, args.source, row_offset(args.source, first_user), users, kW2Users, D,
                    spacing(args.source), args.source.stride[2], thread_index(), kMostThreads);
      }
      const auto load_row = [&](const Rows& rows, int k, int user, int column, bool exists) {
        const int64_t row = (first_user + user) * args.per_user + first_k + k;
        return exists && user < users && first_k + k < args.per_user
                   ? load(rows.data + row * rows.stride + column)
                   : 0.0f;
      };
#pragma unroll 4
      for (int e = thread_index(); e < kInterests * kW2Users * slice; e += kMostThreads) {
        const int h = e % slice, k = e / slice % kInterests, user = e / slice / kInterests;
        hidden[(k * kW2Users + user) * hidden_stride + h] =
            load_row(args.hidden, k, user, first_h + h, h < units);
      }
#pragma unroll
      for (int e = thread_index(); e < kW2Targets * kInterests * kW2Users; e += kMostThreads) {
        const int t = e % kW2Targets, k = e / kW2Targets % kInterests;
        const int user = e / kW2Targets / kInterests;
        grad[(t * kInterests + k) * kW2Users + user] =
            load_row(args.grad, k, user, first_t + t, true);
      }
      sync_block();
#pragma unroll 1
      for (int k = 0; k < kInterests; ++k) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int user = 8 * n + state_column(0);
          const Pair g =
              *reinterpret_cast<const Pair*>(grad + (target * kInterests + k) * kW2Users + user);
#pragma unroll
          for (int m = 0; m < tiles; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              contracted_grad[m][n][i] +=
                  g.of_column[i % 2] *
                  hidden[(k * kW2Users + user + i % 2) * hidden_stride + 16 * m + state_row(i)];
            }
          }
        }
      }
    }
    uint32_t operand[2 * tiles][Q][2];
#pragma unroll
    for (int n = 0; n < 2 * tiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&from)[4] = contracted_grad[n / 2][half];
        uint32_t pair[Q];
        split(from[n % 2 * 2], from[n % 2 * 2 + 1], pair);
#pragma unroll
        for (int q = 0; q < Q; ++q) operand[n][q][half] = pair[q];
      }
    }
#pragma unroll
    for (int m = 0; m < D / 16; ++m) {
      uint32_t a[P][4];
      source.template fragment<true>(0, 16 * m, a);
#pragma unroll
      for (int n = 0; n < 2 * tiles; ++n) multiply_add(total[m][n], a, operand[n]);
    }
  }
#pragma unroll
  for (int m = 0; m < D / 16; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int s = 16 * m + state_row(i), h = 8 * n + state_column(i);
        if (h >= units) continue;
        const int64_t to = (int64_t(s) * D + first_t + target) * args.units + first_h + h;
        if (args.partial) {
          store(args.partial + part * D * D * args.units + to, total[m][n][i]);
        } else {
          write(args.out, to, total[m][n][i]);
        }
      }
    }
  }
}

// How the work of a call is shared out among blocks.
template <int D, int P>
class Shares {
 public:
  Shares(const TensorLaunch& args, int panel_floats)
      : limits_(device_limits()), panel_floats_(panel_floats) {
    warps_ = kMostThreads / kWarp;
    const auto is_short = [&] {
      return tiles(args) * args.slices * (D / kPanel) < limits_.multiprocessors;
    };
    if (is_short() || shared_memory() > limits_.shared_memory) warps_ /= 2;
    splits_ = int(std::clamp<int64_t>(
        limits_.multiprocessors / std::max<int64_t>(1, tiles(args) * args.slices), 1, D / kPanel));
  }
  int splits() const { return splits_; }

  void run(void (*kernel)(TensorLaunch), const TensorLaunch& args, const Stream& stream) const {
    launch(kernel, tiles(args) * args.slices * args.splits, warps_ * kWarp, shared_memory(), stream,
           args);
  }

 private:
  int64_t tiles(const TensorLaunch& args) const {
    const int users = warps_ / kPair * kUsers;
    return (args.call.users + users - 1) / users;
  }
  int64_t shared_memory() const {
    Arena arena(nullptr);
    TensorMemory<D, P>(arena, warps_, panel_floats_);
    return arena.bytes();
  }

  DeviceLimits limits_;
  int panel_floats_, warps_, splits_;
};

template <int D, int P>
void forward(const BridgeLaunch& call, const Stream& stream) {
  TensorLaunch args{call, 1, 1, {}, nullptr};
  const Shares<D, P> shares(args, kUsers * kInterests * (kPanel + 1));
  args.splits = shares.splits();
  shares.run(bridge_tensor_forward<D, P>, args, stream);
}

float* floats(const Stream& stream, int64_t count) {
  return static_cast<float*>(stream.allocate(stream.owner, 4 * count));
}

View rows_view(const Rows& rows, int64_t columns) {
  View v;
  v.data = rows.data;
  v.dims = 2;
  v.stride[0] = rows.stride;
  v.stride[1] = 1;
  v.size[1] = columns;
  return v;
}

View as_matrix(View v, int64_t columns) {
  v.dims = 2;
  v.stride[0] = columns;
  v.stride[1] = 1;
  return v;
}

template <int D, int P>
void backward(const BridgeLaunch& call, const BridgeRows& rows, const View& grad_w2,
              const Stream& stream) {
  const int64_t count = call.users * call.per_user;
  const int units = int(call.weights.w1.size[0]);
  PartialSum sums[3];
  int sum_count = 0;
  {
    TensorLaunch args{call, (units + kSlice - 1) / kSlice, 1, rows.hidden_grad, nullptr};
    const Shares<D, P> shares(args, kPanel * kGradStride);
    args.splits = shares.splits();
    if (args.splits > 1) {
      args.hidden_grad = {floats(stream, args.splits * count * units), units};
      sums[sum_count++] = {args.hidden_grad.data, args.splits, count, units,
                           rows_view(rows.hidden_grad, units)};
    }
    shares.run(bridge_tensor_hidden_grad<D, P>, args, stream);
  }
  if (call.grad_source) {
    TensorLaunch args{call, 1, 1, {}, nullptr};
    const Shares<D, P> shares(args, kPanel * kGradStride);
    args.splits = shares.splits();
    if (args.splits > 1) {
      args.source_grad = floats(stream, args.splits * call.users * D);
      sums[sum_count++] = {args.source_grad, args.splits, call.users, D,
                           as_matrix(call.grad_source, D)};
    }
    shares.run(bridge_tensor_source_grad<D, P>, args, stream);
  }
  const int multiprocessors = device_limits().multiprocessors;
  if (grad_w2) {
    constexpr int slice = 16 * kW2Tiles<D>;
    const int blocks = D / kW2Targets * ((units + slice - 1) / slice);
    const int64_t worth_a_part = 4 * kW2Users;
    const int parts = int(std::clamp<int64_t>(
        std::min<int64_t>(2 * multiprocessors / blocks, call.users / worth_a_part), 1, 64));
    W2GradLaunch args{call.source, rows.hidden, rows.grad, call.users, call.per_user,
                      units,       parts,       nullptr,   grad_w2};
    if (parts > 1) {
      args.partial = floats(stream, int64_t(parts) * D * D * units);
      sums[sum_count++] = {args.partial, parts, D * D, units, as_matrix(grad_w2, units)};
    }
    Arena arena(nullptr);
    Planes<P>(arena, kW2Users, D);
    arena.floats(kInterests * kW2Users * (slice + 4));
    arena.floats(kW2Targets * kInterests * kW2Users);
    launch(bridge_tensor_w2_grad<D, P>, int64_t(blocks) * parts, kMostThreads, arena.bytes(),
           stream, args);
  }
  add_parts(stream, sums, sum_count);
  if (call.grad_interests) {
    const InterestsGradLaunch args{call.weights.w1, call.grad_interests, rows.hidden_grad, count};
    Arena arena(nullptr);
    Planes<P>(arena, kHalf, D);
    const int64_t per_block = kMostThreads / kWarp * kUsers;
    launch(bridge_tensor_interests_grad<D, P>,
           std::min<int64_t>((count + per_block - 1) / per_block, 4 * multiprocessors),
           kMostThreads, arena.bytes(), stream, args);
  }
}

template <int N>
using Number = std::integral_constant<int, N>;

// f(D, P)
template <class F>
void with_sizes(const BridgeLaunch& args, F f) {
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
  return (d == 32 || d == 64 || d == 128) && args.interests.size[2] == d &&
         (args.grad ? args.grad : args.out).size[2] == d && evenly_spaced(args.source);
}

void tensor_bridge(const BridgeLaunch& args, const Stream& stream) {
  with_sizes(args, [&](auto d, auto p) { forward<d, p>(args, stream); });
}

void tensor_bridge_backward(const BridgeLaunch& args, const BridgeRows& rows, const View& grad_w2,
                            const Stream& stream) {
  with_sizes(args, [&](auto d, auto p) { backward<d, p>(args, rows, grad_w2, stream); });
}

}  // namespace mimnet_fast::cuda
