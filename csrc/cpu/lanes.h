// SIMD lanes over users: lane w of every vector belongs to user w of a group.
//
// Routing, bridge and attention are small matrix products per user (D = 10, K = 7), too small and
// too odd to fill a vector register from one user. With one user per lane every operation is
// vertical: no horizontal sums, no padding of D, and the softmax over K costs K vector instructions
// for all lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../common/squash.h"
#include "../common/view.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct LaneTypes;
template <>
struct LaneTypes<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr DType dtype = DType::float32;
};
template <>
struct LaneTypes<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr DType dtype = DType::float64;
};

template <class T>
using Vec = typename LaneTypes<T>::Vec;
template <class T>
using Unaligned = typename LaneTypes<T>::Unaligned;
template <class T>
using Int = typename LaneTypes<T>::Int;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
MIMNET_FAST_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <class M, class V>
MIMNET_FAST_INLINE V select(M mask, V yes, V no) {
  return mask ? yes : no;
}

template <class V>
MIMNET_FAST_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

// -1 in the first n lanes, else 0.
template <class T>
MIMNET_FAST_INLINE Int<T> first_lanes(int n) {
  Int<T> lane;
  for (int w = 0; w < kLanes<T>; ++w) lane[w] = w;
  return lane < n;
}

// Bit w is set where a comparison holds in lane w.
template <class T>
MIMNET_FAST_INLINE uint32_t lanes_where(Int<T> holds) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return uint32_t(_mm512_movepi32_mask((__m512i)holds));
  } else {
    return uint32_t(_mm512_movepi64_mask((__m512i)holds));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return uint32_t(_mm256_movemask_ps((__m256)holds));
  } else {
    return uint32_t(_mm256_movemask_pd((__m256d)holds));
  }
#else
  uint32_t bits = 0;
  for (int w = 0; w < kLanes<T>; ++w) bits |= uint32_t(holds[w] != 0) << w;
  return bits;
#endif
}

// Lane by lane; the compiler turns the loops into vector instructions where there are any.
MIMNET_FAST_INLINE Vec<float> sqrt(Vec<float> x) {
  for (int w = 0; w < kLanes<float>; ++w) x[w] = __builtin_sqrtf(x[w]);
  return x;
}
MIMNET_FAST_INLINE Vec<double> sqrt(Vec<double> x) {
  for (int w = 0; w < kLanes<double>; ++w) x[w] = __builtin_sqrt(x[w]);
  return x;
}
inline Vec<float> power(Vec<float> x, float y) {
  for (int w = 0; w < kLanes<float>; ++w) x[w] = __builtin_powf(x[w], y);
  return x;
}
inline Vec<double> power(Vec<double> x, double y) {
  for (int w = 0; w < kLanes<double>; ++w) x[w] = __builtin_pow(x[w], y);
  return x;
}

// The arithmetic of the code shared with devices.
template <class T>
struct LaneMath {
  using Value = Vec<T>;
  using Scalar = T;
  static MIMNET_FAST_INLINE Value sqrt(Value x) { return MIMNET_FAST_ISA::sqrt(x); }
  static MIMNET_FAST_INLINE Value power(Value x, T y) { return MIMNET_FAST_ISA::power(x, y); }
  static MIMNET_FAST_INLINE Value select(Int<T> mask, Value yes, Value no) {
    return mask ? yes : no;
  }
};

// exp for arguments up to 88; what is below the smallest normal number is 0. Error under 2 ulp: the
// argument is reduced to |r| <= ln(2)/2 with ln(2) in two parts, then a polynomial of degree 6
// whose largest relative error there is 3e-9.
MIMNET_FAST_INLINE Vec<float> exp(Vec<float> x) {
  const Vec<float> bounded = maximum(x, splat(-87.33654f));
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
  const Vec<float> shifted = bounded * 1.44269504f + round;
  const Vec<float> whole = shifted - round;
  Vec<float> r = bounded - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  Vec<float> p = splat(0.00138145394f);
  p = p * r + 0.00836874545f;
  p = p * r + 0.0416683890f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // The integer is in the last bits of `shifted`: it is added to the exponent.
  const Vec<float> result = (Vec<float>)((Int<float>)p + ((Int<float>)shifted << 23));
  return select(x < -87.33654f, Vec<float>{}, result);
}
inline Vec<double> exp(Vec<double> x) {
  for (int w = 0; w < kLanes<double>; ++w) x[w] = __builtin_exp(x[w]);
  return x;
}

