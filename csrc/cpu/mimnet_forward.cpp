#include "mimnet_forward.h"

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

// Those of a jagged history, or of a batch whose padding has no weight and gets no gradient.
Histories histories_of(MIMNetArgs& args, int64_t lanes) {
  if (is_jagged(args)) return Histories(args.mask, args.history.size[0], lanes);
  if (args.padding == Padding::fill_before || args.grad_history) return {};
  return without_padding(args.history, args.mask, lanes);
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

  Plan(const MIMNetArgs& args, Histories&& of_users, bool routes)
      : batch(args.source.size[0]),
        k(args.logits.size[args.logits.dims - 2]),
        d(args.source.size[1]),
        routing_weight(args.routing_weight),
        bridge(args.w1, args.b1, args.w2, args.b2, k, d, args.execution.parallel),
        fusion(args.fusion, k, d),
        histories(std::move(of_users)),
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
    if (args.grad_source) bridge.pack_transposed(args.execution.parallel);
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

// The arrays of one block, and where its users are.
template <class T>
struct BlockState {
  Vec<T>* pooled;    // K x D
  Vec<T>* capsules;  // K x D, not squashed
  Vec<T>* interests;
  Vec<T>* interests_grad;
  Vec<T>* transferred;
  Vec<T>* transferred_grad;
  Vec<T>* source;  // D
  Vec<T>* source_grad;
  Vec<T>* item;
  Vec<T>* item_grad;
  Vec<T>* prototype;
  Vec<T>* prototype_grad;
  Vec<T>* user_grad;
  Vec<T>* rating;  // 1
  Vec<T>* rating_grad;
  Scratch<T> routing;  // of one group
  BridgeState<T> bridge;
  FusionState<T> fusion;
  Group places[Blocks<T>::kMost];
  int64_t groups = 0;

  static int64_t vectors(const Plan<T>& p, int64_t most, bool all_panels) {
    return most * (6 * p.k * p.d + 7 * p.d + 2) + RoutingState<T>::vectors(p.routing) +
           BridgeState<T>::vectors(p.bridge, most, all_panels) +
           FusionState<T>::vectors(p.fusion, most);
  }
  BlockState(const Plan<T>& p, int64_t most, bool all_panels, Scratch<T>& scratch)
      : pooled(scratch.take(most * p.k * p.d)),
        capsules(scratch.take(most * p.k * p.d)),
        interests(scratch.take(most * p.k * p.d)),
        interests_grad(scratch.take(most * p.k * p.d)),
        transferred(scratch.take(most * p.k * p.d)),
        transferred_grad(scratch.take(most * p.k * p.d)),
        source(scratch.take(most * p.d)),
        source_grad(scratch.take(most * p.d)),
        item(scratch.take(most * p.d)),
        item_grad(scratch.take(most * p.d)),
        prototype(scratch.take(most * p.d)),
        prototype_grad(scratch.take(most * p.d)),
        user_grad(scratch.take(most * p.d)),
        rating(scratch.take(most)),
        rating_grad(scratch.take(most)),
        routing(scratch.take(RoutingState<T>::vectors(p.routing))),
        bridge(p.bridge, most, all_panels, scratch),
        fusion(p.fusion, most, scratch) {}

  // Takes the place of the block before.
  void load(const MIMNetArgs& args, const Blocks<T>& blocks, int64_t block) {
    const int64_t d = args.source.size[1];
    groups = blocks.size(block);
    for (int64_t g = 0; g < groups; ++g) {
      places[g] = blocks.group(block, g);
      load_rows<T>(source + g * d, args.source, places[g]);
      load_rows<T>(item + g * d, args.item, places[g]);
      load_rows<T>(prototype + g * d, args.prototype, places[g]);
    }
  }
};

template <class T>
void squash_capsules(const Plan<T>& p, BlockState<T>& s) {
  const int64_t d = p.d;
  copy_vectors<T>(s.interests, s.capsules, s.groups * p.k * d);
  for (int64_t i = 0; i < s.groups * p.k; ++i) {
    squash_lanes<T>(s.interests + i * d, d, p.routing.squash);
  }
}

// From histories to the output of the attentions, and to ratings.
template <class T>
void rate(const Plan<T>& p, BlockState<T>& s, const MIMNetArgs& args) {
  const int64_t k = p.k, d = p.d;
  for (int64_t g = 0; g < s.groups; ++g) {
    const Group group = s.places[g];
    const RoutingPlan<T> plan = plan_of_group(p.routing, p.histories, group);
    Scratch<T> of_group = s.routing;
    RoutingState<T> routing(plan, of_group);
    routing.pooled = s.pooled + g * k * d;
    routing.capsules = s.capsules + g * k * d;
    load_history<T>(routing.inputs, p, args, group);
    load_routing_options<T>(plan, routing, args.logits, args.mask, View{}, group, p.histories);
    route<T>(plan, routing);
  }
  squash_capsules(p, s);
  bridge_forward<T>(p.bridge, s.bridge, s.transferred, s.interests, s.source, s.groups);
  fuse<T>(p.fusion, s.fusion, s.item, s.prototype, s.transferred, s.groups);
  fuse_values<T>(p.fusion, s.fusion, s.groups);
  for (int64_t g = 0; g < s.groups; ++g) {
    Vec<T> rating{};
    for (int64_t i = g * d; i < (g + 1) * d; ++i) rating += s.fusion.out[i] * s.item[i];
    s.rating[g] = rating;
    store_column<T>(rating, args.ratings, s.places[g]);
  }
}

template <class T>
void forward(const MIMNetArgs& call) {
  MIMNetArgs args = call;
  const Plan<T> p(args, histories_of(args, kLanes<T>), true);
  const int64_t most = p.blocks.per_block;
  const bool keep = bool(args.hidden_grad);
  args.execution.parallel(p.blocks.count, p.work(), [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(BlockState<T>::vectors(p, most, keep));
    BlockState<T> s(p, most, keep, scratch);
    for (int64_t block = begin; block < end; ++block) {
      s.load(args, p.blocks, block);
      rate(p, s, args);
      if (keep) {
        fuse_backward<T>(p.fusion, s.fusion, nullptr, nullptr, s.transferred_grad, s.item,
                         s.transferred, s.groups);
        bridge_hidden_backward<T>(p.bridge, s.bridge, s.transferred_grad, s.source, s.groups);
      }
      for (int64_t g = 0; g < s.groups; ++g) {
        const Group group = s.places[g];
        store_matrix<T>(s.pooled + g * p.k * p.d, args.pooled, group);
        store_matrix<T>(s.transferred + g * p.k * p.d, args.transferred, group);
        if (!keep) continue;
        store_matrix<T>(s.bridge.hidden_grad + g * p.k * p.bridge.hidden, args.hidden_grad, group);
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

// All gradients. `start` fills, of every block that was loaded, what `rate` does, and rating_grad;
// the gradient of the bridge's hidden units too where that was kept.
template <class T, class Start>
void differentiate(const Plan<T>& p, const MIMNetArgs& args, bool all_panels, Start&& start) {
  const int64_t k = p.k, d = p.d, batch = p.batch;
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
    Scratch<T> scratch(BlockState<T>::vectors(p, most, all_panels) + gradient_vectors);
    const Scratch<T> gradient_memory(scratch.take(gradient_vectors));
    BlockState<T> s(p, most, all_panels, scratch);
    for (int64_t block = begin; block < end; ++block) {
      s.load(args, blocks, block);
      start(s);
      for (int64_t g = 0; g < s.groups; ++g) {
        places[g] = by_group ? Group{g % together * kLanes<T>, s.places[g].users} : s.places[g];
        for (int64_t i = g * d; i < (g + 1) * d; ++i) s.user_grad[i] = s.rating_grad[g] * s.item[i];
      }
      fuse_backward<T>(p.fusion, s.fusion, args.grad_item ? s.item_grad : nullptr,
                       args.grad_prototype ? s.prototype_grad : nullptr, s.transferred_grad,
                       s.user_grad, s.transferred, s.groups);
      if (!args.hidden_grad) {
        bridge_hidden_backward<T>(p.bridge, s.bridge, s.transferred_grad, s.source, s.groups);
      }
      bridge_backward<T>(p.bridge, s.bridge, s.interests_grad,
                         args.grad_source ? s.source_grad : nullptr, s.transferred_grad,
                         s.interests, s.source, s.groups, bridge_rows, places);
      if (args.grad_item) fuse_values<T>(p.fusion, s.fusion, s.groups);
      for (int64_t g = 0; g < s.groups; ++g) {
        const Group group = s.places[g];
        Vec<T>* capsule_grad = s.interests_grad + g * k * d;
        const Rows<T>&pooled = rows[g]->pooled, &capsules = rows[g]->capsules;
        for (int64_t i = 0; i < k; ++i) {
          const int64_t at = (g * k + i) * d;
          squash_backward_lanes<T>(capsule_grad + i * d, s.capsules + at, d, p.routing.squash);
          save_rows<T>(pooled.get(), pooled.width, s.pooled + at, d, places[g], k, i);
          save_rows<T>(capsules.get(), capsules.width, capsule_grad + i * d, d, places[g], k, i);
        }
        rows[g]->fusion.save(p.fusion, s.fusion, s.item, s.prototype, g, places[g]);
        if (args.grad_item) {
          for (int64_t i = g * d; i < (g + 1) * d; ++i) {
            s.item_grad[i] += s.rating_grad[g] * s.fusion.out[i];
          }
          store_rows<T>(s.item_grad + g * d, args.grad_item, group);
        }
        if (args.grad_prototype) {
          store_rows<T>(s.prototype_grad + g * d, args.grad_prototype, group);
        }
        if (args.grad_source) store_rows<T>(s.source_grad + g * d, args.grad_source, group);
        if (args.grad_history) history_backward(p, args, s.routing, capsule_grad, group);
      }
      for (int64_t g = 0; by_group && g < s.groups; g += together) {
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

template <class T>
void backward(const MIMNetArgs& call) {
  MIMNetArgs args = call;
  const bool routes = bool(args.grad_history);
  const Plan<T> p(args, routes ? histories_of(args, kLanes<T>) : Histories(), routes);
  const int64_t kd = p.k * p.d, kh = p.k * p.bridge.hidden;
  differentiate(p, args, false, [&](BlockState<T>& s) {
    for (int64_t g = 0; g < s.groups; ++g) {
      const Group group = s.places[g];
      load_matrix<T>(s.pooled + g * kd, args.pooled, group);
      load_matrix<T>(s.transferred + g * kd, args.transferred, group);
      apply_routing_weight<T>(p.routing, s.capsules + g * kd, s.pooled + g * kd);
      s.rating_grad[g] = load_column<T>(args.grad, group);
      if (!args.hidden_grad) continue;
      Vec<T>* hidden_grad = s.bridge.hidden_grad + g * kh;
      load_matrix<T>(hidden_grad, args.hidden_grad, group);
      for (int64_t i = 0; i < kh; ++i) hidden_grad[i] *= s.rating_grad[g];
    }
    squash_capsules(p, s);
    bridge_hidden<T>(p.bridge, s.bridge, s.interests, s.groups);
    fuse<T>(p.fusion, s.fusion, s.item, s.prototype, s.transferred, s.groups);
  });
}

}  // namespace

template <class T>
void mimnet_descent(const MIMNetArgs& call, const SquaredErrors& errors) {
  check_ids(call.history, call.table);
  MIMNetArgs args = call;
  const Plan<T> p(args, histories_of(args, kLanes<T>), true);
  differentiate(p, args, true, [&](BlockState<T>& s) {
    rate(p, s, args);
    for (int64_t g = 0; g < s.groups; ++g) {
      const Vec<T> error = s.rating[g] - load_column<T>(errors.target, s.places[g]);
      s.rating_grad[g] = T(2) / T(p.batch) * error;
      if (errors.weight) s.rating_grad[g] *= load_column<T>(errors.weight, s.places[g]);
    }
  });
}

template void mimnet_descent<float>(const MIMNetArgs&, const SquaredErrors&);
template void mimnet_descent<double>(const MIMNetArgs&, const SquaredErrors&);

void mimnet_forward(const MIMNetArgs& args) {
  check_ids(args.history, args.table);
  args.source.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void mimnet_forward_backward(const MIMNetArgs& args) {
  check_ids(args.history, args.table);
  args.source.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
