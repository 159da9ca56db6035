// The per-interest bridge for blocks of users, without a matrix per interest.
//
// With T[j, h] = sum_i source[i] w2[i, j, h], one contraction per user, interest k of that user
// costs only out[k, j] = sum_h hidden[k, h] T[j, h]. T is made in panels of a few j that stay in
// the cache.
#pragma once

#include "pairs.h"
#include "weight_gradients.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

// Arrays of a block are laid out group by group: element e of group g stands at g * elements + e.

template <class T>
class BridgePlan {
 public:
  int64_t interests, d_interest, d_source, d_target, hidden;
  const T *w1, *b1, *w2, *b2;
  bool pairs;  // the products with w2 are of pairs

  BridgePlan(const View& w1_view, const View& b1_view, const View& w2_view, const View& b2_view,
             int64_t k, int64_t source_width, const Parallel& parallel);

  int64_t panels() const { return (d_target + panel_ - 1) / panel_; }
  int64_t panel_begin(int64_t panel) const { return panel * panel_; }
  int64_t panel_size(int64_t panel) const {
    const int64_t left = d_target - panel * panel_;
    return left < panel_ ? left : panel_;
  }
  // Before gradients of the source.
  void pack_transposed(const Parallel& parallel);

  // T of one panel for a block: contracted[g][(j, h)]. `source` is as `as_terms` leaves it.
  void contract(Vec<T>* contracted, const Vec<T>* source, int64_t groups, int64_t panel) const;
  // The opposite: adds to the gradient of the source from that of T, which `scratch` has room for.
  void contract_backward(Vec<T>* source_grad, const Vec<T>* contracted_grad, int64_t groups,
                         int64_t panel, Vec<T>* scratch) const;
  // The values of each group, as pairs where products are of pairs, else themselves.
  const Vec<T>* as_terms(Vec<T>* scratch, const Vec<T>* values, int64_t groups, int64_t stride,
                         int64_t count) const;

  // Multiply-adds per user.
  int64_t work() const {
    return d_target * hidden * (d_source + interests) + interests * hidden * d_interest;
  }

 private:
  int64_t panel_;
  Parameter<T> w1_, b1_, w2_, b2_;
  // w2 by panel and tile, so that `contract` reads it in one stream; pairs in place of numbers.
  // Transposed, for the opposite: only of pairs, because the numbers lie as they are needed.
  Buffer<T> packed_, transposed_;
  int64_t panel_stride_, transposed_stride_ = 0;
};

template <class T>
struct BridgeState {
  Vec<T>* hidden;       // relu(w1 interests + b1), K x H
  Vec<T>* hidden_grad;  // before the ReLU, K x H
  Vec<T>* contracted;   // T: one panel, or all, one after another
  int64_t panel_step;   // between those; 0: each takes the place of the one before
  Vec<T>* terms;        // the source, or the gradient of a panel of T, as pairs
  Vec<T>* sum;          // b2 source, or the gradient of out summed over k, D_t

  static int64_t vectors(const BridgePlan<T>& p, int64_t groups, bool all_panels) {
    return groups * (2 * p.interests * p.hidden + p.d_target) +
           (all_panels ? p.panels() : 1) * panel_vectors(p, groups) + term_vectors(p, groups);
  }
  BridgeState(const BridgePlan<T>& p, int64_t groups, bool all_panels, Scratch<T>& scratch)
      : hidden(scratch.take(groups * p.interests * p.hidden)),
        hidden_grad(scratch.take(groups * p.interests * p.hidden)),
        contracted(scratch.take((all_panels ? p.panels() : 1) * panel_vectors(p, groups))),
        panel_step(all_panels ? panel_vectors(p, groups) : 0),
        terms(scratch.take(term_vectors(p, groups))),
        sum(scratch.take(groups * p.d_target)) {}

 private:
  static int64_t panel_vectors(const BridgePlan<T>& p, int64_t groups) {
    return groups * p.panel_size(0) * p.hidden;
  }
  static int64_t term_vectors(const BridgePlan<T>& p, int64_t groups) {
    if (!p.pairs) return 0;
    const int64_t panel = p.panel_size(0) * p.hidden;
    return groups * pairs_of(panel > p.d_source ? panel : p.d_source);
  }
};

