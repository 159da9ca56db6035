#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "dynamic_routing.h"
#include "interest_bridge.h"
#include "multi_granularity_attention.h"
#include "ops.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

// Whether histories stand one after another: one dimension less than those of a batch.
// A table without rows has no memory, but dimensions.
bool is_jagged(const MIMNetArgs& args) {
  return args.history.dims == (args.table.dims > 0 ? 1 : 2);
}

template <class T>
struct Plan {
  int64_t batch, k, d;
  RoutingMatrices<T> routing_weight;
  std::optional<RoutingGram<T>> gram;
  RoutingPlan<T> routing;
  BridgePlan<T> bridge;
  FusionPlan<T> fusion;
  Histories histories;
  Blocks<T> blocks;

  Plan(const MIMNetArgs& args, bool routes)
      : batch(args.source.size[0]),
        k(args.logits.size[args.logits.dims - 2]),
        d(args.source.size[1]),
        routing_weight(args.routing_weight),
        bridge(args.w1, args.b1, args.w2, args.b2, k, d, args.execution.parallel),
        fusion(args.fusion, k, d),
        histories(is_jagged(args) ? Histories(args.mask, args.history.size[0], kLanes<T>)
                                  : Histories()),
        blocks(batch, args.execution.parallel.threads, histories.order()) {
    routing = {};
    routing.length = histories ? histories.positions() : args.history.size[1];
    routing.capsules = k;
    routing.d_in = d;
    routing.d = d;
    routing.kind = RoutingWeight::shared;
    routing.weight = &routing_weight;
    routing.iterations = args.iterations;
    routing.axis = SoftmaxAxis::capsules;
    routing.padding = args.padding;
    routing.inner_squash = true;
    routing.inverse_temperature = T(1);
    routing.squash = {SquashForm::sqrt_eps, 1e-8, 1.0};
    if (routes && routing.gram_pays()) {
      gram.emplace(routing_weight, d, d);
      routing.gram = &*gram;
    }
  }

  // Multiply-adds per block.
  int64_t work() const {
    return (routing.work() + bridge.work() + fusion.work()) * kLanes<T> * blocks.per_block;
  }
};

// Ids address memory, so they are checked where they are used; everything else was checked before.
void check_ids(const View& ids, const View& table) {
  if (!table) return;
  const int64_t columns = ids.dims == 1 ? 1 : ids.size[1];
  for (int64_t i = 0; i < ids.size[0]; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const char* id = at(ids, i, j);
      const int64_t row = ids.dtype == DType::int64 ? *reinterpret_cast<const int64_t*>(id)
                                                    : *reinterpret_cast<const int32_t*>(id);
      if (row >= 0 && row < table.size[0]) continue;
      throw std::runtime_error("history: got id " + std::to_string(row) + ", need 0 to " +
                               std::to_string(table.size[0] - 1) + " (a row of the table)");
    }
  }
}

// The histories of one group, gathered from the table where they are ids.
template <class T>
void load_history(Vec<T>* lanes, const Plan<T>& p, const MIMNetArgs& args, Group group) {
  const Histories& histories = p.histories;
  if (histories && args.table.dims == 0) {
    return load_histories<T>(lanes, args.history, histories, group);
  }
  if (!args.table) return load_matrix<T>(lanes, args.history, group);
  with_storage(args.table.dtype, [&](auto storage) {
    using S = decltype(storage);
    // Position l of the first `users`.
    const auto gather = [&](int64_t l, int users) {
      const S* rows[kLanes<T>];
      for (int w = 0; w < users; ++w) {
        const int64_t user = group.user(w);
        const char* id =
            histories ? at(args.history, histories.first(user) + l) : at(args.history, user, l);
        const int64_t row = args.history.dtype == DType::int64
                                ? *reinterpret_cast<const int64_t*>(id)
                                : *reinterpret_cast<const int32_t*>(id);
        rows[w] = reinterpret_cast<const S*>(at(args.table, row));
      }
      load_lanes_from<T, S>(lanes + l * p.d, rows, users, p.d, args.table.stride[1]);
    };
    if (!histories) {
      for (int64_t l = 0; l < args.history.size[1]; ++l) gather(l, group.users);
      return;
    }
    for (int64_t d = 0; d < p.d; ++d) lanes[d] = Vec<T>{};
    histories.runs(group, [&](int64_t first, int64_t count, int users) {
      for (int64_t l = first; l < first + count; ++l) gather(l, users);
    });
  });
}

