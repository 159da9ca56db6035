// Runs every kernel, forward and backward, on odd shapes and strides with real threads and without
// torch, to be compiled with a sanitizer. Every tensor is an allocation of its own, so that a step
// outside of it is seen. Numbers are checked against the reference elsewhere; here they must be
// finite and written.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "common/kernels.h"

using namespace mimnet_fast;

namespace {

std::mt19937 generator(0);

// Memory of one tensor; `gap` leaves unused elements between the rows of the last dimension.
class Tensor {
 public:
  Tensor(DType dtype, std::vector<int64_t> sizes, int64_t gap = 0) {
    view_.dtype = dtype;
    view_.dims = int(sizes.size());
    int64_t stride = 1;
    for (int d = view_.dims - 1; d >= 0; --d) {
      view_.size[d] = sizes[d];
      view_.stride[d] = stride;
      stride *= sizes[d] + (d == view_.dims - 1 ? gap : 0);
    }
    count_ = stride;
    bytes_.reset(new char[size_t(count_ * element_size(dtype)) + 1]);
    view_.data = bytes_.get();
    fill([] { return std::numeric_limits<double>::quiet_NaN(); });
  }

  template <class F>
  Tensor& fill(F value) {
    for (int64_t i = 0; i < count_; ++i) set(i, value());
    return *this;
  }
  Tensor& random(double scale = 1) {
    std::normal_distribution<double> normal(0, scale);
    return fill([&] { return normal(generator); });
  }
  Tensor& integers(int64_t below) {
    return fill([&] { return double(generator() % uint64_t(below)); });
  }

  void check(const char* what) const {
    int64_t index[kMaxDims] = {};
    int64_t total = 1;
    for (int d = 0; d < view_.dims; ++d) total *= view_.size[d];
    for (int64_t n = 0; n < total; ++n) {
      int64_t offset = 0;
      for (int d = 0; d < view_.dims; ++d) offset += index[d] * view_.stride[d];
      if (!std::isfinite(get(offset))) {
        std::printf("%s: element %lld is not finite or was not written\n", what, (long long)n);
        std::exit(1);
      }
      for (int d = view_.dims - 1; d >= 0 && ++index[d] == view_.size[d]; --d) index[d] = 0;
    }
  }

  operator View() const { return view_; }

 private:
  void set(int64_t i, double x) {
    char* p = bytes_.get();
    switch (view_.dtype) {
      case DType::float32:
        reinterpret_cast<float*>(p)[i] = float(x);
        break;
      case DType::float64:
        reinterpret_cast<double*>(p)[i] = x;
        break;
      case DType::int64:
        reinterpret_cast<int64_t*>(p)[i] = x == x ? int64_t(x) : 0;
        break;
      default:
        reinterpret_cast<uint8_t*>(p)[i] = x > 0;
    }
  }
  double get(int64_t i) const {
    const char* p = bytes_.get();
    return view_.dtype == DType::float64 ? reinterpret_cast<const double*>(p)[i]
                                         : reinterpret_cast<const float*>(p)[i];
  }

