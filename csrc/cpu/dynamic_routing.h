// Dynamic routing of one group of users.
#pragma once

#include "../common/kernels.h"
#include "histories.h"
#include "matmul.h"
#include "memory.h"
#include "weight_gradients.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

enum class RoutingWeight { none, none_per_capsule, shared, per_capsule, per_position };

// The D_in x D matrices of a routing weight. An element is loaded for all users of a group at once,
// so they are read where they stand, whatever their strides; only other types are converted.
template <class T>
class RoutingMatrices {
 public:
  explicit RoutingMatrices(const View& weight) {
    if (!weight) return;
    View view = weight;
    if (weight.dtype != LaneTypes<T>::dtype) {
      converted_.reset(weight);
      data_ = converted_.get();
      for (int64_t d = weight.dims - 1, step = 1; d >= 0; step *= weight.size[d--]) {
        view.stride[d] = step;
      }
    } else {
      data_ = static_cast<const T*>(weight.data);
    }
    column_ = view.stride[view.dims - 1];
    row_ = view.stride[view.dims - 2];
    if (view.dims > 2) capsule_ = view.stride[view.dims - 3];
    if (view.dims > 3) {
      position_ = view.stride[0];
      last_ = view.size[0] - 1;
    }
  }

  SharedMatrix<T> at(int64_t l, int64_t k) const { return {matrix(l, k), row_, column_}; }
  SharedMatrix<T> transposed(int64_t l, int64_t k) const { return {matrix(l, k), column_, row_}; }

 private:
  // Histories that nobody could check, those of a traced graph, may be longer.
  const T* matrix(int64_t l, int64_t k) const {
    return data_ + (l < last_ ? l : last_) * position_ + k * capsule_;
  }

  Parameter<T> converted_;
  const T* data_ = nullptr;
  int64_t position_ = 0, capsule_ = 0, row_ = 0, column_ = 0;  // 0: one matrix for all
  int64_t last_ = 0;                                           // position
};

// G = W W^T of a shared weight W. In every pass but the last, a weighted sum p becomes a capsule
// u = p W only to be squashed and seen from the input space again, factor(|u|^2) u W^T. That is
// factor(p G . p) p G: one product instead of two.
template <class T>
class RoutingGram {
 public:
  RoutingGram(const RoutingMatrices<T>& weight, int64_t d_in, int64_t d);

  SharedMatrix<T> matrix() const { return {rows_.get(), rows_.width, 1}; }
  // |p W|^2 as a share of |p|^2 below which W nearly annihilates p, and p G is mostly the rounding
  // of G: those capsules are formed.
  T lost() const { return lost_; }

 private:
  Rows<T> rows_;
  T lost_;
};

template <class T>
struct RoutingPlan {
  int64_t length, capsules, d_in, d;
  RoutingWeight kind;
  const RoutingMatrices<T>* weight;  // null without one
  const RoutingGram<T>* gram;        // null where every pass applies the weight
  int64_t iterations;
  SoftmaxAxis axis;
  Padding padding;
  Update update;
  bool normalize_agreement;
  bool inner_squash, final_squash;
  T inverse_temperature;
  Squash squash;

  int64_t input_vectors() const {
    return length * d_in * (kind == RoutingWeight::none_per_capsule ? capsules : 1);
  }
  // Whether `route` takes fewer products with a Gram matrix, its own included.
  bool gram_pays() const {
    return kind == RoutingWeight::shared &&
           (iterations - 1) * capsules * (2 * d - d_in) * kLanes<T> > d_in * d;
  }
  // Multiply-adds per user.
  int64_t work() const {
    return (2 * iterations - 1) * capsules * d_in * (length + (weight != nullptr ? d : 0)) +
           iterations * capsules * length * 16;
  }
};

// None where the inputs are a batch.
inline Histories jagged_histories(const RoutingArgs& args, int64_t lanes) {
  return args.inputs.dims == 2 ? Histories(args.mask, args.inputs.size[0], lanes) : Histories();
}