template <class T>
void forward(const MIMNetArgs& args) {
  const Plan<T> p(args, true);
  const int64_t k = p.k, d = p.d, hidden = p.bridge.hidden, most = p.blocks.per_block;
  const bool keep = bool(args.hidden_grad);
  args.execution.parallel(p.blocks.count, p.work(), [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(most * (3 * k * d + 3 * d) + RoutingState<T>::vectors(p.routing) +
                       FusionState<T>::vectors(p.fusion, most) +
                       BridgeState<T>::vectors(p.bridge, most, keep));
    Vec<T>* interests = scratch.take(most * k * d);
    Vec<T>* transferred = scratch.take(most * k * d);
    Vec<T>* transferred_grad = scratch.take(most * k * d);
    Vec<T>* source = scratch.take(most * d);
    Vec<T>* item = scratch.take(most * d);
    Vec<T>* prototype = scratch.take(most * d);
    const Scratch<T> routing_memory(scratch.take(RoutingState<T>::vectors(p.routing)));
    BridgeState<T> bridge(p.bridge, most, keep, scratch);
    FusionState<T> fusion(p.fusion, most, scratch);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t groups = p.blocks.size(block);
      for (int64_t g = 0; g < groups; ++g) {
        const Group group = p.blocks.group(block, g);
        const RoutingPlan<T> plan = plan_of_group(p.routing, p.histories, group);
        Scratch<T> of_group = routing_memory;
        RoutingState<T> routing(plan, of_group);
        load_history<T>(routing.inputs, p, args, group);
        load_routing_options<T>(plan, routing, args.logits, args.mask, View{}, group, p.histories);
        route<T>(plan, routing);
        store_matrix<T>(routing.pooled, args.pooled, group);
        for (int64_t i = 0; i < k * d; ++i) interests[g * k * d + i] = routing.capsules[i];
        for (int64_t i = 0; i < k; ++i) {
          squash_lanes<T>(interests + (g * k + i) * d, d, p.routing.squash);
        }
        load_rows<T>(source + g * d, args.source, group);
        load_rows<T>(item + g * d, args.item, group);
        load_rows<T>(prototype + g * d, args.prototype, group);
      }
      bridge_forward<T>(p.bridge, bridge, transferred, interests, source, groups);
      fuse<T>(p.fusion, fusion, item, prototype, transferred, groups);
      fuse_values<T>(p.fusion, fusion, groups);
      for (int64_t g = 0; g < groups; ++g) {
        const Group group = p.blocks.group(block, g);
        Vec<T> rating{};
        for (int64_t i = g * d; i < (g + 1) * d; ++i) rating += fusion.out[i] * item[i];
        store_column<T>(rating, args.ratings, group);
        store_matrix<T>(transferred + g * k * d, args.transferred, group);
      }
      if (!keep) continue;
      fuse_backward<T>(p.fusion, fusion, nullptr, nullptr, transferred_grad, item, transferred,
                       groups);
      bridge_hidden_backward<T>(p.bridge, bridge, transferred_grad, source, groups);
      for (int64_t g = 0; g < groups; ++g) {
        store_matrix<T>(bridge.hidden_grad + g * k * hidden, args.hidden_grad,
                        p.blocks.group(block, g));
      }
    }
  });
}

// The gradient of the histories, for which the couplings are found again.
template <class T>
void history_backward(const Plan<T>& p, const MIMNetArgs& args, Scratch<T> scratch,
                      const Vec<T>* capsule_grad, Group group) {
  const RoutingPlan<T> plan = plan_of_group(p.routing, p.histories, group);
  RoutingState<T> s(plan, scratch);
  load_history<T>(s.inputs, p, args, group);
  load_routing_options<T>(plan, s, args.logits, args.mask, View{}, group, p.histories);
  route<T>(plan, s);
  apply_routing_weight_transposed<T>(plan, s.pooled, capsule_grad);
  routing_input_gradient<T>(plan, s.inputs, s.coupling, s.pooled);
  if (p.histories) return store_histories<T>(s.inputs, args.grad_history, p.histories, group);
  store_matrix<T>(s.inputs, args.grad_history, group);
}