// 1 / (1 + exp(-x)) without overflow on either side.
template <class T>
MIMNET_FAST_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp(x > T(0) ? -x : x);
  return select(x > T(0), splat(T(1)), e) / (T(1) + e);
}

// ---- storage types
// -------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};

template <class T>
MIMNET_FAST_INLINE T widen(float x) {
  return T(x);
}
template <class T>
MIMNET_FAST_INLINE T widen(double x) {
  return T(x);
}
template <class T>
MIMNET_FAST_INLINE T widen(_Float16 x) {
  return T(float(x));
}
template <class T>
MIMNET_FAST_INLINE T widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return T(value);
}

template <class S, class T>
MIMNET_FAST_INLINE S narrow(T x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const float value = float(x);
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    if (value != value) return {uint16_t((bits >> 16) | 0x40)};
    bits += 0x7fff + ((bits >> 16) & 1);  // round to nearest, ties to even
    return {uint16_t(bits >> 16)};
  } else {
    return S(x);
  }
}

// The same for arrays. GCC 12 does not use the vector instructions for float16 of its own accord.
template <class T, class S>
inline void widen_all(T* to, const S* from, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<S, _Float16> && std::is_same_v<T, float>) {
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
    }
  }
#endif
  for (; i < count; ++i) to[i] = widen<T>(from[i]);
}
template <class S, class T>
inline void narrow_all(S* to, const T* from, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<S, _Float16> && std::is_same_v<T, float>) {
    for (; i + 8 <= count; i += 8) {
      _mm_storeu_si128((__m128i*)(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < count; ++i) to[i] = narrow<S>(from[i]);
}

// Calls f(S{}) with the storage type S of a floating dtype.
template <class F>
MIMNET_FAST_INLINE void with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64:
      return f(double{});
    case DType::bfloat16:
      return f(BFloat16{});
    case DType::float16:
      return f(_Float16{});
    default:
      return f(float{});
  }
}

// ---- between memory (users in rows) and lanes (users in lanes)
// -------------------------------------

// The first n of a vector's elements, up to all of them; the rest is 0.
template <class T>
MIMNET_FAST_INLINE Vec<T> load_partial(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
  }
#else
  if (n == kLanes<T>) return *reinterpret_cast<const Unaligned<T>*>(p);
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_maskload_ps(p, (__m256i)first_lanes<T>(n));
  } else {
    return (Vec<T>)_mm256_maskload_pd(p, (__m256i)first_lanes<T>(n));
  }
#else
  Vec<T> v{};
#pragma GCC unroll 4  // constant lanes stay in registers
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i < n) v[i] = p[i];
  }
  return v;
#endif
#endif
}

// Of two vectors, the lanes that exchanging blocks of S x S makes of them. Constants of a type: put
// together in a loop over S they cost more than the shuffles.
template <class T, int S, class Lanes = std::make_index_sequence<kLanes<T>>>
struct Exchange;
template <class T, int S, size_t... Lane>
struct Exchange<T, S, std::index_sequence<Lane...>> {
  static constexpr int n = kLanes<T>;
  static constexpr Int<T> low = {(Lane & S ? n + Lane - S : Lane)...};
  static constexpr Int<T> high = {(Lane & S ? n + Lane : Lane + S)...};
};

#if !defined(__AVX512F__)
// A half, a quarter and so on: the masked store of AVX2 is slow on many CPUs.
template <class T, int S = kLanes<T> / 2>
MIMNET_FAST_INLINE void store_parts(T* p, Vec<T> v, int n) {
  if (n & S) {
    __builtin_memcpy(p, &v, S * sizeof(T));
    p += S;
    v = __builtin_shuffle(v, v, Exchange<T, S>::high);
  }
  if constexpr (S > 1) store_parts<T, S / 2>(p, v, n);
}
#endif

template <class T>
MIMNET_FAST_INLINE void store_partial(T* p, Vec<T> v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
  }
#else
  if (n == kLanes<T>) {
    *reinterpret_cast<Unaligned<T>*>(p) = v;
  } else {
    store_parts(p, v, n);
  }
#endif
}

// A vector, or its first elements where `left` of them are fewer.
template <class T>
MIMNET_FAST_INLINE Vec<T> load_vector(const T* p, int64_t left) {
  if (left >= kLanes<T>) return *reinterpret_cast<const Unaligned<T>*>(p);
  return load_partial(p, int(left));
}

