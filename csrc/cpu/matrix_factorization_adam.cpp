// Steps of Adam on the squared error of a matrix factorization. Adam moves every row of both tables
// in every step, but only the rows of a batch have a gradient. The others are left as they are
// until a batch has them, and then make up for all the steps that they missed at once.
//
// A row whose last gradient came in step s has in step s + j, with the moments m and v of then,
//
//   moments   beta1^j m,  beta2^j v,
//   movement  rate * (beta1^j m / c1) / (sqrt(beta2^j v) / c2 + eps),
//             c1 = 1 - beta1^(s+j),  c2 = sqrt(1 - beta2^(s+j)).
//
// With e_j = eps c2 / sqrt(beta2^j v) and r = beta1 / sqrt(beta2) that movement is
//
//   rate * m / sqrt(v) * r^j (c2 / c1) / (1 + e_j).
//
// Among the steps that count, those before r^j vanishes, e_j hardly varies, so the sum over j is
//
//   rate * m * S / (sqrt(v) + eps * E / S),  S = sum_j r^j c2 / c1,  E = sum_j (beta1/beta2)^j c2^2
//   / c1
//
// to first order in e_j, and to the variance of e_j beyond that. S and E depend on s and on the
// number of steps only. Where e_j is not small, the steps are taken one by one.
#include <cmath>

#include "adam.h"
#include "memory.h"
#include "ops.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

// Adam's steps without a gradient: any number of them, up to and with the current one.
template <class T>
class MissedSteps {
 public:
  MissedSteps(const Adam& adam, int64_t steps)
      : adam_(adam),
        ratio_(adam.beta1 / std::sqrt(adam.beta2)),
        ratio_of_eps_(adam.beta1 / adam.beta2),
        terms_(steps) {
    // Later terms are below the rounding of T.
    const double negligible = sizeof(T) == 4 ? 1e-9 : 1e-18;
    const double enough = std::log(negligible) / std::log(ratio_);
    if (double(steps) > enough) terms_ = int64_t(enough) + 1;
    decays_ = Buffer<Decay>(steps + 1);
    last_terms_ = Buffer<Series>(steps + 1);
    series_ = Buffer<Series>(terms_ + 1);
    longest_ = Buffer<Series>(steps + 1);
    for (int64_t n = 0; n <= steps; ++n) {
      // Less than a normal number leaves nothing, and is slow to multiply with.
      const double first = std::pow(adam.beta1, double(n));
      decays_.get()[n] = {T(first < 1e-37 ? 0 : first), T(std::pow(adam.beta2, double(n)))};
      const double step = double(adam.first_step + n);
      const double c1 = 1 - std::pow(adam.beta1, step), c2 = 1 - std::pow(adam.beta2, step);
      last_terms_.get()[n] = {ratio_ * std::sqrt(c2) / c1, ratio_of_eps_ * c2 / c1};
    }
  }

  // Makes `step` the current one; they follow each other from 1.
  void advance(int64_t step) {
    Series sum{};
    const int64_t terms = step < terms_ ? step : terms_;
    for (int64_t n = 1; n <= terms; ++n) {
      const Series& last = last_terms_.get()[step - n + 1];
      sum.movement = last.movement + ratio_ * sum.movement;
      sum.eps = last.eps + ratio_of_eps_ * sum.eps;
      series_.get()[n] = sum;
    }
    longest_.get()[step] = sum;
  }

  // The steps since `last`, `count` of them: a movement of rate * m / (sqrt(v) + eps), and decay.
  struct Gap {
    int64_t last, count;
    T rate, eps, decay1, decay2;
  };
  Gap gap(int64_t last, int64_t count) const {
    const Series& sum = count <= terms_ ? series_.get()[count] : longest_.get()[last + terms_];
    const Decay& decay = decays_.get()[count];
    return {last,
            count,
            T(adam_.learning_rate * sum.movement),
            T(adam_.eps * sum.eps / sum.movement),
            decay.first,
            decay.second};
  }