// What the gradients of the parameters need from every user.
template <class T>
struct UserRows {
  BridgeRows<T> bridge;
  FusionRows<T> fusion;
  Rows<T> pooled, capsules;  // B*K x D

  UserRows(const Plan<T>& p, int64_t users) : bridge(p.bridge, users), fusion(p.fusion, users) {
    pooled.allocate(users * p.k, p.d);
    capsules.allocate(users * p.k, p.d);
  }

  // All but the gradient of w2.
  void add(const Plan<T>& p, int64_t users, const MIMNetArgs& args,
           WeightGradients<T>& gradients) const {
    gradients.add({pooled.get(), pooled.width, capsules.get(), capsules.width, users * p.k, p.d,
                   p.d, args.grad_routing_weight});
    add_bridge_gradients<T>(p.bridge, bridge, users,
                            {args.grad_w1, args.grad_b1, args.grad_w2, args.grad_b2}, gradients);
    fusion.add(p.fusion, users, args.grad_fusion, gradients);
  }
};

// The gradients of the parameters, of one or a few groups of users at a time: by the thread that
// has their rows in the cache, then their sum, always in one order. Few parameters are less to
// exchange between threads than the rows of all users, many are more.
template <class T>
class GroupGradients {
 public:
  GroupGradients(const Plan<T>& p, const MIMNetArgs& args) {
    MIMNetArgs wanted = args;
    for (const View* view : parameters(wanted)) {
      if (*view) size_ += rows(*view) * padded<T>(columns(*view));
    }
    const int64_t of_a_user = p.k * (2 * padded<T>(p.bridge.hidden) + 4 * padded<T>(p.d)) +
                              10 * padded<T>(p.d) + kLanes<T>;
    const int64_t groups = p.blocks.groups;
    together_ = groups >= 16 ? 4 : groups >= 8 ? 2 : 1;  // not by threads: one order of sums
    if (2 * size_ > together_ * kLanes<T> * of_a_user) return;
    count_ = (groups + together_ - 1) / together_;
    sums_ = Buffer<T>(count_ * size_);
  }

  explicit operator bool() const { return count_ > 0; }

  // Groups that have one sum.
  int64_t together() const { return together_; }

  // Sum number `index`, from the rows of its users.
  void add(const Plan<T>& p, const MIMNetArgs& args, const UserRows<T>& rows, int64_t index,
           Scratch<T> scratch) {
    const int64_t most = together_ * kLanes<T>, left = p.batch - index * most;
    const int64_t users = left < most ? left : most;
    MIMNetArgs own = args;
    place(own, sums_.get() + index * size_);
    WeightGradients<T> gradients;
    rows.add(p, users, own, gradients);
    gradients.run_all();
    const BridgeW2Gradient<T> w2(p.bridge, rows.bridge, users, own.grad_w2, 1);
    for (int64_t unit = 0; unit < w2.units(); ++unit) w2.run(unit, scratch);
  }

