// What the threads of a block do together, on float32 matrices in shared memory.
#pragma once

#include <intrinsics.cuh>

#include "../common/view.h"

namespace mimnet_fast::cuda {

// A dimension that is known when the kernel is compiled, or (0) only when it runs.
template <int N>
struct Width {
  explicit MIMNET_FAST_INLINE Width(int64_t) {}
  MIMNET_FAST_INLINE constexpr operator int() const { return N; }
};
template <>
struct Width<0> {
  int value;
  explicit MIMNET_FAST_INLINE Width(int64_t n) : value(int(n)) {}
  MIMNET_FAST_INLINE operator int() const { return value; }
};

// A row-major matrix in shared memory. Its rows are an odd number of words apart, so that a column
// lies in different banks.
struct Tile {
  float* data;
  int stride;
  MIMNET_FAST_INLINE float& operator()(int i, int j) const { return data[i * stride + j]; }
};

MIMNET_FAST_INLINE int tile_stride(int columns) { return columns | 1; }

// Hands out shared memory in order; over a null base it only counts, which gives the launch its
// size.
class Arena {
 public:
  explicit MIMNET_FAST_INLINE Arena(char* base) : base_(base) {}

  MIMNET_FAST_INLINE float* floats(int64_t count) {
    float* start = reinterpret_cast<float*>(base_ + bytes_);
    bytes_ += (count * 4 + 15) / 16 * 16;
    return start;
  }
  MIMNET_FAST_INLINE Tile tile(int rows, int columns) {
    return {floats(int64_t(rows) * tile_stride(columns)), tile_stride(columns)};
  }
  MIMNET_FAST_INLINE int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

// Elements of a view, `offset` elements after its start

MIMNET_FAST_DEVICE float read(const View& v, int64_t offset) {
  switch (v.dtype) {
    case DType::bfloat16:
      return widen(load(static_cast<const BFloat16*>(v.data) + offset));
    case DType::float16:
      return widen(load(static_cast<const Float16*>(v.data) + offset));
    default:
      return load(static_cast<const float*>(v.data) + offset);
  }
}

MIMNET_FAST_DEVICE void write(const View& v, int64_t offset, float value) {
  switch (v.dtype) {
    case DType::bfloat16:
      return store(static_cast<BFloat16*>(v.data) + offset, narrow<BFloat16>(value));
    case DType::float16:
      return store(static_cast<Float16*>(v.data) + offset, narrow<Float16>(value));
    default:
      return store(static_cast<float*>(v.data) + offset, value);
  }
}

MIMNET_FAST_DEVICE int64_t read_integer(const View& v, int64_t offset) {
  return v.dtype == DType::int64 ? load(static_cast<const int64_t*>(v.data) + offset)
                                 : load(static_cast<const int32_t*>(v.data) + offset);
}

MIMNET_FAST_DEVICE bool read_flag(const View& v, int64_t offset) {
  return load(static_cast<const uint8_t*>(v.data) + offset) != 0;
}

MIMNET_FAST_INLINE bool aligned(const View& v, int64_t offset) {
  return (reinterpret_cast<uintptr_t>(v.data) + uint64_t(offset * element_size(v.dtype))) % 16 == 0;
}

// The sixteen bytes at `offset`, an aligned place, as `put(i, value)` for 4 or 8 values.
template <class Put>
MIMNET_FAST_DEVICE void read_pack(const View& v, int64_t offset, Put put) {
  const Pack pack = load_pack(static_cast<const char*>(v.data) + offset * element_size(v.dtype));
  for (int w = 0; w < 4; ++w) {
    const uint32_t word = pack.words[w];
    if (v.dtype == DType::float32) {
      put(w, bits_as_float(word));
    } else {
      const uint16_t low = uint16_t(word), high = uint16_t(word >> 16);
      const bool brain = v.dtype == DType::bfloat16;
      put(2 * w, brain ? widen(BFloat16{low}) : widen(Float16{low}));
      put(2 * w + 1, brain ? widen(BFloat16{high}) : widen(Float16{high}));
    }
  }
}

// Writes 4 or 8 values `get(i)` to the aligned place `offset`.
template <class Get>
MIMNET_FAST_DEVICE void write_pack(const View& v, int64_t offset, Get get) {
  Pack pack;
  for (int w = 0; w < 4; ++w) {
    if (v.dtype == DType::float32) {
      pack.words[w] = float_as_bits(get(w));
    } else {
      const float low = get(2 * w), high = get(2 * w + 1);
      const bool brain = v.dtype == DType::bfloat16;
      const uint16_t bits[] = {brain ? narrow<BFloat16>(low).bits : narrow<Float16>(low).bits,
                               brain ? narrow<BFloat16>(high).bits : narrow<Float16>(high).bits};
      pack.words[w] = uint32_t(bits[0]) | uint32_t(bits[1]) << 16;
    }
  }
  store_pack(static_cast<char*>(v.data) + offset * element_size(v.dtype), pack);
}

// Copies the matrix [rows, columns] that starts `offset` elements into a view, whose rows and
// columns are that many elements apart, as `put(i, j, value)`. Sixteen bytes at a time where they
// lie so.
template <class Put>
MIMNET_FAST_DEVICE void read_matrix(const View& v, int64_t offset, int rows, int columns,
                                    int64_t row_stride, int64_t column_stride, Put put) {
  const int pack = 16 / int(element_size(v.dtype));
  const bool whole = row_stride == columns;  // the rows follow one another without a gap
  const bool packed =
      column_stride == 1 && aligned(v, offset) &&
      (whole ? rows * columns % pack == 0 : columns % pack == 0 && row_stride % pack == 0);
  if (packed) {
    for (int p = thread_index(); p < rows * columns / pack; p += block_threads()) {
      const int i = p * pack / columns, j = p * pack % columns;
      read_pack(v, offset + (whole ? int64_t(p) * pack : i * row_stride + j),
                [&](int n, float value) {
                  const int wrapped = (j + n) / columns;  // a pack may end in a later row
                  put(i + wrapped, j + n - wrapped * columns, value);
                });
    }
  } else {
    for (int p = thread_index(); p < rows * columns; p += block_threads()) {
      const int i = p / columns, j = p % columns;
      put(i, j, read(v, offset + i * row_stride + j * column_stride));
    }
  }
}

// put(n, i, j, sum over k < depth of a(n, i, k) b(n, k, j)) for every n < batch, i < rows,
// j < columns. Each thread keeps TM x TN sums in registers; they lie far apart in the matrix so
// that neighbouring threads read neighbouring columns.
template <int TM, int TN, class A, class B, class Put>
MIMNET_FAST_DEVICE void multiply(int batch, int rows, int columns, int depth, A a, B b, Put put) {
  const int tile_rows = (rows + TM - 1) / TM, tile_columns = (columns + TN - 1) / TN;
  const int tiles = tile_rows * tile_columns;
  for (int t = thread_index(); t < batch * tiles; t += block_threads()) {
    const int n = t / tiles, first_i = t % tiles / tile_columns, first_j = t % tile_columns;
    float sum[TM][TN] = {};
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      float left[TM], right[TN];
#pragma unroll
      for (int m = 0; m < TM; ++m) {
        const int i = first_i + m * tile_rows;
        left[m] = a(n, TM == 1 || i < rows ? i : rows - 1, k);
      }
#pragma unroll
      for (int m = 0; m < TN; ++m) {
        const int j = first_j + m * tile_columns;
        right[m] = b(n, k, TN == 1 || j < columns ? j : columns - 1);
      }
#pragma unroll
      for (int i = 0; i < TM; ++i) {
#pragma unroll
        for (int j = 0; j < TN; ++j) sum[i][j] += left[i] * right[j];
      }
    }
#pragma unroll
    for (int i = 0; i < TM; ++i) {
#pragma unroll
      for (int j = 0; j < TN; ++j) {
        const int row = first_i + i * tile_rows, column = first_j + j * tile_columns;
        if (row < rows && column < columns) put(n, row, column, sum[i][j]);
      }
    }
  }
}

MIMNET_FAST_DEVICE float warp_sum(float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
MIMNET_FAST_DEVICE float warp_max(float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = maximum(value, shuffle_xor(value, mask));
  return value;
}

}  // namespace mimnet_fast::cuda