  MIMNET_FAST_INLINE void catch_up(Moving<T>& at, const Gap& gap) const {
    const Vec<T> root = sqrt(at.second), size = maximum(at.first, -at.first);
    const Int<T> matters = (gap.eps > T(1e-3) * root) & (size > T(1e-7) * gap.eps);
    if (__builtin_expect(lanes_where<T>(matters) != 0, 0)) return one_by_one(at, gap);
    at.value -= gap.rate * at.first / (root + gap.eps);
    at.first *= gap.decay1;
    at.second *= gap.decay2;
  }

 private:
  struct Decay {
    T first, second;
  };
  struct Series {
    double movement, eps;  // S and E, or terms of them
  };

  void one_by_one(Moving<T>& at, const Gap& gap) const {
    const Vec<T> second = at.second, first = at.first;
    for (int64_t n = 1; n <= gap.count && n <= terms_; ++n) {
      at.first *= T(adam_.beta1);
      at.second *= T(adam_.beta2);
      AdamStep<T>(adam_, double(adam_.first_step + gap.last + n)).move(at);
    }
    at.first = first * gap.decay1;
    at.second = second * gap.decay2;
  }

  const Adam& adam_;
  double ratio_, ratio_of_eps_;
  int64_t terms_;
  Buffer<Decay> decays_;
  Buffer<Series> last_terms_;
  Buffer<Series> series_;   // by the number of steps up to the current one
  Buffer<Series> longest_;  // of terms_ steps up to each
};

// A table with Adam's moments, and the rows of the current batch side by side.
template <class T>
class Table {
 public:
  Table(const View& values, const View& first, const View& second, int64_t most_rows)
      : count_(values.size[0]),
        d_(values.size[1]),
        width_(padded<T>(d_)),
        values_(static_cast<T*>(values.data)),
        first_(static_cast<T*>(first.data)),
        second_(static_cast<T*>(second.data)),
        rows_(count_),
        // A batch has no more rows than ratings, nor than there are.
        capacity_(most_rows < count_ ? most_rows : count_),
        indices_(capacity_),
        block_(4 * capacity_ * width_) {
    for (int64_t row = 0; row < count_; ++row) rows_.get()[row] = {0, 0};
  }

  void prefetch(int64_t row) const {
    __builtin_prefetch(&rows_.get()[row]);
    for (const T* memory : {values_, first_, second_}) {
      __builtin_prefetch(memory + row * d_);
      __builtin_prefetch(memory + row * d_ + d_ - 1);
    }
  }

  // Where the batch of `step` has a row, which is brought up to the step before at first sight.
  int64_t visit(int64_t row, int64_t step, const MissedSteps<T>& missed) {
    Row& state = rows_.get()[row];
    if (state.last == step) return state.place;
    state.place = int32_t(used_++);
    indices_.get()[state.place] = row;
    const int64_t behind = step - 1 - state.last;
    for (int64_t e = 0; e < width_; e += kLanes<T>) {
      Moving<T> at = load(row, e);
      if (behind > 0) missed.catch_up(at, missed.gap(state.last, behind));
      vector(kValues, state.place, e) = at.value;
      vector(kFirst, state.place, e) = at.first;
      vector(kSecond, state.place, e) = at.second;
      vector(kGradient, state.place, e) = Vec<T>{};
    }
    state.last = int32_t(step);
    return state.place;
  }

  const Vec<T>& value(int64_t place, int64_t e) const { return vector(kValues, place, e); }
  Vec<T>& gradient(int64_t place, int64_t e) { return vector(kGradient, place, e); }

  // The step of the rows of the batch, which the next one replaces.
  void update(const AdamStep<T>& adam) {
    for (int64_t place = 0; place < used_; ++place) {
      for (int64_t e = 0; e < width_; e += kLanes<T>) {
        Moving<T> at = {vector(kValues, place, e), vector(kFirst, place, e),
                        vector(kSecond, place, e)};
        adam(at, vector(kGradient, place, e));
        store(at, indices_.get()[place], e);
      }
    }
    used_ = 0;
  }

