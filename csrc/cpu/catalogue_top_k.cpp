// The best items of a catalogue for every user: users in lanes, items stream by.
//
// A user meets so many items that keys and values are projected once per user: item v gets
// sum_k a_k (W_V u_k + b_V) . v of the fine attention, a = softmax_k((W_K u_k) . v). The coarse
// attention depends on the prototype alone. Its vector is made once for every prototype, or, where
// they are too many to be kept, for every item of a tile, and meets the item in one dot product.
#include <algorithm>
#include <limits>

#include "matmul.h"
#include "memory.h"
#include "multi_granularity_attention.h"
#include "ops.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

// Products of a group of users and a tile of items stay in the second-level cache, between a
// multiplication and the softmax over it.
constexpr int64_t kTile = 48;
// So many items meet one group of users before the next: its coarse vectors stay in cache.
constexpr int64_t kStretch = 20 * kTile;
// Most bytes of coarse vectors that a group of users keeps.
constexpr int64_t kMostKept = int64_t(1) << 20;

template <class T>
constexpr T kNone = -std::numeric_limits<T>::infinity();

template <class T>
struct Entry {
  T score;
  int64_t index;
};

// Higher first, of equals the lower index; in a heap in this order the worst stands on top.
template <class T>
struct Better {
  bool operator()(const Entry<T>& a, const Entry<T>& b) const {
    return a.score > b.score || (a.score == b.score && a.index < b.index);
  }
};

// What each user must not get, in rising order.
class Excluded {
 public:
  Excluded(const CatalogueArgs& args, int64_t users) {
    if (!args.excluded) return;
    const int64_t count = args.excluded.size[0];
    sorted_ = Buffer<int64_t>(count);
    bounds_ = Buffer<int64_t>(users + 1);
    for (int64_t i = 0; i < count; ++i) {
      sorted_.get()[i] = *reinterpret_cast<const int64_t*>(at(args.excluded, i));
    }
    int64_t bound = 0;  // offsets are unchecked in a traced graph
    for (int64_t b = 0; b <= users; ++b) {
      const int64_t offset = *reinterpret_cast<const int64_t*>(at(args.excluded_offsets, b));
      bound = std::min(std::max(bound, offset), count);
      bounds_.get()[b] = bound;
    }
    args.execution.parallel(users, 1 + 10 * count / (users + 1), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) std::sort(first(b), first(b + 1));
    });
  }

  bool has(int64_t user, int64_t item) const {
    return bounds_.get() != nullptr && std::binary_search(first(user), first(user + 1), item);
  }

 private:
  int64_t* first(int64_t user) const { return sorted_.get() + bounds_.get()[user]; }

  Buffer<int64_t> sorted_, bounds_;
};

template <class T>
struct Plan {
  const CatalogueArgs& args;
  int64_t users, items, prototypes, interests, d, top;
  FusionPlan<T> fusion;
  bool keep;  // a coarse vector for every prototype
  Buffer<T> gates;

  explicit Plan(const CatalogueArgs& a)
      : args(a),
        users(a.interests.size[0]),
        items(a.items.size[0]),
        prototypes(a.prototypes.size[0]),
        interests(a.interests.size[1]),
        d(a.interests.size[2]),
        top(a.scores.size[1]),
        fusion(a.weights, interests, d),
        keep(prototypes < items && prototypes * d * int64_t(sizeof(Vec<T>)) <= kMostKept),
        gates(padded<T>(items)) {
    Buffer<T> by_prototype(padded<T>(prototypes));
    dots(by_prototype.get(), a.prototypes, fusion.weight + d,
         [](Vec<T> dot, int64_t, int) { return dot; });
    dots(gates.get(), a.items, fusion.weight, [&](Vec<T> dot, int64_t first, int count) {
      for (int w = 0; w < count; ++w) {
        const int64_t p = prototype(first + w);
        dot[w] += p < 0 ? std::numeric_limits<T>::quiet_NaN() : by_prototype.get()[p];
      }
      const Vec<T> gate = sigmoid<T>(dot + *fusion.bias);
      return select(dot == dot, gate, dot);
    });
  }