template <class T>
MIMNET_FAST_INLINE void store_vector(T* p, Vec<T> v, int64_t left) {
  if (left >= kLanes<T>) {
    *reinterpret_cast<Unaligned<T>*>(p) = v;
  } else {
    store_partial(p, v, int(left));
  }
}

#if defined(__AVX512F__)
// Vectors of 16-bit numbers, of which the first `n` are in memory.
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

template <class S>
MIMNET_FAST_INLINE Vec<float> load_halves(const S* p, int n) {
  const __m256i halves = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
  if constexpr (std::is_same_v<S, BFloat16>) {
    return (Vec<float>)(__builtin_convertvector((Halves)halves, Words) << 16);
  } else {
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, halves);
  }
}
template <class S>
MIMNET_FAST_INLINE void store_halves(S* p, Vec<float> v, int n) {
  __m256i halves;
  if constexpr (std::is_same_v<S, BFloat16>) {  // as `narrow` rounds
    const Words bits = (Words)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Words nan = bits | 0x400000;
    halves = (__m256i) __builtin_convertvector((v != v ? nan : rounded) >> 16, Halves);
  } else {
    halves = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  }
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), halves);
}
#endif

// The same for numbers of another type, which are converted.
template <class T, class S>
MIMNET_FAST_INLINE Vec<T> load_vector_of(const S* p, int64_t left) {
  constexpr int n = kLanes<T>;
  if constexpr (std::is_same_v<S, T>) {
    return load_vector(p, left);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, float> && sizeof(S) == 2) {
    return load_halves(p, left < n ? int(left) : n);
#endif
  } else {
    Vec<T> v{};
    T* const to = reinterpret_cast<T*>(&v);
    left < n ? widen_all(to, p, left) : widen_all(to, p, n);
    return v;
  }
}
template <class T, class S>
MIMNET_FAST_INLINE void store_vector_of(S* p, Vec<T> v, int64_t left) {
  constexpr int n = kLanes<T>;
  if constexpr (std::is_same_v<S, T>) {
    store_vector(p, v, left);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, float> && sizeof(S) == 2) {
    store_halves(p, v, left < n ? int(left) : n);
#endif
  } else {
    const T* const from = reinterpret_cast<const T*>(&v);
    left < n ? narrow_all(p, from, left) : narrow_all(p, from, n);
  }
}

// Transpose of a square of kLanes vectors, by exchanging ever smaller blocks.
template <class T, int S = kLanes<T> / 2>
MIMNET_FAST_INLINE void transpose(Vec<T>* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & S) continue;
    const Vec<T> a = v[i], b = v[i + S];
    v[i] = __builtin_shuffle(a, b, Exchange<T, S>::low);
    v[i + S] = __builtin_shuffle(a, b, Exchange<T, S>::high);
  }
  if constexpr (S > 1) transpose<T, S / 2>(v);
}

// Lane w is the sum of all lanes of v[w]: a transpose that adds the halves which it exchanges.
template <class T, int S = kLanes<T> / 2>
MIMNET_FAST_INLINE Vec<T> sum_each(Vec<T>* v) {
#pragma GCC unroll 8
  for (int i = 0; i < S; ++i) {
    v[i] = __builtin_shuffle(v[i], v[i + S], Exchange<T, S>::low) +
           __builtin_shuffle(v[i], v[i + S], Exchange<T, S>::high);
  }
  if constexpr (S > 1) {
    return sum_each<T, S / 2>(v);
  } else {
    return v[0];
  }
}

// lanes[e][w] = element e of user w's row, for `count` elements `stride` apart. Lanes from `users`
// on are 0.
template <class T, class S>
void load_lanes_from(Vec<T>* lanes, const S* const* rows, int users, int64_t count,
                     int64_t stride) {
  constexpr int n = kLanes<T>;
  int64_t e = 0;
  if (stride == 1) {
    for (; e < count; e += n) {
      const int width = count - e < n ? int(count - e) : n;
      Vec<T> block[n];
      for (int w = 0; w < users; ++w) {
        __builtin_prefetch(rows[w] + e +
                           8 * n);  // one stream per user is more than the CPU foresees
        block[w] = load_vector_of<T>(rows[w] + e, width);
      }
      for (int w = users; w < n; ++w) block[w] = Vec<T>{};
      transpose<T>(block);
      for (int i = 0; i < width; ++i) lanes[e + i] = block[i];
    }
    return;
  }
  for (; e < count; ++e) {
    Vec<T> v{};
    for (int w = 0; w < users; ++w) v[w] = widen<T>(rows[w][e * stride]);
    lanes[e] = v;
  }
}