// Fills hidden.
template <class T>
void bridge_hidden(const BridgePlan<T>& p, BridgeState<T>& s, const Vec<T>* interests,
                   int64_t groups);

// Sets out[g][k, j], and fills hidden and T.
template <class T>
void bridge_forward(const BridgePlan<T>& p, BridgeState<T>& s, Vec<T>* out, const Vec<T>* interests,
                    const Vec<T>* source, int64_t groups);

// Fills hidden_grad, from hidden and T, which is made again unless all panels are there.
template <class T>
void bridge_hidden_backward(const BridgePlan<T>& p, BridgeState<T>& s, const Vec<T>* out_grad,
                            const Vec<T>* source, int64_t groups);

// What the gradients of the parameters need from every user.
template <class T>
struct BridgeRows {
  Rows<T> source;     // B x D_s
  Rows<T> interests;  // B*K x D_i
  Rows<T> hidden;     // B*K x H
  Rows<T> hidden_grad;
  Rows<T> out_grad;      // B*K x D_t
  Rows<T> out_grad_sum;  // B x D_t, summed over k

  BridgeRows(const BridgePlan<T>& p, int64_t batch) {
    const int64_t rows = batch * p.interests;
    source.allocate(batch, p.d_source);
    interests.allocate(rows, p.d_interest);
    hidden.allocate(rows, p.hidden);
    hidden_grad.allocate(rows, p.hidden);
    out_grad.allocate(rows, p.d_target);
    out_grad_sum.allocate(batch, p.d_target);
  }
};

// Sets the gradients of interests and source (null: not wanted), from hidden, hidden_grad and the
// gradient of out. Group g leaves its rows in `rows[g]` as those of the users `places[g]`.
template <class T>
void bridge_backward(const BridgePlan<T>& p, BridgeState<T>& s, Vec<T>* interests_grad,
                     Vec<T>* source_grad, const Vec<T>* out_grad, const Vec<T>* interests,
                     const Vec<T>* source, int64_t groups, const BridgeRows<T>* const* rows,
                     const Group* places);

struct BridgeGradientViews {
  View w1, b1, w2, b2;
};

// Adds the gradients of w1, b1 and b2 to the list.
template <class T>
void add_bridge_gradients(const BridgePlan<T>& p, const BridgeRows<T>& rows, int64_t batch,
                          const BridgeGradientViews& views, WeightGradients<T>& gradients);

// The gradient of w2, in pieces of a few target dimensions.
template <class T>
class BridgeW2Gradient {
 public:
  BridgeW2Gradient(const BridgePlan<T>& p, const BridgeRows<T>& rows, int64_t batch,
                   const View& grad_w2, int64_t threads);
  int64_t units() const { return units_; }
  // Vectors of scratch that a unit takes at most.
  static int64_t vectors(const BridgePlan<T>& p) {
    const int64_t row = kWidth * padded<T>(p.hidden) / kLanes<T>;
    const int64_t source = p.pairs ? pairs_of(kChunk) * padded<T>(p.d_source) / kLanes<T> : 0;
    return (kChunk + p.d_source) * row + source;
  }
  Scratch<T> scratch() const { return Scratch<T>(vectors(plan_)); }
  void run(int64_t unit, Scratch<T> scratch) const;

 private:
  static constexpr int64_t kChunk = 64;  // users whose M is in the cache at a time
  static constexpr int64_t kWidth = 5;   // target dimensions in a unit, at most

  const BridgePlan<T>& plan_;
  const BridgeRows<T>& rows_;
  int64_t batch_;
  View out_;
  int64_t width_;  // target dimensions per unit
  int64_t units_;
};

// All gradients of the parameters, shared out among the threads.
template <class T>
void run_gradients(const WeightGradients<T>& gradients, const BridgeW2Gradient<T>& w2, int64_t work,
                   const Parallel& parallel) {
  const int64_t first = w2.units(), units = first + gradients.units();
  parallel.each(units, work / (units + 1), [&](int64_t unit) {
    unit < first ? w2.run(unit, w2.scratch()) : gradients.run(unit - first);
  });
}

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
