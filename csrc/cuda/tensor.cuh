// Matrix products on tensor cores that keep the bits of their operands.
//
// A float is a sum of bfloat16 planes, each the rounded rest of those before it: one plane holds a
// bfloat16, two a float16 and three a float32, exactly. A product of two floats is then a sum of
// products of planes, of which only those above the operands' own rounding are computed.
//
// The left operand is static (a history or a weight) and lies as planes in shared memory. The right
// one is the state of a warp, transposed, [features or positions, capsules or users]: it stays in
// registers, and the result of one product becomes the operand of the next without shared memory.
#pragma once

#include <intrinsics.cuh>

#include <type_traits>

#include "block.cuh"

namespace mimnet_fast::cuda {

// Planes of state against a static operand of P planes.
template <int P>
constexpr int kStatePlanes = P == 3 ? 3 : 2;

// A storage type and the planes that hold all of its values.
template <int P>
using Stored = std::conditional_t<P == 1, BFloat16, std::conditional_t<P == 2, Float16, float>>;
inline int planes_of(DType dtype) {
  return dtype == DType::bfloat16 ? 1 : dtype == DType::float16 ? 2 : 3;
}

template <int N>
struct alignas(4 * N) Words {
  uint32_t word[N];
};

// The planes of two floats, side by side.
template <int N>
MIMNET_FAST_DEVICE void split(float low, float high, uint32_t (&planes)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    planes[n] = narrow_pair(low, high);
    low -= bits_as_float(planes[n] << 16);
    high -= bits_as_float(planes[n] & 0xffff0000u);
  }
}

// A static matrix in shared memory, its sides multiples of 16. The planes of a row follow one
// another; then come 16 bytes, so that eight rows lie in different banks. With the number of
// columns known when the kernel is compiled, every fragment is a constant away from one address of
// the lane, which saves many registers.
template <int P, int kColumns = 0>
class Planes {
 public:
  // Values that are loaded together, 16 bytes of the storage type.
  static constexpr int kPack = P == 3 ? 4 : 8;

  MIMNET_FAST_INLINE Planes(Arena& arena, int rows, int columns)
      : columns_(columns),
        data_(reinterpret_cast<char*>(arena.floats(int64_t(rows) * row_bytes() / 4))) {}

  // Puts kPack neighbours in their storage type.
  MIMNET_FAST_DEVICE void put(int row, int column, const Pack& pack) const {
    Words<kPack / 2> planes[P];
#pragma unroll
    for (int i = 0; i < kPack / 2; ++i) {
      uint32_t pair[P];
      if constexpr (P == 1) {
        pair[0] = pack.words[i];
      } else if constexpr (P == 2) {
        const uint32_t word = pack.words[i];
        split(widen(Float16{uint16_t(word)}), widen(Float16{uint16_t(word >> 16)}), pair);
      } else {
        split(bits_as_float(pack.words[2 * i]), bits_as_float(pack.words[2 * i + 1]), pair);
      }
#pragma unroll
      for (int p = 0; p < P; ++p) planes[p].word[i] = pair[p];
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
      *reinterpret_cast<Words<kPack / 2>*>(at(p, row, column)) = planes[p];
    }
  }

  // Puts a value and its right neighbour; the column is even.
  MIMNET_FAST_DEVICE void put(int row, int column, float left, float right) const {
    uint32_t pair[P];
    split(left, right, pair);
#pragma unroll
    for (int p = 0; p < P; ++p) *reinterpret_cast<uint32_t*>(at(p, row, column)) = pair[p];
  }

  // The [16, 16] at (row, column), or its transpose, as the left operand of a product. Its rows are
  // `step` rows apart.
  template <bool kTransposed>
  MIMNET_FAST_DEVICE void fragment(int row, int column, uint32_t (&a)[P][4], int step = 1) const {
    const int lane = thread_index() % kWarp;
    const int second = lane / 8 % 2 * 8, third = lane / 16 * 8;  // where matrices 1 and 2 start
    const int rows = lane % 8 + (kTransposed ? third : second);
    const int columns = kTransposed ? second : third;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const char* address = at(p, row + rows * step, column + columns);
      kTransposed ? load_matrices_transposed(a[p], address) : load_matrices(a[p], address);
    }
  }

 private:
  MIMNET_FAST_INLINE int row_bytes() const { return 2 * P * columns_ + 16; }
  MIMNET_FAST_DEVICE char* at(int plane, int row, int column) const {
    return data_ + row * row_bytes() + 2 * (plane * columns_ + column);
  }

  Width<kColumns> columns_;
  char* data_;
};

