#include "weight_gradients.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

constexpr int64_t kUnitRows = 48;    // entries of a unit: rows (m) ...
constexpr int64_t kUnitVectors = 4;  // ... times vectors (n)
constexpr int64_t kChunk = 256;      // users summed while their rows are in the cache

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class T>
int64_t columns_of_units(const OuterProduct<T>& p) {
  return pieces(p.n, kUnitVectors * kLanes<T>);
}

template <class T>
int64_t units_of(const OuterProduct<T>& p) {
  return pieces(p.m, kUnitRows) * columns_of_units(p);
}

template <class T>
void run_unit(const OuterProduct<T>& p, int64_t unit) {
  const int64_t m0 = unit / columns_of_units(p) * kUnitRows;
  const int64_t n0 = unit % columns_of_units(p) * kUnitVectors * kLanes<T>;
  const int64_t m = p.m - m0 < kUnitRows ? p.m - m0 : kUnitRows;
  const int64_t n = p.n - n0 < kUnitVectors * kLanes<T> ? p.n - n0 : kUnitVectors * kLanes<T>;
  const int64_t vectors = pieces(n, kLanes<T>);
  Vec<T> sum[kUnitRows * kUnitVectors];
  for (int64_t i = 0; i < m * vectors; ++i) sum[i] = Vec<T>{};
  for (int64_t r = 0; r < p.rows; r += kChunk) {
    const int64_t rows = p.rows - r < kChunk ? p.rows - r : kChunk;
    const Vec<T>* g = reinterpret_cast<const Vec<T>*>(p.g + r * p.g_width + n0);
    multiply<T>({sum, 1, vectors}, {g, 1, p.g_width / kLanes<T>},
                SharedMatrix<T>(p.a + r * p.a_width + m0, p.a_width, 1), vectors, m, rows, true);
  }
  store_sums<T>(sum, m, n, p.out, m0, n0);
}

}  // namespace

template <class T>
void store_sums(const Vec<T>* sums, int64_t m, int64_t n, const View& out, int64_t m0, int64_t n0) {
  const int64_t row_stride = out.dims == 2 ? out.stride[0] : 0;
  const int64_t column_stride = out.stride[out.dims - 1];
  with_storage(out.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t i = 0; i < m; ++i) {
      const Vec<T>* row = sums + i * pieces(n, kLanes<T>);
      S* to = static_cast<S*>(out.data) + (m0 + i) * row_stride + n0 * column_stride;
      if constexpr (std::is_same_v<S, T>) {
        if (column_stride == 1) {
          for (int64_t j = 0; j < n; j += kLanes<T>) store_vector<T>(to + j, *row++, n - j);
          continue;
        }
      }
      const T* from = reinterpret_cast<const T*>(row);
      for (int64_t j = 0; j < n; ++j) to[j * column_stride] = narrow<S>(from[j]);
    }
  });
}

template <class T>
void WeightGradients<T>::add(OuterProduct<T> product) {
  if (!product.out) return;
  // Vectors lie along n: the transpose where it takes fewer of them.
  if (product.n * pieces(product.m, kLanes<T>) < product.m * pieces(product.n, kLanes<T>)) {
    std::swap(product.a, product.g);
    std::swap(product.a_width, product.g_width);
    std::swap(product.m, product.n);
    std::swap(product.out.size[0], product.out.size[1]);
    std::swap(product.out.stride[0], product.out.stride[1]);
  }
  products_[count_++] = product;
}

template <class T>
int64_t WeightGradients<T>::units() const {
  int64_t total = 0;
  for (int i = 0; i < count_; ++i) {
    total += units_of(products_[i]);
  }
  return total;
}

template <class T>
void WeightGradients<T>::run(int64_t unit) const {
  for (int i = 0; i < count_; ++i) {
    const int64_t own = units_of(products_[i]);
    if (unit < own) return run_unit(products_[i], unit);
    unit -= own;
  }
}

template <class T>
void WeightGradients<T>::run_all() const {
  for (int i = 0; i < count_; ++i) {
    const int64_t own = units_of(products_[i]);
    for (int64_t unit = 0; unit < own; ++unit) run_unit(products_[i], unit);
  }
}

template <class T>
void WeightGradients<T>::run_all(const Parallel& parallel) const {
  int64_t work = 0;
  for (int i = 0; i < count_; ++i) work += products_[i].rows * products_[i].m * products_[i].n;
  const int64_t total = units();
  parallel.each(total, work / (total + 1), [&](int64_t unit) { run(unit); });
}

#define MIMNET_FAST_INSTANTIATE(T)                                                             \
  template void store_sums<T>(const Vec<T>*, int64_t, int64_t, const View&, int64_t, int64_t); \
  template class WeightGradients<T>;
MIMNET_FAST_INSTANTIATE(float)
MIMNET_FAST_INSTANTIATE(double)

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