  void store(const MIMNetArgs& args) {
    Vec<T>* total = reinterpret_cast<Vec<T>*>(sums_.get());
    const int64_t vectors = size_ / kLanes<T>;
    args.execution.parallel(vectors, count_, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        for (int64_t i = 1; i < count_; ++i) total[v] += total[i * vectors + v];
      }
    });
    MIMNetArgs wanted = args;
    for (const View* view : parameters(wanted)) {
      if (!*view) continue;
      store_sums<T>(total, rows(*view), columns(*view), *view);
      total += rows(*view) * padded<T>(columns(*view)) / kLanes<T>;
    }
  }

 private:
  static int64_t rows(const View& view) { return view.dims == 2 ? view.size[0] : 1; }
  static int64_t columns(const View& view) { return view.size[view.dims - 1]; }

  static std::array<View*, 13> parameters(MIMNetArgs& args) {
    FusionWeights& f = args.grad_fusion;
    return {&args.grad_routing_weight,
            &args.grad_w1,
            &args.grad_b1,
            &args.grad_w2,
            &args.grad_b2,
            &f.fine.key_weight,
            &f.fine.value_weight,
            &f.fine.value_bias,
            &f.coarse.key_weight,
            &f.coarse.value_weight,
            &f.coarse.value_bias,
            &f.weight,
            &f.bias};
  }

  // Makes padded matrices from `to` on of the gradients that are wanted.
  static void place(MIMNetArgs& args, T* to) {
    for (View* view : parameters(args)) {
      if (!*view) continue;
      view->data = to;
      view->dtype = LaneTypes<T>::dtype;
      view->stride[view->dims - 1] = 1;
      if (view->dims == 2) view->stride[0] = padded<T>(columns(*view));
      to += rows(*view) * padded<T>(columns(*view));
    }
  }

  int64_t size_ = 0, together_ = 1, count_ = 0;
  Buffer<T> sums_;  // `count_` of `size_` each
};

