// Work on rows as they lie in memory: vectors along a row, one row after another.
#pragma once

#include "lanes.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

// Rows of values, `step` elements apart.
template <class T>
struct GroupRows {
  T* first;
  int64_t step;

  MIMNET_FAST_INLINE T* operator[](int64_t i) const { return first + i * step; }
  MIMNET_FAST_INLINE GroupRows from(int64_t i) const { return {first + i * step, step}; }
};

// The whole vector at an aligned place.
template <class T>
MIMNET_FAST_INLINE Vec<T>& vector_at(T* p) {
  return *reinterpret_cast<Vec<T>*>(p);
}

// As the count of elements: a whole vector of them.
struct Whole {};

template <class T, class Count>
MIMNET_FAST_INLINE Vec<T> load(const T* p, Count count) {
  if constexpr (std::is_same_v<Count, Whole>) {
    return *reinterpret_cast<const Unaligned<T>*>(p);
  } else {
    return load_partial(p, count);
  }
}

template <class T, class Count>
MIMNET_FAST_INLINE void store(T* p, Vec<T> v, Count count) {
  if constexpr (std::is_same_v<Count, Whole>) {
    *reinterpret_cast<Unaligned<T>*>(p) = v;
  } else {
    store_partial(p, v, count);
  }
}

// Calls f(w, one) for every row; `one` says that a row is one vector, and no branch is left.
template <class T, class F>
MIMNET_FAST_INLINE void for_rows(int rows, int64_t d, F&& f) {
  constexpr int n = kLanes<T>;
  if (rows == n && d <= n) {
#pragma GCC unroll 16
    for (int w = 0; w < n; ++w) f(w, std::true_type{});
  } else {
    for (int w = 0; w < rows; ++w) f(w, std::false_type{});
  }
}

// Calls f(e, count) for every vector of a row: count elements from e on. The last one is partial
// even where it is full, which saves a branch.
template <class T, class One, class F>
MIMNET_FAST_INLINE void for_vectors(One, int64_t d, F&& f) {
  constexpr int n = kLanes<T>;
  if constexpr (One::value) {
    f(int64_t(0), int(d));
  } else {
    const int64_t last = (d - 1) & ~int64_t(n - 1);
    for (int64_t e = 0; e < last; e += n) f(e, Whole{});
    f(last, int(d - last));
  }
}

// Lane w is the dot product of row w of a and of b; lanes from `rows` on are 0.
template <class T, class A, class B>
MIMNET_FAST_INLINE Vec<T> dot_rows(GroupRows<A> a, GroupRows<B> b, int rows, int64_t d) {
  Vec<T> products[kLanes<T>];
  for_rows<T>(rows, d, [&](int w, auto one) {
    Vec<T> sum{};
    for_vectors<T>(one, d, [&](int64_t e, auto count) {
      sum += load<T>(a[w] + e, count) * load<T>(b[w] + e, count);
    });
    products[w] = sum;
  });
  for (int w = rows; w < kLanes<T>; ++w) products[w] = Vec<T>{};
  return sum_each<T>(products);
}

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