  // Row of an item's prototype; -1: there is none.
  int64_t prototype(int64_t item) const {
    if (!args.prototype_ids) return item;
    const int64_t p = *reinterpret_cast<const int64_t*>(at(args.prototype_ids, item));
    return 0 <= p && p < prototypes ? p : -1;
  }

  // Multiply-adds of a user and an item.
  int64_t work() const { return (2 + 2 * !keep) * interests * d + 2 * d + 20 * interests; }

 private:
  // out[r] = finish(weight . row r), rows in lanes.
  template <class F>
  void dots(T* out, const View& rows, const T* weight, F finish) {
    constexpr int n = kLanes<T>;
    const int64_t count = rows.size[0];
    args.execution.parallel((count + n - 1) / n, d * n, [&](int64_t begin, int64_t end) {
      Scratch<T> scratch(d);
      Vec<T>* lanes = scratch.take(d);
      for (int64_t first = begin * n; first < end * n; first += n) {
        const Group group = {first, int(std::min<int64_t>(n, count - first))};
        View view = rows;
        if (count == 1) view.size[0] = 2;  // a size of 1 would be a row for all lanes
        load_rows<T>(lanes, view, group);
        Vec<T> dot{};
        for (int64_t i = 0; i < d; ++i) dot += lanes[i] * weight[i];
        *reinterpret_cast<Vec<T>*>(out + first) = finish(dot, first, group.users);
      }
    });
  }
};

// Row r of a matrix in the compute type.
template <class T>
void copy_row(T* to, const View& matrix, int64_t r) {
  with_storage(matrix.dtype, [&](auto storage) {
    using S = decltype(storage);
    const S* from = reinterpret_cast<const S*>(at(matrix, r));
    for (int64_t i = 0; i < matrix.size[1]; ++i) to[i] = widen<T>(from[i * matrix.stride[1]]);
  });
}

// Scores over the interests become exp(score - highest); returns their sum.
template <class T>
MIMNET_FAST_INLINE Vec<T> exponentials(Vec<T>* scores, int64_t count) {
  Vec<T> highest = scores[0];
  for (int64_t k = 1; k < count; ++k) highest = maximum(highest, scores[k]);
  Vec<T> sum{};
  for (int64_t k = 0; k < count; ++k) {
    scores[k] = exp(scores[k] - highest);
    sum += scores[k];
  }
  return sum;
}