// Sixteen bytes of elements that lie `stride` elements apart.
template <int P>
MIMNET_FAST_DEVICE Pack gather_pack(const View& v, int64_t offset, int64_t stride) {
  Pack pack;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (P == 3) {
      pack.words[w] = load(static_cast<const uint32_t*>(v.data) + offset + w * stride);
    } else {
      const uint16_t* first = static_cast<const uint16_t*>(v.data) + offset + 2 * w * stride;
      pack.words[w] = load(first) | uint32_t(load(first + stride)) << 16;
    }
  }
  return pack;
}

// Fills planes from the matrix [rows, columns] of a view, as read_matrix does, by `threads` threads
// of which the caller is number `thread`. Further rows up to `padded` become 0.
template <int P, int kColumns>
MIMNET_FAST_DEVICE void load_planes(const Planes<P, kColumns>& planes, const View& v,
                                    int64_t offset, int rows, int padded, int columns,
                                    int64_t row_stride, int64_t column_stride, int thread,
                                    int threads) {
  constexpr int kPack = Planes<P>::kPack;
  constexpr int kFlying = 4;  // loads of a thread under way
  const bool packed = column_stride == 1 && row_stride % kPack == 0 && aligned(v, offset);
  const int per_row = columns / kPack, packs = rows * per_row;
  const auto from = [&](int t) {
    return offset + t / per_row * row_stride + t % per_row * kPack * column_stride;
  };
  const auto put = [&](int t, const Pack& pack) {
    planes.put(t / per_row, t % per_row * kPack, pack);
  };
  if (packed) {
    for (int first = thread; first < packs; first += kFlying * threads) {
      Pack pack[kFlying];
#pragma unroll
      for (int n = 0; n < kFlying; ++n) {
        const int t = first + n * threads;
        if (t < packs) {
          pack[n] = load_pack(static_cast<const char*>(v.data) + from(t) * (16 / kPack));
        }
      }
#pragma unroll
      for (int n = 0; n < kFlying; ++n) {
        const int t = first + n * threads;
        if (t < packs) put(t, pack[n]);
      }
    }
  } else {
    for (int t = thread; t < packs; t += threads) put(t, gather_pack<P>(v, from(t), column_stride));
  }
  for (int t = packs + thread; t < padded * per_row; t += threads) put(t, Pack{});
}

// State: [16 M, 8 N] of a warp, as float[M][N][4]. Element i of a lane stands in this place of its
// [16, 8].
MIMNET_FAST_DEVICE int state_row(int i) { return thread_index() % kWarp / 4 + i / 2 * 8; }
MIMNET_FAST_DEVICE int state_column(int i) { return thread_index() % 4 * 2 + i % 2; }

// f(m, n, i) for every element of a lane.
template <int M, int N, class F>
MIMNET_FAST_DEVICE void for_each_element(F f) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f(m, n, i);
    }
  }
}

// Over the rows and over the columns of a [16, 8], when the lane has reduced its own.

MIMNET_FAST_DEVICE float sum_rows(float value) {
  for (int mask = 4; mask < kWarp; mask *= 2) value += shuffle_xor(value, mask);
  return value;
}
MIMNET_FAST_DEVICE float max_rows(float value) {
  for (int mask = 4; mask < kWarp; mask *= 2) value = maximum(value, shuffle_xor(value, mask));
  return value;
}
MIMNET_FAST_DEVICE float sum_columns(float value) {
  for (int mask = 1; mask < 4; mask *= 2) value += shuffle_xor(value, mask);
  return value;
}
MIMNET_FAST_DEVICE float max_columns(float value) {
  for (int mask = 1; mask < 4; mask *= 2) value = maximum(value, shuffle_xor(value, mask));
  return value;
}