template <class T, class S>
void store_lanes_to(const Vec<T>* lanes, S* const* rows, int users, int64_t count, int64_t stride) {
  constexpr int n = kLanes<T>;
  int64_t e = 0;
  if (stride == 1) {
    for (; e < count; e += n) {
      const int width = count - e < n ? int(count - e) : n;
      Vec<T> block[n];
      for (int i = 0; i < n; ++i) block[i] = i < width ? lanes[e + i] : Vec<T>{};
      transpose<T>(block);
      for (int w = 0; w < users; ++w) store_vector_of<T>(rows[w] + e, block[w], width);
    }
    return;
  }
  for (; e < count; ++e) {
    for (int w = 0; w < users; ++w) rows[w][e * stride] = narrow<S>(T(lanes[e][w]));
  }
}

MIMNET_FAST_INLINE char* at(const View& view, int64_t i, int64_t j = 0, int64_t k = 0) {
  const int64_t offset = i * view.stride[0] + j * view.stride[1] + k * view.stride[2];
  return static_cast<char*>(view.data) + offset * element_size(view.dtype);
}

// The users of one group: up to kLanes of the batch, one after another in it or in `order`.
struct Group {
  int64_t first;
  int users;
  const int64_t* order = nullptr;

  MIMNET_FAST_INLINE int64_t user(int w) const {
    return order == nullptr ? first + w : order[first + w];
  }
};

// lanes[e] from view[user, (j, (k,)) e]; a batch dimension of size 1 is shared by all users.
template <class T>
void load_rows(Vec<T>* lanes, const View& view, Group group, int64_t j = 0, int64_t k = 0) {
  const int last = view.dims - 1;
  const bool shared = view.size[0] == 1;
  with_storage(view.dtype, [&](auto storage) {
    using S = decltype(storage);
    const S* rows[kLanes<T>];
    for (int w = 0; w < group.users; ++w) {
      rows[w] = reinterpret_cast<const S*>(at(view, shared ? 0 : group.user(w), j, k));
    }
    load_lanes_from<T, S>(lanes, rows, group.users, view.size[last], view.stride[last]);
  });
}

// All of view[user, ...] for two inner dimensions: lanes[j * size + e].
template <class T>
void load_matrix(Vec<T>* lanes, const View& view, Group group) {
  const int64_t rows = view.size[1], columns = view.size[2];
  if (view.stride[2] == 1 && view.stride[1] == columns) {
    View flat = view;
    flat.dims = 2;
    flat.size[1] = rows * columns;
    flat.stride[1] = 1;
    return load_rows<T>(lanes, flat, group);
  }
  for (int64_t j = 0; j < rows; ++j) load_rows<T>(lanes + j * columns, view, group, j);
}

template <class T>
void store_rows(const Vec<T>* lanes, const View& view, Group group, int64_t j = 0, int64_t k = 0) {
  const int last = view.dims - 1;
  with_storage(view.dtype, [&](auto storage) {
    using S = decltype(storage);
    S* rows[kLanes<T>];
    for (int w = 0; w < group.users; ++w) {
      rows[w] = reinterpret_cast<S*>(at(view, group.user(w), j, k));
    }
    store_lanes_to<T, S>(lanes, rows, group.users, view.size[last], view.stride[last]);
  });
}

template <class T>
void store_matrix(const Vec<T>* lanes, const View& view, Group group) {
  const int64_t rows = view.size[1], columns = view.size[2];
  if (view.stride[2] == 1 && view.stride[1] == columns) {
    View flat = view;
    flat.dims = 2;
    flat.size[1] = rows * columns;
    flat.stride[1] = 1;
    return store_rows<T>(lanes, flat, group);
  }
  for (int64_t j = 0; j < rows; ++j) store_rows<T>(lanes + j * columns, view, group, j);
}

// A boolean matrix [B, n] as lanes of 1 and 0.
template <class T>
void load_flags(Vec<T>* lanes, const View& view, Group group) {
  for (int64_t i = 0; i < view.size[1]; ++i) {
    Vec<T> v{};
    for (int w = 0; w < group.users; ++w) {
      v[w] = T(*reinterpret_cast<const uint8_t*>(at(view, group.user(w), i)) != 0);
    }
    lanes[i] = v;
  }
}

