// Steps of Adam on MIMNet's second stage: rows of a batch are gathered, one pass gives ratings and
// the gradient of the parameters, and all parameters move. One after another they are a vector,
// which Adam sees as such.
#include <cstring>
#include <vector>

#include "adam.h"
#include "mimnet_forward.h"
#include "ops.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

template <class T>
constexpr DType kDType = LaneTypes<T>::dtype;
template <>
constexpr DType kDType<int64_t> = DType::int64;

template <class T>
View array(T* data, std::initializer_list<int64_t> sizes) {
  View v;
  v.data = data;
  v.dtype = kDType<T>;
  v.dims = int(sizes.size());
  int64_t stride = 1;
  for (int d = v.dims - 1; d >= 0; --d) {
    v.size[d] = sizes.begin()[d];
    v.stride[d] = stride;
    stride *= v.size[d];
  }
  return v;
}

// Where each parameter lies in the vector of all.
template <class T>
class Layout {
 public:
  Layout(T* from, int64_t d, int64_t hidden)
      : next_(from),
        routing_weight(take({d, d})),
        w1(take({hidden, d})),
        b1(take({hidden})),
        w2(take({d * d, hidden})),
        b2(take({d * d})),
        fusion{attention(d), attention(d), take({2 * d}), take({1})} {}

 private:
  View take(std::initializer_list<int64_t> sizes) {
    View v = array(next_, sizes);
    next_ += v.size[0] * v.stride[0];
    return v;
  }
  AttentionWeights attention(int64_t d) {
    AttentionWeights weights;
    weights.key_weight = take({d, d});
    take({d});  // the key bias, which has no gradient
    weights.value_weight = take({d, d});
    weights.value_bias = take({d});
    return weights;
  }

  T* next_;

 public:
  View routing_weight, w1, b1, w2, b2;
  FusionWeights fusion;
};

// The rows of a batch of `count`, one after another.
template <class T>
class Gathered {
 public:
  Gathered(const View& table, int64_t most)
      : table_(static_cast<const T*>(table.data)),
        width_(table.dims > 1 ? table.size[1] : 1),
        dims_(table.dims),
        rows_(size_t(most * width_)) {}

  View operator()(const int64_t* ids, int64_t count) {
    for (int64_t n = 0; n < count; ++n) {
      std::memcpy(rows_.data() + n * width_, table_ + ids[n] * width_, size_t(width_) * sizeof(T));
    }
    return dims_ > 1 ? array(rows_.data(), {count, width_}) : array(rows_.data(), {count});
  }

  const T* get() const { return rows_.data(); }

 private:
  const T* table_;
  int64_t width_;
  int dims_;
  std::vector<T> rows_;
};

template <class T>
struct Optimizer {
  T *values, *first, *second, *average;
  int64_t count;

  void step(const AdamStep<T>& adam, const T* gradients, T decay, T share) const {
    constexpr int n = kLanes<T>;
    for (int64_t e = 0; e < count; e += n) {
      const int64_t left = count - e;
      Moving<T> at = {load_vector(values + e, left), load_vector(first + e, left),
                      load_vector(second + e, left)};
      adam(at, load_vector(gradients + e, left) + decay * at.value);
      store_vector(values + e, at.value, left);
      store_vector(first + e, at.first, left);
      store_vector(second + e, at.second, left);
      if (average == nullptr) continue;
      const Vec<T> before = load_vector(average + e, left);
      store_vector(average + e, before + (1 - share) * (at.value - before), left);
    }
  }
};

template <class T>
void run(const TrainingArgs& args) {
  const int64_t ratings = args.ratings.size[0], d = args.source_table.size[1];
  const int64_t k = args.logits.size[1], length = args.logits.size[2];
  const int64_t most = args.batch_size < ratings ? args.batch_size : ratings;
  const int64_t count = args.parameters.size[0];
  // Not from the memory of a call, which the kernels of every step are to have anew.
  std::vector<T> gradients(static_cast<size_t>(count)), rated(static_cast<size_t>(most));
  Gathered<int64_t> histories(args.histories, most), lengths(args.lengths, most);
  Gathered<T> source(args.source_table, most), item(args.item_table, most),
      prototype(args.prototype_table, most), weight(args.weights, most);
  const auto memory = [](const View& v) { return static_cast<T*>(v.data); };
  const Optimizer<T> optimizer = {memory(args.parameters), memory(args.first), memory(args.second),
                                  memory(args.average), count};
  const Layout<T> parameters(memory(args.parameters), d, args.hidden);
  const Layout<T> gradient(gradients.data(), d, args.hidden);
  const auto* users = static_cast<const int64_t*>(args.users.data);
  const auto* items = static_cast<const int64_t*>(args.items.data);

  MIMNetArgs model{};
  model.table = args.history_table;
  model.routing_weight = parameters.routing_weight;
  model.w1 = parameters.w1;
  model.b1 = parameters.b1;
  model.w2 = parameters.w2;
  model.b2 = parameters.b2;
  model.fusion = parameters.fusion;
  model.iterations = args.iterations;
  model.padding = args.padding;
  model.grad_routing_weight = gradient.routing_weight;
  model.grad_w1 = gradient.w1;
  model.grad_b1 = gradient.b1;
  model.grad_w2 = gradient.w2;
  model.grad_b2 = gradient.b2;
  model.grad_fusion = gradient.fusion;
  model.execution = args.execution;
  for (int64_t first = 0, step = 0; first < ratings; first += most, ++step) {
    const int64_t size = ratings - first < most ? ratings - first : most;
    model.history = histories(users + first, size);
    model.mask = lengths(users + first, size);
    model.source = source(users + first, size);
    model.item = item(items + first, size);
    model.prototype = prototype(items + first, size);
    model.logits = array(memory(args.logits) + first * k * length, {size, k, length});
    model.ratings = array(rated.data(), {size});
    SquaredErrors errors{};
    errors.target = array(memory(args.ratings) + first, {size});
    if (args.weights) errors.weight = weight(users + first, size);
    mimnet_descent<T>(model, errors);

    double loss = 0;
    for (int64_t n = 0; n < size; ++n) {
      const double error = double(rated[size_t(n)] - memory(args.ratings)[first + n]);
      loss += (args.weights ? double(weight.get()[n]) : 1.0) * error * error;
    }
    memory(args.losses)[step] = T(loss / double(size));

    const double done = double(args.adam.first_step + step);
    const double most_share = done / (9 + done);
    const double share = args.averaging < most_share ? args.averaging : most_share;
    optimizer.step(AdamStep<T>(args.adam, done + 1), gradients.data(), T(args.weight_decay),
                   T(share));
  }
}

}  // namespace

void mimnet_adam(const TrainingArgs& args) {
  if (args.parameters.dtype == DType::float64) return run<double>(args);
  run<float>(args);
}

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