template <class T>
void backward(const MIMNetArgs& args) {
  const Plan<T> p(args, bool(args.grad_history));
  const int64_t k = p.k, d = p.d, hidden = p.bridge.hidden, batch = p.batch;
  GroupGradients<T> by_group(p, args);
  std::optional<UserRows<T>> all;
  if (!by_group) all.emplace(p, batch);
  const int64_t together = by_group.together();
  const Blocks<T> blocks = by_group ? p.blocks.in_multiples_of(together) : p.blocks;
  const int64_t most = blocks.per_block;
  args.execution.parallel(blocks.count, 2 * p.work(), [&](int64_t begin, int64_t end) {
    std::optional<UserRows<T>> of_sums[Blocks<T>::kMost];
    const UserRows<T>* rows[Blocks<T>::kMost];
    const BridgeRows<T>* bridge_rows[Blocks<T>::kMost];
    Group places[Blocks<T>::kMost];  // in the rows
    for (int64_t g = 0; g < most; ++g) {
      std::optional<UserRows<T>>& own = of_sums[g / together];
      if (by_group && !own) own.emplace(p, together * kLanes<T>);
      rows[g] = by_group ? &*own : &*all;
      bridge_rows[g] = &rows[g]->bridge;
    }
    const int64_t gradient_vectors = by_group ? BridgeW2Gradient<T>::vectors(p.bridge) : 0;
    Scratch<T> scratch(most * (5 * k * d + 7 * d) + k * d + RoutingState<T>::vectors(p.routing) +
                       FusionState<T>::vectors(p.fusion, most) +
                       BridgeState<T>::vectors(p.bridge, most, false) + gradient_vectors);
    const Scratch<T> gradient_memory(scratch.take(gradient_vectors));
    Vec<T>* capsules = scratch.take(most * k * d);
    Vec<T>* interests = scratch.take(most * k * d);
    Vec<T>* interests_grad = scratch.take(most * k * d);
    Vec<T>* transferred = scratch.take(most * k * d);
    Vec<T>* transferred_grad = scratch.take(most * k * d);
    Vec<T>* source = scratch.take(most * d);
    Vec<T>* source_grad = scratch.take(most * d);
    Vec<T>* item = scratch.take(most * d);
    Vec<T>* item_grad = scratch.take(most * d);
    Vec<T>* prototype = scratch.take(most * d);
    Vec<T>* prototype_grad = scratch.take(most * d);
    Vec<T>* user_grad = scratch.take(most * d);
    Vec<T>* pooled = scratch.take(k * d);
    const Scratch<T> routing_memory(scratch.take(RoutingState<T>::vectors(p.routing)));
    BridgeState<T> bridge(p.bridge, most, false, scratch);
    FusionState<T> fusion(p.fusion, most, scratch);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t groups = blocks.size(block);
      for (int64_t g = 0; g < groups; ++g) {
        const Group group = blocks.group(block, g);
        places[g] = by_group ? Group{g % together * kLanes<T>, group.users} : group;
        load_matrix<T>(pooled, args.pooled, group);
        apply_routing_weight<T>(p.routing, capsules + g * k * d, pooled);
        const Rows<T>& to = rows[g]->pooled;
        for (int64_t i = 0; i < k; ++i) {
          save_rows<T>(to.get(), to.width, pooled + i * d, d, places[g], k, i);
        }
        for (int64_t i = g * k * d; i < (g + 1) * k * d; ++i) interests[i] = capsules[i];
        for (int64_t i = 0; i < k; ++i) {
          squash_lanes<T>(interests + (g * k + i) * d, d, p.routing.squash);
        }
        load_matrix<T>(transferred + g * k * d, args.transferred, group);
        load_rows<T>(source + g * d, args.source, group);
        load_rows<T>(item + g * d, args.item, group);
        load_rows<T>(prototype + g * d, args.prototype, group);
      }
      fuse<T>(p.fusion, fusion, item, prototype, transferred, groups);
      for (int64_t g = 0; g < groups; ++g) {
        const Vec<T> grad = load_column<T>(args.grad, blocks.group(block, g));
        for (int64_t i = g * d; i < (g + 1) * d; ++i) user_grad[i] = grad * item[i];
        if (!args.hidden_grad) continue;
        Vec<T>* hidden_grad = bridge.hidden_grad + g * k * hidden;
        load_matrix<T>(hidden_grad, args.hidden_grad, blocks.group(block, g));
        for (int64_t i = 0; i < k * hidden; ++i) hidden_grad[i] *= grad;
      }
      fuse_backward<T>(p.fusion, fusion, args.grad_item ? item_grad : nullptr,
                       args.grad_prototype ? prototype_grad : nullptr, transferred_grad, user_grad,
                       transferred, groups);
      if (args.grad_item) fuse_values<T>(p.fusion, fusion, groups);
      bridge_hidden<T>(p.bridge, bridge, interests, groups);
      if (!args.hidden_grad) {
        bridge_hidden_backward<T>(p.bridge, bridge, transferred_grad, source, groups);
      }
      bridge_backward<T>(p.bridge, bridge, interests_grad, args.grad_source ? source_grad : nullptr,
                         transferred_grad, interests, source, groups, bridge_rows, places);
      for (int64_t g = 0; g < groups; ++g) {
        const Group group = blocks.group(block, g);
        Vec<T>* capsule_grad = interests_grad + g * k * d;
        const Rows<T>& to = rows[g]->capsules;
        for (int64_t i = 0; i < k; ++i) {
          squash_backward_lanes<T>(capsule_grad + i * d, capsules + (g * k + i) * d, d,
                                   p.routing.squash);
          save_rows<T>(to.get(), to.width, capsule_grad + i * d, d, places[g], k, i);
        }
        rows[g]->fusion.save(p.fusion, fusion, item, prototype, g, places[g]);
        if (args.grad_item) {
          const Vec<T> grad = load_column<T>(args.grad, group);
          for (int64_t i = g * d; i < (g + 1) * d; ++i) item_grad[i] += grad * fusion.out[i];
          store_rows<T>(item_grad + g * d, args.grad_item, group);
        }
        if (args.grad_prototype) store_rows<T>(prototype_grad + g * d, args.grad_prototype, group);
        if (args.grad_source) store_rows<T>(source_grad + g * d, args.grad_source, group);
        if (args.grad_history) history_backward(p, args, routing_memory, capsule_grad, group);
      }
      for (int64_t g = 0; by_group && g < groups; g += together) {
        by_group.add(p, args, *rows[g], (block * most + g) / together, gradient_memory);
      }
    }
  });
  if (by_group) return by_group.store(args);
  WeightGradients<T> gradients;
  all->add(p, batch, args, gradients);
  const BridgeW2Gradient<T> w2(p.bridge, all->bridge, batch, args.grad_w2,
                               args.execution.parallel.threads);
  run_gradients(gradients, w2, p.bridge.work() * batch, args.execution.parallel);
}

}  // namespace

void mimnet_forward(const MIMNetArgs& args) {
  check_ids(args.history, args.table);
  args.source.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void mimnet_forward_backward(const MIMNetArgs& args) {
  check_ids(args.history, args.table);
  args.source.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