  // Brings every row up to `step`, which is the current one.
  void finish(int64_t step, const MissedSteps<T>& missed, const Parallel& parallel) {
    parallel(count_, 30 * width_ / kLanes<T>, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t last = rows_.get()[row].last;
        if (last == step) continue;
        const auto gap = missed.gap(last, step - last);
        for (int64_t e = 0; e < width_; e += kLanes<T>) {
          Moving<T> at = load(row, e);
          missed.catch_up(at, gap);
          store(at, row, e);
        }
      }
    });
  }

 private:
  struct Row {
    int32_t last;   // step up to which it is, and
    int32_t place;  // where the batch of that step has it
  };
  enum Part { kValues, kFirst, kSecond, kGradient };

  Vec<T>& vector(Part part, int64_t place, int64_t e) const {
    return *reinterpret_cast<Vec<T>*>(block_.get() + (4 * place + part) * width_ + e);
  }

  Moving<T> load(int64_t row, int64_t e) const {
    const int64_t from = row * d_ + e;
    return {load_vector(values_ + from, d_ - e), load_vector(first_ + from, d_ - e),
            load_vector(second_ + from, d_ - e)};
  }

  void store(const Moving<T>& at, int64_t row, int64_t e) const {
    const int64_t to = row * d_ + e;
    store_vector(values_ + to, at.value, d_ - e);
    store_vector(first_ + to, at.first, d_ - e);
    store_vector(second_ + to, at.second, d_ - e);
  }

  int64_t count_, d_, width_;
  T *values_, *first_, *second_;
  Buffer<Row> rows_;
  int64_t capacity_, used_ = 0;
  Buffer<int64_t> indices_;
  Buffer<T> block_;  // of each row of the batch all parts
};

template <class T>
MIMNET_FAST_INLINE T sum(Vec<T> v) {
  T total = 0;
  for (int w = 0; w < kLanes<T>; ++w) total += v[w];
  return total;
}

template <class T>
void run(const FactorizationArgs& args) {
  const int64_t ratings = args.ratings.size[0], d = args.user_table.size[1];
  const int64_t steps = (ratings + args.batch_size - 1) / args.batch_size;
  const int64_t most = args.batch_size < ratings ? args.batch_size : ratings;
  MissedSteps<T> missed(args.adam, steps);
  Table<T> users(args.user_table, args.user_first, args.user_second, most);
  Table<T> items(args.item_table, args.item_first, args.item_second, most);
  const auto* user_ids = static_cast<const int64_t*>(args.user_ids.data);
  const auto* item_ids = static_cast<const int64_t*>(args.item_ids.data);
  const auto* truth = static_cast<const T*>(args.ratings.data);
  auto* losses = static_cast<T*>(args.losses.data);
  struct Places {
    int64_t user, item;
  };
  Buffer<Places> places(most);
  constexpr int64_t kAhead = 16;  // ratings whose rows are on their way from memory
  for (int64_t step = 1; step <= steps; ++step) {
    const int64_t first = (step - 1) * args.batch_size;
    const int64_t count = ratings - first < most ? ratings - first : most;
    for (int64_t n = first; n < first + count; ++n) {
      if (n + kAhead < ratings) {
        users.prefetch(user_ids[n + kAhead]);
        items.prefetch(item_ids[n + kAhead]);
      }
      places.get()[n - first] = {users.visit(user_ids[n], step, missed),
                                 items.visit(item_ids[n], step, missed)};
    }
    double loss = 0;
    for (int64_t n = 0; n < count; ++n) {
      const Places at = places.get()[n];
      Vec<T> products{};
      for (int64_t e = 0; e < d; e += kLanes<T>) {
        products += users.value(at.user, e) * items.value(at.item, e);
      }
      const T error = sum<T>(products) - truth[first + n];
      const T slope = 2 * error / T(count);
      loss += double(error) * double(error);
      for (int64_t e = 0; e < d; e += kLanes<T>) {
        users.gradient(at.user, e) += slope * items.value(at.item, e);
        items.gradient(at.item, e) += slope * users.value(at.user, e);
      }
    }
    losses[step - 1] = T(loss / double(count));
    const AdamStep<T> adam(args.adam, double(args.adam.first_step + step));
    users.update(adam);
    items.update(adam);
    missed.advance(step);
  }
  users.finish(steps, missed, args.execution.parallel);
  items.finish(steps, missed, args.execution.parallel);
}

}  // namespace

void matrix_factorization_adam(const FactorizationArgs& args) {
  if (args.user_table.dtype == DType::float64) return run<double>(args);
  run<float>(args);
}

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
