// Dynamic routing of one group of users.
#pragma once

#include "matmul.h"
#include "memory.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

enum class RoutingWeight { none, none_per_capsule, shared, per_capsule };

template <class T>
struct RoutingPlan {
  int64_t length, capsules, d_in, d;
  RoutingWeight kind;
  const T* weight;
  int64_t iterations;
  SoftmaxAxis axis;
  Padding padding;
  bool inner_squash, final_squash;
  T inverse_temperature;
  Squash squash;

  int64_t input_vectors() const {
    return length * d_in * (kind == RoutingWeight::none_per_capsule ? capsules : 1);
  }
  // Multiply-adds per user.
  int64_t work() const {
    return (2 * iterations - 1) * capsules * d_in * (length + (weight != nullptr ? d : 0)) +
           iterations * capsules * length * 16;
  }
};

// The arrays of one group; the sizes are in vectors.
template <class T>
struct RoutingState {
  Vec<T>* inputs;    // L x D_in, or K x L x D
  Vec<T>* logits;    // K x L, changed by routing
  Vec<T>* coupling;  // K x L
  Vec<T>* pooled;    // K x D_in
  Vec<T>* capsules;  // K x D: the last weighted sums after the weight, not squashed
  Vec<T>* back;      // K x D_in: capsules seen from the input space
  Vec<T>* mask;      // L: 1 at real items, else 0; null without a mask
  Vec<T>* present;   // K: 1 at real capsules, else 0; null without a capsule mask

  static int64_t vectors(const RoutingPlan<T>& p) {
    return p.input_vectors() + 2 * p.capsules * p.length + 2 * p.capsules * p.d_in +
           p.capsules * p.d + p.length + p.capsules;
  }
  RoutingState(const RoutingPlan<T>& p, Scratch<T>& scratch)
      : inputs(scratch.take(p.input_vectors())),
        logits(scratch.take(p.capsules * p.length)),
        coupling(scratch.take(p.capsules * p.length)),
        pooled(scratch.take(p.capsules * p.d_in)),
        capsules(scratch.take(p.capsules * p.d)),
        back(scratch.take(p.capsules * p.d_in)),
        mask(scratch.take(p.length)),
        present(scratch.take(p.capsules)) {}
};

// Fills logits, mask and present of the state for one group; null pointers where nothing was given.
template <class T>
void load_routing_options(const RoutingPlan<T>& p, RoutingState<T>& s, const View& logits,
                          const View& mask, const View& capsule_mask, Group group);

// All iterations: coupling, pooled and capsules of the last one.
template <class T>
void route(const RoutingPlan<T>& p, RoutingState<T>& s);

// capsules = pooled through the weight.
template <class T>
void apply_routing_weight(const RoutingPlan<T>& p, Vec<T>* capsules, const Vec<T>* pooled);

// pooled_grad = capsule_grad through the transposed weight.
template <class T>
void apply_routing_weight_transposed(const RoutingPlan<T>& p, Vec<T>* pooled_grad,
                                     const Vec<T>* capsule_grad);

// Gradient of the inputs of one group, K x L x D or L x D_in, from the coupling and the pooled
// gradient.
template <class T>
void routing_input_gradient(const RoutingPlan<T>& p, Vec<T>* grad, const Vec<T>* coupling,
                            const Vec<T>* pooled_grad);

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
