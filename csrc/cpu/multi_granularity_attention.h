// Two target-guided attentions over the same interests and their gate, for blocks of users.
#pragma once

#include "target_attention.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

template <class T>
class FusionPlan {
 public:
  AttentionPlan<T> fine, coarse;
  const T *weight, *bias;

  FusionPlan(const FusionWeights& weights, int64_t k, int64_t d)
      : fine(weights.fine, k, d),
        coarse(weights.coarse, k, d),
        weight_(weights.weight),
        bias_(weights.bias) {
    weight = weight_.get();
    bias = bias_.get();
  }

  int64_t work() const { return fine.work() + coarse.work() + 4 * fine.d; }

 private:
  Parameter<T> weight_, bias_;
};

template <class T>
struct FusionState {
  AttentionState<T> fine, coarse;
  Vec<T>* gate;             // 1
  Vec<T>* gate_logit_grad;  // 1
  Vec<T>* out;              // D
  Vec<T>* fine_grad;        // D
  Vec<T>* coarse_grad;      // D

  static int64_t vectors(const FusionPlan<T>& p, int64_t groups) {
    return 2 * AttentionState<T>::vectors(p.fine, groups) + groups * (2 + 3 * p.fine.d);
  }
  FusionState(const FusionPlan<T>& p, int64_t groups, Scratch<T>& scratch)
      : fine(p.fine, groups, scratch),
        coarse(p.coarse, groups, scratch),
        gate(scratch.take(groups)),
        gate_logit_grad(scratch.take(groups)),
        out(scratch.take(groups * p.fine.d)),
        fine_grad(scratch.take(groups * p.fine.d)),
        coarse_grad(scratch.take(groups * p.fine.d)) {}
};

// Fills the gate, and of both attentions what `attend` does.
template <class T>
void fuse(const FusionPlan<T>& p, FusionState<T>& s, const Vec<T>* item, const Vec<T>* prototype,
          const Vec<T>* interests, int64_t groups);

// After `fuse`: fills out, which gradients do not need.
template <class T>
void fuse_values(const FusionPlan<T>& p, FusionState<T>& s, int64_t groups);

// After `fuse`: sets interests_grad, and item_grad and prototype_grad unless null.
template <class T>
void fuse_backward(const FusionPlan<T>& p, FusionState<T>& s, Vec<T>* item_grad,
                   Vec<T>* prototype_grad, Vec<T>* interests_grad, const Vec<T>* out_grad,
                   const Vec<T>* interests, int64_t groups);

// What the gradients of the parameters need from every candidate.
template <class T>
struct FusionRows {
  AttentionRows<T> fine, coarse;
  Rows<T> gate_logit_grad;

  FusionRows(const FusionPlan<T>& p, int64_t rows) : fine(p.fine, rows), coarse(p.coarse, rows) {
    gate_logit_grad.allocate(rows, 1);
  }

  // Rows of one group, after `fuse_backward`.
  void save(const FusionPlan<T>& p, const FusionState<T>& s, const Vec<T>* item,
            const Vec<T>* prototype, int64_t g, Group group) const {
    fine.save(p.fine, s.fine, item, s.fine_grad, g, group);
    coarse.save(p.coarse, s.coarse, prototype, s.coarse_grad, g, group);
    save_rows<T>(gate_logit_grad.get(), gate_logit_grad.width, s.gate_logit_grad + g, 1, group);
  }

  void add(const FusionPlan<T>& p, int64_t rows, const FusionWeights& views,
           WeightGradients<T>& gradients) const {
    const int64_t d = p.fine.d, w = fine.query.width;
    fine.add(p.fine, rows, views.fine, gradients);
    coarse.add(p.coarse, rows, views.coarse, gradients);
    const T* gate = gate_logit_grad.get();
    View half = views.weight;
    gradients.add({gate, gate_logit_grad.width, fine.query.get(), w, rows, 1, d, half});
    if (half) half.data = at(half, d);
    gradients.add({gate, gate_logit_grad.width, coarse.query.get(), w, rows, 1, d, half});
    gradients.add_sum(gate, gate_logit_grad.width, rows, 1, views.bias);
  }
};

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
