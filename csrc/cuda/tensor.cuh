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

#include "block.cuh"

namespace mimnet_fast::cuda {

// Planes of state against a static operand of P planes.
template <int P>
constexpr int kStatePlanes = P == 3 ? 3 : 2;

// Planes that hold every value of a storage type.
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

// A static matrix in shared memory, its sides multiples of 16. Rows are 16 bytes further apart than
// they are long, so that eight of them lie in different banks.
template <int P>
class Planes {
 public:
  // Values that are loaded together, 16 bytes of the storage type.
  static constexpr int kPack = P == 3 ? 4 : 8;

  MIMNET_FAST_INLINE Planes(Arena& arena, int rows, int columns)
      : row_bytes_(2 * columns + 16), plane_bytes_(rows * row_bytes_) {
    data_ = reinterpret_cast<char*>(arena.floats(int64_t(P) * plane_bytes_ / 4));
  }

  MIMNET_FAST_DEVICE void put(int row, int column, const float (&x)[kPack]) const {
    Words<kPack / 2> planes[P];
#pragma unroll
    for (int i = 0; i < kPack / 2; ++i) {
      uint32_t pair[P];
      split(x[2 * i], x[2 * i + 1], pair);
#pragma unroll
      for (int p = 0; p < P; ++p) planes[p].word[i] = pair[p];
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
      *reinterpret_cast<Words<kPack / 2>*>(at(p, row, column)) = planes[p];
    }
  }

  // The [16, 16] at (row, column), or its transpose, as the left operand of a product.
  template <bool kTransposed>
  MIMNET_FAST_DEVICE void fragment(int row, int column, uint32_t (&a)[P][4]) const {
    const int lane = thread_index() % kWarp;
    const int second = lane / 8 % 2 * 8, third = lane / 16 * 8;  // where matrices 1 and 2 start
    const int rows = lane % 8 + (kTransposed ? third : second);
    const int columns = kTransposed ? second : third;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const char* address = at(p, row + rows, column + columns);
      kTransposed ? load_matrices_transposed(a[p], address) : load_matrices(a[p], address);
    }
  }

 private:
  MIMNET_FAST_DEVICE char* at(int plane, int row, int column) const {
    return data_ + plane * plane_bytes_ + row * row_bytes_ + 2 * column;
  }

  char* data_;
  int row_bytes_, plane_bytes_;
};

// Fills planes from the matrix [rows, columns] of a view, as read_matrix does, by `threads` threads
// of which the caller is number `thread`. Further rows up to `padded` become 0.
template <int P>
MIMNET_FAST_DEVICE void load_planes(const Planes<P>& planes, const View& v, int64_t offset,
                                    int rows, int padded, int columns, int64_t row_stride,
                                    int64_t column_stride, int thread, int threads) {
  constexpr int kPack = Planes<P>::kPack;
  const bool packed = column_stride == 1 && row_stride % kPack == 0 && aligned(v, offset);
  const int packs = columns / kPack;
#pragma unroll 4
  for (int p = thread; p < padded * packs; p += threads) {
    const int i = p / packs, j = p % packs * kPack;
    const int64_t from = offset + i * row_stride + j * column_stride;
    float x[kPack] = {};
    if (i < rows && packed) {
      read_pack(v, from, [&](int n, float value) {
        if (n < kPack) x[n] = value;
      });
    } else if (i < rows) {
#pragma unroll
      for (int n = 0; n < kPack; ++n) x[n] = read(v, from + n * column_stride);
    }
    planes.put(i, j, x);
  }
}

// State: [16 M, 8 N] of a warp, as float[M][N][4]. Element i of a lane stands in this place of its
// [16, 8].
MIMNET_FAST_DEVICE int state_row(int i) { return thread_index() % kWarp / 4 + i / 2 * 8; }
MIMNET_FAST_DEVICE int state_column(int i) { return thread_index() % 4 * 2 + i % 2; }

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
template <bool kTransposed, int M, int N, int K, int P, int Q>
MIMNET_FAST_DEVICE void multiply(float (&out)[M][N][4], const Planes<P>& planes, int row,
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

}  // namespace mimnet_fast::cuda