// The users of a call, in the order in which they are routed.
template <class T>
struct Users {
  const Histories histories;
  const int64_t batch;
  const Blocks<T> blocks;

  explicit Users(const RoutingArgs& args) : Users(args, jagged_histories(args, kLanes<T>)) {}
  Users(const RoutingArgs& args, Histories&& found)
      : histories(std::move(found)),
        batch(histories ? histories.batch() : args.inputs.size[0]),
        blocks(batch, args.execution.parallel.threads, histories.order()) {}

  Group group(int64_t g) const { return blocks.group(g / blocks.per_block, g % blocks.per_block); }
  // What all users leave behind for their positions, where that is a row for each.
  int64_t rows(const RoutingArgs& args, int64_t length) const {
    return histories ? args.inputs.size[0] : batch * length;
  }
  // K x L of a group, of [B, K, L] or, with histories, [K, T].
  void load_by_position(Vec<T>* lanes, const View& view, Group group) const {
    histories ? load_history_rows<T>(lanes, view, histories, group)
              : load_matrix<T>(lanes, view, group);
  }
  void store_by_position(const Vec<T>* lanes, const View& view, Group group) const {
    if (!histories) return store_matrix<T>(lanes, view, group);
    if (view.dims == 2) return store_history_rows<T>(lanes, view, histories, group);
    store_history_matrix<T>(lanes, view, histories, group);
  }
};

// The logits of one group on their way to couplings.
template <class T>
struct RoutingLogits {
  Vec<T>* logits;    // K x L, changed by routing
  Vec<T>* coupling;  // K x L
  Vec<T>* mask;      // L: 1 at real items, else 0; null without a mask
  Vec<T>* present;   // K: 1 at real capsules, else 0; null without a capsule mask
};

// The arrays of one group; the sizes are in vectors.
template <class T>
struct RoutingState : RoutingLogits<T> {
  Vec<T>* inputs;        // L x D_in, or K x L x D
  Vec<T>* pooled;        // K x D_in
  Vec<T>* capsules;      // K x D: the last weighted sums after the weight, not squashed
  Vec<T>* back;          // K x D_in: capsules seen from the input space
  Vec<T>* seen;          // D_in: one of them
  Vec<T>* agreement;     // K x L, and
  Vec<T>* inverse_norm;  // K x L: 1 / |vote|; both only to normalise the agreement
  Vec<T>* votes;         // a tile of them, to find their norms

  static int64_t vectors(const RoutingPlan<T>& p) {
    return p.input_vectors() + (p.normalize_agreement ? 4 : 2) * p.capsules * p.length +
           (2 * p.capsules + 1) * p.d_in + p.capsules * p.d + p.length + p.capsules +
           tile_vectors(p);
  }
  static int64_t tile_vectors(const RoutingPlan<T>& p) {
    return p.normalize_agreement && p.weight != nullptr ? kTileM * p.d : 0;
  }
  RoutingState(const RoutingPlan<T>& p, Scratch<T>& scratch)
      : RoutingLogits<T>{scratch.take(p.capsules * p.length), scratch.take(p.capsules * p.length),
                         scratch.take(p.length), scratch.take(p.capsules)},
        inputs(scratch.take(p.input_vectors())),
        pooled(scratch.take(p.capsules * p.d_in)),
        capsules(scratch.take(p.capsules * p.d)),
        back(scratch.take(p.capsules * p.d_in)),
        seen(scratch.take(p.d_in)),
        agreement(scratch.take(p.normalize_agreement ? p.capsules * p.length : 0)),
        inverse_norm(scratch.take(p.normalize_agreement ? p.capsules * p.length : 0)),
        votes(scratch.take(tile_vectors(p))) {}
};