  View view_;
  int64_t count_;
  std::shared_ptr<char[]> bytes_;
};

Parallel two_threads() {
  return {[](int64_t count, int64_t, void* context, Parallel::Body body) {
            std::thread other([=] { body(context, count / 2, count); });
            body(context, 0, count / 2);
            other.join();
          },
          2};
}

struct Shape {
  int64_t b, l, k, d, h;
};

void squash_case(DType t, Shape s) {
  for (int form = 0; form <= int(SquashForm::identity); ++form) {
    Tensor x = Tensor(t, {s.b, s.k, s.d}, 3).random(), grad = Tensor(t, {s.b, s.k, s.d}).random();
    Tensor out(t, {s.b, s.k, s.d}), grad_x(t, {s.b, s.k, s.d}, 1);
    SquashArgs args{x, {}, out, {SquashForm(form), 1e-8, 1.0}, two_threads()};
    kernels().squash(args);
    args.grad = grad;
    args.out = grad_x;
    kernels().squash_backward(args);
    out.check("squash");
    grad_x.check("squash_backward");
    // A view whose rows are not evenly spaced, and one whose elements are not.
    for (const int d : {1, 2}) {
      Tensor whole = Tensor(t, {s.b, s.k + (d == 1), s.d}).random();
      View part = whole;
      if (d == 1) part.size[1] = s.k;
      if (d == 2) {
        std::swap(part.size[1], part.size[2]);
        std::swap(part.stride[1], part.stride[2]);
      }
      Tensor found(t, {s.b, part.size[1], part.size[2]});
      SquashArgs strided{part, part, found, {SquashForm(form), 1e-8, 1.0}, two_threads()};
      kernels().squash_backward(strided);
      found.check("squash_backward of a view");
    }
  }
}

void routing_case(DType t, Shape s, int weight, SoftmaxAxis axis, Padding padding, bool lengths) {
  const int64_t out_d = weight == 0 || weight == 3 ? s.d : s.d + 3;
  const bool votes = weight == 3;
  const std::vector<int64_t> in =
      votes ? std::vector<int64_t>{s.b, s.k, s.l, s.d} : std::vector<int64_t>{s.b, s.l, s.d};
  std::vector<int64_t> w = {s.d, out_d};
  if (weight != 1) w.insert(w.begin(), s.k);
  if (weight == 4) w.insert(w.begin(), s.l);
  Tensor inputs = Tensor(t, in, 2).random(), matrix = Tensor(t, w).random();
  Tensor logits = Tensor(t, {s.b, s.k, s.l}).random();
  Tensor mask = Tensor(DType::boolean, {s.b, s.l}).random();
  Tensor length = Tensor(DType::int64, {s.b}).integers(s.l + 1);
  Tensor present = Tensor(DType::boolean, {s.b, s.k}).random();
  Tensor out(t, {s.b, s.k, out_d}), coupling(t, {s.b, s.k, s.l});
  Tensor pooled(t, {s.b, s.k, weight == 4 ? out_d : s.d});
  Tensor grad = Tensor(t, {s.b, s.k, out_d}).random(), grad_inputs(t, in), grad_weight(t, w);
  Tensor grad_logits(t, {s.b, s.k, s.l});
  RoutingArgs args{};
  args.inputs = inputs;
  if (weight == 1 || weight == 2 || weight == 4) args.weight = matrix;
  args.logits = logits;
  args.mask = lengths ? View(length) : View(mask);
  args.capsule_mask = present;
  args.capsules = s.k;
  args.iterations = 3;
  args.axis = axis;
  args.padding = padding;
  args.inner_squash = args.final_squash = true;
  args.temperature = 1;
  args.squash = {SquashForm::sqrt_eps, 1e-8, 1};
  args.out = out;
  args.coupling = coupling;
  args.pooled = pooled;
  args.execution.parallel = two_threads();
  kernels().dynamic_routing(args);
  args.grad = grad;
  args.grad_inputs = grad_inputs;
  if (args.weight) args.grad_weight = grad_weight;
  kernels().dynamic_routing_backward(args);
  out.check("dynamic_routing");
  coupling.check("coupling");
  grad_inputs.check("gradient of the inputs");
  if (args.weight) grad_weight.check("gradient of the routing weight");
  args.update = Update::coupling;
  args.full_gradient = true;
  args.grad_logits = grad_logits;
  for (const bool normalize : {false, true}) {
    args.normalize_agreement = normalize;
    kernels().dynamic_routing(args);
    kernels().dynamic_routing_backward(args);
    grad_inputs.check("full gradient of the inputs");
    grad_logits.check("gradient of the logits");
    if (args.weight) grad_weight.check("full gradient of the routing weight");
  }
}

void bridge_case(DType t, Shape s, bool own_source) {
  const int64_t d_target = s.d + 1;
  const std::vector<int64_t> source_sizes =
      own_source ? std::vector<int64_t>{s.b, s.k, s.d} : std::vector<int64_t>{s.b, s.d};
  Tensor interests = Tensor(t, {s.b, s.k, s.d + 2}, 1).random();
  Tensor source = Tensor(t, source_sizes).random();
  Tensor w1 = Tensor(t, {s.h, s.d + 2}, 2).random(), b1 = Tensor(t, {s.h}).random();
  Tensor w2 = Tensor(t, {s.d * d_target, s.h}).random();
  Tensor b2 = Tensor(t, {s.d * d_target}).random();
  Tensor out(t, {s.b, s.k, d_target}), grad = Tensor(t, {s.b, s.k, d_target}).random();
  Tensor grad_interests(t, {s.b, s.k, s.d + 2}), grad_source(t, source_sizes);
  Tensor grad_w1(t, {s.h, s.d + 2}), grad_b1(t, {s.h});
  Tensor grad_w2(t, {s.d * d_target, s.h}), grad_b2(t, {s.d * d_target});
  BridgeArgs args{};
  args.interests = interests;
  args.source = source;
  args.w1 = w1;
  args.b1 = b1;
  args.w2 = w2;
  args.b2 = b2;
  args.out = out;
  args.execution.parallel = two_threads();
  kernels().interest_bridge(args);
  args.grad = grad;
  args.grad_interests = grad_interests;
  args.grad_source = grad_source;
  args.grad_w1 = grad_w1;
  args.grad_b1 = grad_b1;
  args.grad_w2 = grad_w2;
  args.grad_b2 = grad_b2;
  kernels().interest_bridge_backward(args);
  for (const Tensor* result :
       {&out, &grad_interests, &grad_source, &grad_w1, &grad_b1, &grad_w2, &grad_b2}) {
    result->check("interest_bridge");
  }
}

// One set of projections, for values as for gradients.
struct Projections {
  Tensor key, value, bias;
  Projections(DType t, int64_t d) : key(t, {d, d}), value(t, {d, d}), bias(t, {d}) {}
  Projections& random() {
    key.random();
    value.random();
    bias.random();
    return *this;
  }
  void check() const {
    key.check("key weight");
    value.check("value weight");
    bias.check("value bias");
  }
  operator AttentionWeights() const { return {key, value, bias}; }
};

void attention_case(DType t, Shape s, int64_t candidates, bool hard) {
  Tensor query = Tensor(t, {s.b, candidates, s.d}, 1).random();
  Tensor interests = Tensor(t, {s.b, s.k, s.d}).random();
  Tensor present = Tensor(DType::boolean, {s.b, s.k}).random();
  Projections weights = Projections(t, s.d).random(), grad_weights(t, s.d);
  Tensor out(t, {s.b, candidates, s.d}), coefficients(t, {s.b, candidates, s.k});
  Tensor grad = Tensor(t, {s.b, candidates, s.d}).random();
  Tensor grad_coefficients = Tensor(t, {s.b, candidates, s.k}).random();
  Tensor grad_query(t, {s.b, candidates, s.d}), grad_interests(t, {s.b, s.k, s.d});
  AttentionArgs args{};
  args.query = query;
  args.interests = interests;
  args.weights = weights;
  args.capsule_mask = present;
  args.scale = 0.5;
  args.power = 1;
  args.hard = hard;
  args.out = out;
  args.coefficients = coefficients;
  args.execution.parallel = two_threads();
  kernels().target_attention(args);
  args.grad = grad;
  args.grad_coefficients = grad_coefficients;
  args.grad_query = grad_query;
  args.grad_interests = grad_interests;
  args.grad_weights = grad_weights;
  kernels().target_attention_backward(args);
  for (const Tensor* result : {&out, &coefficients, &grad_query, &grad_interests}) {
    result->check("target_attention");
  }
  grad_weights.check();
}

struct Fusion {
  Projections fine, coarse;
  Tensor weight, bias;
  Fusion(DType t, int64_t d) : fine(t, d), coarse(t, d), weight(t, {2 * d}), bias(t, {1}) {}
  Fusion& random() {
    fine.random();
    coarse.random();
    weight.random();
    bias.random();
    return *this;
  }
  void check() const {
    fine.check();
    coarse.check();
    weight.check("fusion weight");
    bias.check("fusion bias");
  }
  operator FusionWeights() const { return {fine, coarse, weight, bias}; }
};

void fusion_case(DType t, Shape s, int64_t candidates) {
  Tensor item = Tensor(t, {s.b, candidates, s.d}).random();
  Tensor prototype = Tensor(t, {s.b, candidates, s.d}, 2).random();
  Tensor interests = Tensor(t, {s.b, s.k, s.d}, 1).random();
  Fusion weights = Fusion(t, s.d).random(), grad_weights(t, s.d);
  Tensor out(t, {s.b, candidates, s.d}), gate(t, {s.b, candidates});
  Tensor grad = Tensor(t, {s.b, candidates, s.d}).random();
  Tensor grad_gate = Tensor(t, {s.b, candidates}).random();
  Tensor grad_item(t, {s.b, candidates, s.d}), grad_prototype(t, {s.b, candidates, s.d});
  Tensor grad_interests(t, {s.b, s.k, s.d});
  MultiGranularityArgs args{};
  args.item = item;
  args.prototype = prototype;
  args.interests = interests;
  args.weights = weights;
  args.out = out;
  args.gate = gate;
  args.execution.parallel = two_threads();
  kernels().multi_granularity_attention(args);
  args.grad = grad;
  args.grad_gate = grad_gate;
  args.grad_item = grad_item;
  args.grad_prototype = grad_prototype;
  args.grad_interests = grad_interests;
  args.grad_weights = grad_weights;
  kernels().multi_granularity_attention_backward(args);
  for (const Tensor* result : {&out, &gate, &grad_item, &grad_prototype, &grad_interests}) {
    result->check("multi_granularity_attention");
  }
  grad_weights.check();
}

void mimnet_case(DType t, Shape s, bool ids, bool keep) {
  constexpr int64_t items = 11;
  Tensor embedded = Tensor(t, {s.b, s.l, s.d}, 1).random();
  Tensor history = Tensor(DType::int64, {s.b, s.l}).integers(items);
  Tensor table = Tensor(t, {items, s.d}, 3).random();
  Tensor source = Tensor(t, {s.b, s.d}).random(), item = Tensor(t, {s.b, s.d}).random();
  Tensor prototype = Tensor(t, {s.b, s.d}).random();
  Tensor routing = Tensor(t, {s.d, s.d}).random(), w1 = Tensor(t, {s.h, s.d}).random();
  Tensor b1 = Tensor(t, {s.h}).random(), w2 = Tensor(t, {s.d * s.d, s.h}).random();
  Tensor b2 = Tensor(t, {s.d * s.d}).random();
  Fusion fusion = Fusion(t, s.d).random(), grad_fusion(t, s.d);
  Tensor logits = Tensor(t, {s.b, s.k, s.l}).random();
  Tensor lengths = Tensor(DType::int64, {s.b}).integers(s.l + 1);
  Tensor ratings(t, {s.b}), pooled(t, {s.b, s.k, s.d}), transferred(t, {s.b, s.k, s.d});
  Tensor hidden_grad(t, {s.b, s.k, s.h});
  Tensor grad = Tensor(t, {s.b}).random(), grad_history(t, {s.b, s.l, s.d});
  Tensor grad_source(t, {s.b, s.d}), grad_item(t, {s.b, s.d}), grad_prototype(t, {s.b, s.d});
  Tensor grad_routing(t, {s.d, s.d}), grad_w1(t, {s.h, s.d}), grad_b1(t, {s.h});
  Tensor grad_w2(t, {s.d * s.d, s.h}), grad_b2(t, {s.d * s.d});
  MIMNetArgs args{};
  args.history = ids ? View(history) : View(embedded);
  if (ids) args.table = table;
  args.source = source;
  args.item = item;
  args.prototype = prototype;
  args.routing_weight = routing;
  args.w1 = w1;
  args.b1 = b1;
  args.w2 = w2;
  args.b2 = b2;
  args.fusion = fusion;
  args.logits = logits;
  args.mask = lengths;
  args.iterations = 2;
  args.padding = Padding::zero_after;
  args.ratings = ratings;
  args.pooled = pooled;
  args.transferred = transferred;
  if (keep) args.hidden_grad = hidden_grad;
  args.execution.parallel = two_threads();
  kernels().mimnet_forward(args);
  args.grad = grad;
  if (!ids) args.grad_history = grad_history;
  args.grad_source = grad_source;
  args.grad_item = grad_item;
  args.grad_prototype = grad_prototype;
  args.grad_routing_weight = grad_routing;
  args.grad_w1 = grad_w1;
  args.grad_b1 = grad_b1;
  args.grad_w2 = grad_w2;
  args.grad_b2 = grad_b2;
  args.grad_fusion = grad_fusion;
  kernels().mimnet_forward_backward(args);
  for (const Tensor* result : {&ratings, &grad_source, &grad_item, &grad_prototype, &grad_routing,
                               &grad_w1, &grad_b1, &grad_w2, &grad_b2}) {
    result->check("mimnet_forward");
  }
  if (!ids) grad_history.check("gradient of the histories");
  grad_fusion.check();
}

// More users than a block of them, items than a stretch of them; all prototypes kept, or none.
void catalogue_case(DType t, Shape s, int64_t items, bool kept) {
  const int64_t prototypes = kept ? 3 : items, top = 5;
  Tensor interests = Tensor(t, {s.b, s.k, s.d}, 1).random();
  Tensor table = Tensor(t, {items, s.d}, 2).random();
  Tensor guides = Tensor(t, {prototypes, s.d}).random();
  Tensor ids = Tensor(DType::int64, {items}).integers(prototypes);
  Tensor excluded = Tensor(DType::int64, {4 * s.b}).integers(items);
  int64_t offset = -4;
  Tensor offsets = Tensor(DType::int64, {s.b + 1}).fill([&] { return double(offset += 4); });
  Fusion fusion = Fusion(t, s.d).random();
  Tensor scores(t, {s.b, top}), indices(DType::int64, {s.b, top});
  CatalogueArgs args{};
  args.interests = interests;
  args.items = table;
  args.prototypes = guides;
  if (kept) args.prototype_ids = ids;
  args.weights = fusion;
  args.excluded = excluded;
  args.excluded_offsets = offsets;
  args.scores = scores;
  args.indices = indices;
  args.execution.parallel = two_threads();
  kernels().catalogue_top_k(args);
  scores.check("catalogue_top_k");
}

// Batches with the last one shorter, rows in several of them and in none.
void factorization_case(DType t, Shape s) {
  const int64_t users = 3 * s.b, items = 2 * s.l, ratings = 4 * s.b + 1;
  Tensor user_table = Tensor(t, {users, s.d}).random();
  Tensor item_table = Tensor(t, {items, s.d}).random();
  const auto zero = [] { return 0.0; };
  Tensor user_first = Tensor(t, {users, s.d}).fill(zero);
  Tensor user_second = Tensor(t, {users, s.d}).fill(zero);
  Tensor item_first = Tensor(t, {items, s.d}).fill(zero);
  Tensor item_second = Tensor(t, {items, s.d}).fill(zero);
  Tensor user_ids = Tensor(DType::int64, {ratings}).integers(users);
  Tensor item_ids = Tensor(DType::int64, {ratings}).integers(items);
  Tensor truth = Tensor(t, {ratings}).random();
  const int64_t batch = s.k;
  Tensor losses(t, {(ratings + batch - 1) / batch});
  FactorizationArgs args{};
  args.user_table = user_table;
  args.user_first = user_first;
  args.user_second = user_second;
  args.item_table = item_table;
  args.item_first = item_first;
  args.item_second = item_second;
  args.user_ids = user_ids;
  args.item_ids = item_ids;
  args.ratings = truth;
  args.batch_size = batch;
  args.adam = {0.01, 0.9, 0.999, 1e-8, 0};
  args.losses = losses;
  args.execution.parallel = two_threads();
  kernels().matrix_factorization_adam(args);
  losses.check("losses of a matrix factorization");
  user_table.check("users of a matrix factorization");
  item_table.check("items of a matrix factorization");
}

// The last batch shorter, with and without weights of users and an average.
void training_case(DType t, Shape s, bool more) {
  const int64_t users = s.b + 2, items = s.l + 1, known = 9, ratings = 2 * s.b + 1;
  const int64_t count = 5 * s.d * s.d + s.h * s.d + s.h + s.d * s.d * s.h + s.d * s.d + 6 * s.d + 1;
  const auto zero = [] { return 0.0; };
  Tensor parameters = Tensor(t, {count}).random(0.3);
  Tensor first = Tensor(t, {count}).fill(zero), second = Tensor(t, {count}).fill(zero);
  Tensor average = Tensor(t, {count}).random();
  Tensor user_ids = Tensor(DType::int64, {ratings}).integers(users);
  Tensor item_ids = Tensor(DType::int64, {ratings}).integers(items);
  Tensor truth = Tensor(t, {ratings}).random();
  Tensor weights = Tensor(t, {users}).random();
  Tensor histories = Tensor(DType::int64, {users, s.l}).integers(known);
  Tensor lengths = Tensor(DType::int64, {users}).integers(s.l + 1);
  Tensor history_table = Tensor(t, {known, s.d}).random();
  Tensor source_table = Tensor(t, {users, s.d}).random();
  Tensor item_table = Tensor(t, {items, s.d}).random();
  Tensor prototypes = Tensor(t, {items, s.d}).random();
  Tensor logits = Tensor(t, {ratings, s.k, s.l}).random();
  Tensor losses(t, {3});
  TrainingArgs args{};
  args.parameters = parameters;
  args.first = first;
  args.second = second;
  if (more) args.average = average;
  args.users = user_ids;
  args.items = item_ids;
  args.ratings = truth;
  if (more) args.weights = weights;
  args.histories = histories;
  args.lengths = lengths;
  args.history_table = history_table;
  args.source_table = source_table;
  args.item_table = item_table;
  args.prototype_table = prototypes;
  args.logits = logits;
  args.hidden = s.h;
  args.batch_size = s.b;
  args.iterations = 2;
  args.padding = Padding::zero_after;
  args.adam = {0.01, 0.9, 0.999, 1e-8, 0};
  args.weight_decay = 0.1;
  args.averaging = 0.9;
  args.losses = losses;
  args.execution.parallel = two_threads();
  kernels().mimnet_adam(args);
  losses.check("losses of MIMNet");
  parameters.check("parameters of MIMNet");
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 1, 1, 1, 1}, {5, 4, 3, 7, 9}, {37, 20, 7, 10, 50}, {70, 3, 2, 17, 8}};
  for (const DType t : {DType::float32, DType::float64}) {
    // More votes than are kept, and positions in several chunks.
    for (const SoftmaxAxis axis : {SoftmaxAxis::capsules, SoftmaxAxis::inputs}) {
      routing_case(t, {3, 700, 8, 25, 1}, 4, axis, Padding::zero_after, false);
    }
    for (const bool kept : {false, true}) catalogue_case(t, {150, 0, 2, 5, 0}, 1100, kept);
    for (const Shape& s : shapes) {
      squash_case(t, s);
      factorization_case(t, s);
      for (int weight = 0; weight <= 4; ++weight) {
        for (const SoftmaxAxis axis : {SoftmaxAxis::capsules, SoftmaxAxis::inputs}) {
          for (const Padding p : {Padding::zero_after, Padding::fill_before, Padding::ignore}) {
            routing_case(t, s, weight, axis, p, weight % 2 == 0);
          }
        }
      }
      for (const bool flag : {false, true}) {
        bridge_case(t, s, flag);
        attention_case(t, s, flag ? 3 : 1, flag);
        fusion_case(t, s, flag ? 3 : 1);
        for (const bool keep : {false, true}) mimnet_case(t, s, flag, keep);
        catalogue_case(t, s, 60, flag);
        training_case(t, s, flag);
      }
    }
  }
  std::printf("%s: every kernel ran\n", kernels().target);
  return 0;
}