// The sums over the rows of x y: dot[n][j] of column j of the lane's two in the eight of n.
template <int M, int N>
MIMNET_FAST_DEVICE void dot_columns(const float (&x)[M][N][4], const float (&y)[M][N][4],
                                    float (&dot)[N][2]) {
#pragma unroll
  for (int n = 0; n < N; ++n) dot[n][0] = dot[n][1] = 0;
  for_each_element<M, N>([&](int m, int n, int i) { dot[n][i % 2] += x[m][n][i] * y[m][n][i]; });
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) dot[n][j] = sum_rows(dot[n][j]);
  }
}

// Multiplies the columns of the lane with factor(n, j).
template <int M, int N, class Factor>
MIMNET_FAST_DEVICE void scale_columns(float (&x)[M][N][4], Factor factor) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float scale[] = {factor(n, 0), factor(n, 1)};
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[m][n][i] *= scale[i % 2];
    }
  }
}

// State as the right operand of a product.
template <int M, int N, int Q>
MIMNET_FAST_DEVICE void as_operand(const float (&state)[M][N][4], uint32_t (&operand)[M][N][Q][2]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t pair[Q];
        split(state[m][n][2 * half], state[m][n][2 * half + 1], pair);
#pragma unroll
        for (int q = 0; q < Q; ++q) operand[m][n][q][half] = transpose_matrix(pair[q]);
      }
    }
  }
}

// c += a b of planes, the small products first. Tensor cores cut off what a sum cannot hold, so
// that errors of many products add up: float32 operands take a sum of their own each time.
template <int P, int Q>
MIMNET_FAST_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[P][4],
                                     const uint32_t (&b)[Q][2]) {
  constexpr int kMost = P > Q ? P : Q;
  float fresh[4] = {};
  float (&sum)[4] = kMost == 3 ? fresh : c;
#pragma unroll
  for (int order = kMost - 1; order >= 0; --order) {
#pragma unroll
    for (int p = 0; p <= order; ++p) {
      if (p < P && order - p < Q) multiply_add(sum, a[p], b[order - p]);
    }
  }
  if (kMost == 3) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += fresh[i];
  }
}

// out[16 M, 8 N] += A b, where A [16 M, 16 K] stands at (row, column) of the planes, or,
// transposed, its transpose [16 K, 16 M] does.
template <bool kTransposed, int M, int N, int K, int P, int Q, int kColumns>
MIMNET_FAST_DEVICE void multiply(float (&out)[M][N][4], const Planes<P, kColumns>& planes, int row,
                                 int column, const uint32_t (&b)[K][N][Q][2]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      uint32_t a[P][4];
      planes.template fragment<kTransposed>(row + 16 * (kTransposed ? k : m),
                                            column + 16 * (kTransposed ? m : k), a);
#pragma unroll
      for (int n = 0; n < N; ++n) multiply_add(out[m][n], a, b[k][n]);
    }
  }
}

// State that waits in shared memory, each value for its own lane: a loop over its rows need not be
// unrolled, which saves registers.
template <int M, int N>
class ParkedState {
 public:
  explicit MIMNET_FAST_INLINE ParkedState(Arena& arena) : data_(arena.floats(4 * M * N * kWarp)) {}

  MIMNET_FAST_DEVICE float& operator()(int m, int n, int i) const {
    return data_[((m * N + n) * 4 + i) * kWarp + thread_index() % kWarp];
  }
  MIMNET_FAST_DEVICE void park(const float (&state)[M][N][4]) const {
    for_each_element<M, N>([&](int m, int n, int i) { (*this)(m, n, i) = state[m][n][i]; });
  }

 private:
  float* data_;
};

// out += A b as above, for parked state b.
template <bool kTransposed, int M, int N, int K, int P, int kColumns>
MIMNET_FAST_DEVICE void multiply(float (&out)[M][N][4], const Planes<P, kColumns>& planes, int row,
                                 int column, const ParkedState<K, N>& state) {
#pragma unroll 1
  for (int k = 0; k < K; ++k) {
    float rows[1][N][4];
    for_each_element<1, N>([&](int, int n, int i) { rows[0][n][i] = state(k, n, i); });
    uint32_t b[1][N][kStatePlanes<P>][2];
    as_operand(rows, b);
    multiply<kTransposed>(out, planes, row + (kTransposed ? 16 * k : 0),
                          column + (kTransposed ? 0 : 16 * k), b);
  }
}

}  // namespace mimnet_fast::cuda