template <class T>
MIMNET_FAST_INLINE void copy_vectors(Vec<T>* to, const Vec<T>* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// 1 / max(|x|, 1e-12), as torch.nn.functional.normalize has it.
template <class T>
MIMNET_FAST_INLINE Vec<T> inverse_norm(const Vec<T>* x, int64_t count) {
  Vec<T> norm2{};
  for (int64_t d = 0; d < count; ++d) norm2 += x[d] * x[d];
  return T(1) / maximum(sqrt(norm2), splat(T(1e-12)));
}

// d|x|/dx = x / |x|, so with u = x / |x| and a = v . u the gradient of a is (v - a u) / |x|: this
// times a x is the second part. It is 0 where the norm was clamped.
template <class T>
MIMNET_FAST_INLINE Vec<T> radial_factor(Vec<T> inverse_norm) {
  return select(inverse_norm < T(0.99e12), inverse_norm * inverse_norm, Vec<T>{});
}

// The plan of one group, which runs only to its longest history.
template <class T>
RoutingPlan<T> plan_of_group(RoutingPlan<T> p, const Histories& histories, Group group) {
  if (histories) p.length = histories.positions(group);
  return p;
}

// Fills logits, mask and present for one group; null pointers where nothing was given. With
// histories, the mask says where these end.
template <class T>
void load_routing_options(const RoutingPlan<T>& p, RoutingLogits<T>& s, const View& logits,
                          const View& mask, const View& capsule_mask, Group group,
                          const Histories& histories);

// Softmax of the logits of positions [begin, end), all of them where it runs over the inputs, into
// the coupling; what padding sets to 0 afterwards is still there.
template <class T>
void softmax_logits(const RoutingPlan<T>& p, const RoutingLogits<T>& s, int64_t begin, int64_t end);

// Couplings become 0 at padded positions, unless their logits were filled before the softmax.
template <class T>
void mask_coupling(const RoutingPlan<T>& p, const RoutingLogits<T>& s);

// All iterations: coupling, pooled and capsules of the last one. Logits accumulate agreements.
template <class T>
void route(const RoutingPlan<T>& p, RoutingState<T>& s);

// pooled = inputs summed with the coefficients, K x L.
template <class T>
void pool_inputs(const RoutingPlan<T>& p, Vec<T>* pooled, const Vec<T>* coefficients,
                 const Vec<T>* inputs);

// out (+)= products of the K vectors of `back` with the inputs, K x L.
template <class T>
void compare_inputs(const RoutingPlan<T>& p, Vec<T>* out, const Vec<T>* back, const Vec<T>* inputs,
                    bool accumulate);

// capsules = pooled through the weight.
template <class T>
void apply_routing_weight(const RoutingPlan<T>& p, Vec<T>* capsules, const Vec<T>* pooled);

// pooled_grad = capsule_grad through the transposed weight.
template <class T>
void apply_routing_weight_transposed(const RoutingPlan<T>& p, Vec<T>* pooled_grad,
                                     const Vec<T>* capsule_grad);

// Gradient of the inputs of one group, K x L x D or L x D_in, from the coupling and the pooled
// gradient, or the sum of `terms` of them.
template <class T>
void routing_input_gradient(const RoutingPlan<T>& p, Vec<T>* grad, const Vec<T>* coupling,
                            const Vec<T>* pooled_grad, int64_t terms = 1);

// What the iterations of one group leave for the full gradient, and what that is made of. The
// gradient of a vote is a sum of terms, gu_kl = sum_j coefficients_jkl vectors_jk: term 2t is of
// the weighted sum of iteration t (its coupling, the gradient of the sum), term 2t + 1 of the
// agreement after it (the gradient of the agreement, the capsule). Votes never appear: a term gives
// the inputs coefficients times `seen`, and the weight the outer product of `pooled` and its
// vector.
template <class T>
struct RoutingTrace {
  Vec<T>* coefficients;   // terms x K x L
  Vec<T>* vectors;        // terms x K x D
  Vec<T>* pooled;         // terms x K x D_in: the inputs summed with the coefficients
  Vec<T>* seen;           // terms x K x D_in: the vectors seen from the input space
  Vec<T>* softmax;        // iterations x K x L: couplings before the mask
  Vec<T>* sums;           // iterations x K x D: capsules before the squash
  Vec<T>* coupling_grad;  // K x L
  Vec<T>* logit_grad;     // K x L
  Vec<T>* agreement;      // iterations x K x L, and
  Vec<T>* radial;         // K x L: what a normalised vote takes from its own gradient, times itself

  static int64_t terms(const RoutingPlan<T>& p) { return 2 * p.iterations - 1; }
  static int64_t vectors_of(const RoutingPlan<T>& p) {
    const int64_t kl = p.capsules * p.length;
    return terms(p) * (kl + p.capsules * (p.d + 2 * p.d_in)) +
           p.iterations * (kl + p.capsules * p.d) + 2 * kl +
           (p.normalize_agreement ? (p.iterations + 1) * kl : 0);
  }
  RoutingTrace(const RoutingPlan<T>& p, Scratch<T>& scratch)
      : coefficients(scratch.take(terms(p) * p.capsules * p.length)),
        vectors(scratch.take(terms(p) * p.capsules * p.d)),
        pooled(scratch.take(terms(p) * p.capsules * p.d_in)),
        seen(scratch.take(terms(p) * p.capsules * p.d_in)),
        softmax(scratch.take(p.iterations * p.capsules * p.length)),
        sums(scratch.take(p.iterations * p.capsules * p.d)),
        coupling_grad(scratch.take(p.capsules * p.length)),
        logit_grad(scratch.take(p.capsules * p.length)),
        agreement(scratch.take(p.normalize_agreement ? p.iterations * p.capsules * p.length : 0)),
        radial(scratch.take(p.normalize_agreement ? p.capsules * p.length : 0)) {}
};

// route() with every update, with normalised agreement, with a trace where there is one.
template <class T>
void route_any(const RoutingPlan<T>& p, RoutingState<T>& s, const RoutingTrace<T>* trace = nullptr);

// Walks the iterations of a trace backwards, from the gradient of the last sums, which is the
// vector of the last term, to all terms, and to that of the first logits where it is wanted.
template <class T>
void route_backward(const RoutingPlan<T>& p, const RoutingState<T>& s, const RoutingTrace<T>& trace,
                    bool wants_logits);

// Gradient of the inputs from a trace.
template <class T>
void traced_input_gradient(const RoutingPlan<T>& p, Vec<T>* grad, const RoutingState<T>& s,
                           const RoutingTrace<T>& trace);

// The gradient of couplings at positions [begin, end) becomes that of their logits; s.coupling is
// the softmax before the mask.
template <class T>
void softmax_gradient(const RoutingPlan<T>& p, const RoutingLogits<T>& s, Vec<T>* grad,
                      int64_t begin, int64_t end);

// Takes the gradients of the first logits to where they belong: each to its user or history, or,
// where all users share the logits, to a sum in one order.
template <class T>
class LogitGradients {
 public:
  LogitGradients(const RoutingArgs& args, const Users<T>& users, const RoutingPlan<T>& whole);

  // One of K x L of group g, with the plan of that group.
  void store(const RoutingPlan<T>& p, int64_t g, const Vec<T>* grad) const;
  // After all groups.
  void sum() const;

 private:
  void sum_groups() const;
  void sum_histories() const;

  const RoutingArgs& args_;
  const Users<T>& users_;
  const int64_t kl_;
  const bool shared_;     // by all users
  Buffer<Vec<T>> lanes_;  // groups x K x L, of shared logits
  Rows<T> rows_;          // K x T, of those of histories
};

// The op where votes are formed again in every pass, because routing cannot stay in the input
// space.
template <class T>
void route_positions(const RoutingArgs& args, const RoutingPlan<T>& whole, const Users<T>& users);
template <class T>
void route_positions_backward(const RoutingArgs& args, const RoutingPlan<T>& whole,
                              const Users<T>& users);

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