// In four sums: one alone would wait for itself.
template <class T>
MIMNET_FAST_INLINE Vec<T> dot(const Vec<T>* a, const T* b, int64_t count) {
  Vec<T> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] += a[i + j] * b[i + j];
  }
  for (; i < count; ++i) sum[0] += a[i] * b[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// A block of users on its way through a part of the catalogue.
template <class T>
class Walk {
 public:
  static int64_t vectors(const Plan<T>& p, int64_t groups) {
    const int64_t kept = p.keep ? p.prototypes : kTile;
    const int64_t rows = 2 * kStretch * p.d / kLanes<T>;  // exact: kStretch is a multiple
    return p.interests * p.d + groups * (4 * p.interests * p.d + 1) +
           (p.keep ? groups : 1) * kept * p.d + rows + 3 * kTile * p.interests;
  }

  Walk(const Plan<T>& plan, int64_t groups, Scratch<T>& scratch)
      : p_(plan),
        loaded_(scratch.take(p_.interests * p_.d)),
        projected_(scratch.take(groups * 4 * p_.interests * p_.d)),
        least_(scratch.take(groups)),
        coarse_(scratch.take((p_.keep ? groups * p_.prototypes : kTile) * p_.d)),
        rows_(reinterpret_cast<T*>(scratch.take(kStretch * p_.d / kLanes<T>))),
        guides_(reinterpret_cast<T*>(scratch.take(kStretch * p_.d / kLanes<T>))),
        products_(scratch.take(2 * kTile * p_.interests)),
        weights_(scratch.take(kTile * p_.interests)) {}

  // Users of group g of the block; `entries` are theirs, `apart` from user to user.
  void enter(int64_t g, Group group) {
    const int64_t size = p_.interests * p_.d;
    load_matrix<T>(loaded_, p_.args.interests, group);
    project(keys(g), p_.fusion.fine.key_weight, nullptr);
    project(keys(g) + size, p_.fusion.fine.value_weight, p_.fusion.fine.value_bias);
    project(coarse_keys(g), p_.fusion.coarse.key_weight, nullptr);
    project(coarse_keys(g) + size, p_.fusion.coarse.value_weight, p_.fusion.coarse.value_bias);
    for (int w = 0; w < kLanes<T>; ++w) {
      least_[g][w] = w < group.users ? kNone<T> : -kNone<T>;
    }
    if (!p_.keep) return;
    for (int64_t first = 0; first < p_.prototypes; first += kTile) {
      const int64_t count = std::min(kTile, p_.prototypes - first);
      for (int64_t i = 0; i < count; ++i)
        copy_row(guides_ + i * p_.d, p_.args.prototypes, first + i);
      pool(g, coarse(g) + first * p_.d, guides_, count);
    }
  }

  // The next at most kStretch items.
  void fetch(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t p = std::max<int64_t>(0, p_.prototype(first + i));
      copy_row(rows_ + i * p_.d, p_.args.items, first + i);
      if (p_.keep) {
        slots_[i] = p;
      } else {
        slots_[i] = i % kTile;
        copy_row(guides_ + i * p_.d, p_.args.prototypes, p);
      }
    }
  }

  // Group g meets what was fetched; offer(w, score, item) where lane w has none so good yet, which
  // returns the least score that it takes from then on.
  template <class F>
  void meet(int64_t g, int64_t first, int64_t count, F&& offer) {
    const int64_t k = p_.interests, d = p_.d;
    Vec<T>& least = least_[g];
    for (int64_t tile = 0; tile < count; tile += kTile) {
      const int64_t size = std::min(kTile, count - tile);
      if (!p_.keep) pool(g, coarse_, guides_ + tile * d, size);
      // A few rows of keys and values stay in the first-level cache for the whole tile.
      for (int64_t m = 0; m < 2 * k; m += kTileM) {
        multiply<T>({products_ + m, 1, 2 * k}, {keys(g) + m * d, d, 1},
                    SharedMatrix<T>(rows_ + tile * d, 1, d), std::min<int64_t>(kTileM, 2 * k - m),
                    size, d, false);
      }
      for (int64_t i = 0; i < size; ++i) {
        Vec<T>* a = products_ + i * 2 * k;
        const Vec<T> sum = exponentials<T>(a, k);
        Vec<T> fine{};
        for (int64_t j = 0; j < k; ++j) fine += a[j] * a[k + j];
        const Vec<T> by_prototype =
            dot<T>(coarse(g) + slots_[tile + i] * d, rows_ + (tile + i) * d, d);
        const T gate = p_.gates.get()[first + tile + i];
        const Vec<T> score = (T(1) - gate) * (fine / sum) + gate * by_prototype;
        for (uint32_t better = lanes_where<T>(score > least); better != 0; better &= better - 1) {
          const int w = __builtin_ctz(better);
          least[w] = offer(w, T(score[w]), first + tile + i);
        }
      }
    }
  }

 private:
  Vec<T>* keys(int64_t g) const { return projected_ + g * 4 * p_.interests * p_.d; }
  Vec<T>* coarse_keys(int64_t g) const { return keys(g) + 2 * p_.interests * p_.d; }
  Vec<T>* coarse(int64_t g) const { return coarse_ + (p_.keep ? g * p_.prototypes * p_.d : 0); }

  void project(Vec<T>* out, const T* weight, const T* bias) {
    const int64_t k = p_.interests, d = p_.d;
    for (int64_t i = 0; i < k * d; ++i) out[i] = bias == nullptr ? Vec<T>{} : splat(bias[i % d]);
    multiply<T>({out, d, 1}, {loaded_, d, 1}, SharedMatrix<T>(weight, 1, d), k, d, d, true);
  }

  // Coarse vectors of group g for at most kTile prototypes.
  void pool(int64_t g, Vec<T>* out, const T* guides, int64_t count) {
    const int64_t k = p_.interests, d = p_.d;
    multiply<T>({weights_, 1, k}, {coarse_keys(g), d, 1}, SharedMatrix<T>(guides, 1, d), k, count,
                d, false);
    for (int64_t i = 0; i < count; ++i) {
      Vec<T>* a = weights_ + i * k;
      const Vec<T> inverse = T(1) / exponentials<T>(a, k);
      for (int64_t j = 0; j < k; ++j) a[j] *= inverse;
    }
    multiply<T>({out, d, 1}, {weights_, k, 1}, ConstLaneMatrix<T>{coarse_keys(g) + k * d, d, 1},
                count, d, k, false);
  }

  const Plan<T>& p_;
  Vec<T>* loaded_;     // interests of one group, [K,D]
  Vec<T>* projected_;  // by group: fine keys and values, coarse keys and values, [4,K,D]
  Vec<T>* least_;      // by group: the score to beat
  Vec<T>* coarse_;     // by group [P,D], or of a tile [kTile,D]
  T* rows_;            // items, [kStretch,D]
  T* guides_;          // their prototypes
  Vec<T>* products_;   // with fine keys and values, [kTile,2K]
  Vec<T>* weights_;    // of the coarse attention, [kTile,K]
  int64_t slots_[kStretch];
};