// One number per user.
template <class T>
MIMNET_FAST_INLINE Vec<T> load_column(const View& view, Group group, int64_t j = 0) {
  Vec<T> v{};
  with_storage(view.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int w = 0; w < group.users; ++w) {
      v[w] = widen<T>(*reinterpret_cast<const S*>(at(view, group.user(w), j)));
    }
  });
  return v;
}

template <class T>
MIMNET_FAST_INLINE void store_column(Vec<T> v, const View& view, Group group, int64_t j = 0) {
  with_storage(view.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int w = 0; w < group.users; ++w) {
      *reinterpret_cast<S*>(at(view, group.user(w), j)) = narrow<S>(T(v[w]));
    }
  });
}

// Rows of a padded row-major buffer, `per_user` of them for each user: row `index` of every user of
// the group from its lanes. The padding up to `width` becomes 0.
template <class T>
void save_rows(T* buffer, int64_t width, const Vec<T>* lanes, int64_t count, Group group,
               int64_t per_user = 1, int64_t index = 0) {
  constexpr int n = kLanes<T>;
  for (int64_t e = 0; e < width; e += n) {
    Vec<T> block[n];
    for (int i = 0; i < n; ++i) block[i] = e + i < count ? lanes[e + i] : Vec<T>{};
    transpose<T>(block);
    for (int w = 0; w < group.users; ++w) {
      const int64_t row = group.user(w) * per_user + index;
      *reinterpret_cast<Vec<T>*>(buffer + row * width + e) = block[w];
    }
  }
}

// The first step of a softmax's gradient c_i (g_i - sum_j c_j g_j): g less its mean. All are first
// measured from that of the largest c: where this is nearly 1 the rest is a difference of nearly
// equal numbers, and what all have in common would meet the rounding of sum_j c_j.
template <class T>
MIMNET_FAST_INLINE void subtract_mean(Vec<T>* g, const Vec<T>* c, int64_t count,
                                      int64_t stride = 1) {
  Vec<T> largest = c[0], base = g[0], mean{};
  for (int64_t i = stride; i < count * stride; i += stride) {
    base = select(c[i] > largest, g[i], base);
    largest = maximum(c[i], largest);
  }
  for (int64_t i = 0; i < count * stride; i += stride) {
    g[i] -= base;
    mean += c[i] * g[i];
  }
  for (int64_t i = 0; i < count * stride; i += stride) g[i] -= mean;
}

// squash(x) in place for one vector of `count` lanes.
template <class T>
MIMNET_FAST_INLINE void squash_lanes(Vec<T>* x, int64_t count, const Squash& squash) {
  Vec<T> norm2{};
  for (int64_t d = 0; d < count; ++d) norm2 += x[d] * x[d];
  const Vec<T> factor = squash_factor<LaneMath<T>>(norm2, squash).factor;
  for (int64_t d = 0; d < count; ++d) x[d] *= factor;
}

// The gradient with respect to x, given `grad` with respect to squash(x), is of_grad grad + of_x x.
template <class T>
struct SquashGradient {
  Vec<T> of_grad, of_x;
};

// For |x|^2 and x . grad.
template <class T>
MIMNET_FAST_INLINE SquashGradient<T> squash_gradient(Vec<T> norm2, Vec<T> dot,
                                                     const Squash& squash) {
  const SquashFactor<Vec<T>> f = squash_factor<LaneMath<T>>(norm2, squash);
  const auto nonzero = norm2 > T(0);
  const Vec<T> share = dot / select(nonzero, norm2, splat(T(1)));
  return {f.factor, select(nonzero, (f.radial + f.radial) * share, Vec<T>{})};
}

// grad becomes the gradient with respect to x, given the gradient with respect to squash(x).
template <class T>
MIMNET_FAST_INLINE void squash_backward_lanes(Vec<T>* grad, const Vec<T>* x, int64_t count,
                                              const Squash& squash) {
  Vec<T> norm2{}, dot{};
  for (int64_t d = 0; d < count; ++d) {
    norm2 += x[d] * x[d];
    dot += x[d] * grad[d];
  }
  const SquashGradient<T> f = squash_gradient<T>(norm2, dot, squash);
  for (int64_t d = 0; d < count; ++d) grad[d] = f.of_grad * grad[d] + f.of_x * x[d];
}

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