template <class T>
void run(const CatalogueArgs& args) {
  const Plan<T> p(args);
  const Excluded excluded(args, p.users);
  const int64_t threads = args.execution.parallel.threads;
  const Blocks<T> blocks(p.users, threads);
  // Few users leave threads idle, so that each walks through a part of the catalogue.
  const int64_t tiles = (p.items + kTile - 1) / kTile;
  const int64_t parts =
      std::max<int64_t>(1, std::min(tiles, threads / std::max<int64_t>(1, blocks.count)));
  const int64_t part = (tiles + parts - 1) / parts * kTile;
  Buffer<Entry<T>> entries(p.users * parts * p.top);
  std::fill_n(entries.get(), p.users * parts * p.top, Entry<T>{kNone<T>, -1});

  const int64_t work = p.work() * kLanes<T> * blocks.per_block * part;
  args.execution.parallel(blocks.count * parts, work, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(Walk<T>::vectors(p, blocks.per_block));
    Walk<T> walk(p, blocks.per_block, scratch);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / parts, stop = std::min(p.items, (i % parts + 1) * part);
      const int64_t groups = blocks.size(block);
      for (int64_t g = 0; g < groups; ++g) walk.enter(g, blocks.group(block, g));
      for (int64_t first = i % parts * part; first < stop; first += kStretch) {
        const int64_t count = std::min(kStretch, stop - first);
        walk.fetch(first, count);
        for (int64_t g = 0; g < groups; ++g) {
          const Group group = blocks.group(block, g);
          walk.meet(g, first, count, [&](int w, T score, int64_t item) {
            const int64_t user = group.user(w);
            Entry<T>* heap = entries.get() + (user * parts + i % parts) * p.top;
            if (!excluded.has(user, item)) {
              std::pop_heap(heap, heap + p.top, Better<T>());
              heap[p.top - 1] = {score, item};
              std::push_heap(heap, heap + p.top, Better<T>());
            }
            return heap->score;
          });
        }
      }
    }
  });

  args.execution.parallel(p.users, 10 * parts * p.top, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Entry<T>* best = entries.get() + b * parts * p.top;
      std::partial_sort(best, best + p.top, best + parts * p.top, Better<T>());
      for (int64_t i = 0; i < p.top; ++i) {
        with_storage(args.scores.dtype, [&](auto storage) {
          using S = decltype(storage);
          *reinterpret_cast<S*>(at(args.scores, b, i)) = narrow<S>(best[i].score);
        });
        *reinterpret_cast<int64_t*>(at(args.indices, b, i)) = best[i].index;
      }
    }
  });
}

}  // namespace

void catalogue_top_k(const CatalogueArgs& args) {
  args.interests.dtype == DType::float64 ? run<double>(args) : run<float>(args);
}

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
