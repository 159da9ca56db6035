// A weight per position whose votes are too many to keep: there is no input space to stay in,
// because every vote has a matrix of its own. Votes are formed again in each pass over the
// positions, those of one position at a time, and an iteration is one pass: agreement with the
// capsules of the iteration before, softmax, weighted sum. Only a softmax over the inputs needs a
// pass for the agreement and one for the sum.
//
// A task is a chunk of positions for a block of groups, which shares the loads of the weight. Each
// chunk leaves partial sums, so that a small batch with many positions keeps all threads busy.
#include <algorithm>

#include "dynamic_routing.h"
#include "ops.h"
#include "weight_gradients.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

constexpr int64_t kChunk = 32;  // positions of a task: fixed, so that sums depend on no thread

template <class T>
MIMNET_FAST_INLINE Vec<T> dot(const Vec<T>* a, const Vec<T>* b, int64_t count) {
  Vec<T> sum{};
  for (int64_t d = 0; d < count; ++d) sum += a[d] * b[d];
  return sum;
}

template <class T>
class PositionRouting {
 public:
  PositionRouting(const RoutingArgs& args, const RoutingPlan<T>& plan, const Users<T>& users,
                  int64_t terms)
      : args_(args),
        p_(plan),
        users_(users),
        parallel_(args.execution.parallel),
        blocks_(users.blocks),
        terms_(terms),
        chunks_((plan.length + kChunk - 1) / kChunk),
        kl_(plan.capsules * plan.length),
        kd_(plan.capsules * plan.d),
        coefficients_(terms * blocks_.groups * kl_),
        vectors_(terms * blocks_.groups * kd_) {}

  void forward() {
    load_options();
    iterate();
    groups([&](int64_t g) {
      mask_coupling(plan_of(g), logits_of(g, 0));
      users_.store_by_position(coefficients(0, g), args_.coupling, group(g));
      store_matrix<T>(sums(0, g), args_.pooled, group(g));
      if (p_.final_squash) squash_all(sums(0, g));
      store_matrix<T>(sums(0, g), args_.out, group(g));
    });
  }

  void full_backward() {
    load_options();
    iterate();
    groups([&](int64_t g) { load_sum_gradient(g); });
    walk_back();
    const LogitGradients<T> logit_grads(args_, users_, p_);
    groups([&](int64_t g) {
      const RoutingPlan<T> plan = plan_of(g);
      for (int64_t step = 0; step < p_.iterations; ++step) mask_coupling(plan, logits_of(g, step));
      logit_grads.store(plan, g, logit_grad_.get() + g * kl_);
    });
    logit_grads.sum();
    store_gradients();
  }

  void last_backward() {
    sums_ = Buffer<Vec<T>>(blocks_.groups * kd_);
    groups([&](int64_t g) {
      users_.load_by_position(coefficients(0, g), args_.coupling, group(g));
      load_matrix<T>(sums(0, g), args_.pooled, group(g));
      load_sum_gradient(g);
    });
    store_gradients();
  }

 private:
  int64_t first_of(int64_t block) const { return block * blocks_.per_block; }
  Group group(int64_t g) const { return users_.group(g); }
  RoutingPlan<T> plan_of(int64_t g) const { return plan_of_group(p_, users_.histories, group(g)); }
  // Positions of a group, which are the width of its rows too.
  int64_t length(int64_t g) const {
    return users_.histories ? users_.histories.positions(group(g)) : p_.length;
  }
  // The longest of a block.
  int64_t block_length(int64_t block) const {
    int64_t most = 0;
    for (int64_t i = 0; i < blocks_.size(block); ++i) {
      most = std::max(most, length(first_of(block) + i));
    }
    return most;
  }

  Vec<T>* coefficients(int64_t term, int64_t g) const {
    return coefficients_.get() + (term * blocks_.groups + g) * kl_;
  }
  Vec<T>* vectors(int64_t term, int64_t g) const {
    return vectors_.get() + (term * blocks_.groups + g) * kd_;
  }
  Vec<T>* partial(int64_t g, int64_t chunk) const {
    return partial_.get() + (g * chunks_ + chunk) * kd_;
  }
  // Where an iteration leaves its coupling, its capsules and its sums: all of them are kept where
  // there is a term for each.
  int64_t coupling_term(int64_t step) const { return terms_ > 1 ? 2 * step : 0; }
  int64_t capsule_term(int64_t step) const { return terms_ > 1 ? 2 * step + 1 : 0; }
  Vec<T>* sums(int64_t step, int64_t g) const {
    return sums_.get() + ((terms_ > 1 ? step : 0) * blocks_.groups + g) * kd_;
  }

  RoutingLogits<T> logits_of(int64_t g, int64_t step) const {
    return {logits_.get() + g * kl_, coefficients(coupling_term(step), g),
            args_.mask ? mask_.get() + g * p_.length : nullptr,
            args_.capsule_mask ? present_.get() + g * p_.capsules : nullptr};
  }

  // What a coupling after the softmax is multiplied with; null for nothing.
  const Vec<T>* mask_after(int64_t g) const {
    return args_.mask && p_.padding != Padding::fill_before ? mask_.get() + g * p_.length : nullptr;
  }

  template <class F>
  void groups(F&& body) const {
    parallel_(blocks_.groups, (kl_ + chunks_ * kd_) * kLanes<T>, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) body(g);
    });
  }

  // body(g, l, votes) for every group and position; the order of the positions of a chunk is kept.
  template <class F>
  void positions(F&& body) const {
    const int64_t most = blocks_.per_block, d_in = p_.d_in;
    parallel_(chunks_ * blocks_.count, kChunk * most * kd_ * (d_in + 2) * kLanes<T>,
              [&](int64_t begin, int64_t end) {
                Scratch<T> scratch(most * (d_in + kd_));
                Vec<T>* inputs = scratch.take(most * d_in);
                Vec<T>* votes = scratch.take(most * kd_);
                for (int64_t task = begin; task < end; ++task) {
                  const int64_t block = task % blocks_.count;
                  const int64_t first = task / blocks_.count * kChunk;
                  const int64_t end = std::min(first + kChunk, block_length(block));
                  for (int64_t l = first; l < end; ++l) {
                    load_inputs(inputs, block, l);
                    form_votes(votes, inputs, blocks_.size(block), l, 0, p_.capsules);
                    for (int64_t i = 0; i < blocks_.size(block); ++i) {
                      const int64_t g = first_of(block) + i;
                      if (l < length(g)) body(g, l, votes + i * kd_);
                    }
                  }
                }
              });
  }

  void load_inputs(Vec<T>* inputs, int64_t block, int64_t l) const {
    for (int64_t i = 0; i < blocks_.size(block); ++i) {
      load_input(inputs + i * p_.d_in, first_of(block) + i, l);
    }
  }

  // One position of a group; zeros for users whose history is shorter.
  void load_input(Vec<T>* input, int64_t g, int64_t l) const {
    if (!users_.histories) return load_rows<T>(input, args_.inputs, group(g), l);
    int64_t rows[kLanes<T>];
    load_rows<T>(input, args_.inputs, users_.histories.rows_at(group(g), l, rows));
  }

  void store_input(const Vec<T>* grad, int64_t g, int64_t l) const {
    if (!users_.histories) return store_rows<T>(grad, args_.grad_inputs, group(g), l);
    int64_t rows[kLanes<T>];
    store_rows<T>(grad, args_.grad_inputs, users_.histories.rows_at(group(g), l, rows));
  }

  void form_votes(Vec<T>* votes, const Vec<T>* inputs, int64_t groups, int64_t l, int64_t first,
                  int64_t last) const {
    for (int64_t k = first; k < last; ++k) {
      multiply<T>({votes + k * p_.d, kd_, 1}, {inputs, p_.d_in, 1}, p_.weight->at(l, k), groups,
                  p_.d, p_.d_in, false);
    }
  }

  void squash_all(Vec<T>* capsules) const {
    for (int64_t k = 0; k < p_.capsules; ++k) {
      squash_lanes<T>(capsules + k * p_.d, p_.d, p_.squash);
    }
  }

  void load_options() {
    logits_ = Buffer<Vec<T>>(blocks_.groups * kl_);
    if (args_.mask) mask_ = Buffer<Vec<T>>(blocks_.groups * p_.length);
    if (args_.capsule_mask) present_ = Buffer<Vec<T>>(blocks_.groups * p_.capsules);
    partial_ = Buffer<Vec<T>>(blocks_.groups * chunks_ * kd_);
    sums_ = Buffer<Vec<T>>((terms_ > 1 ? p_.iterations : 1) * blocks_.groups * kd_);
    groups([&](int64_t g) {
      RoutingLogits<T> s = logits_of(g, 0);
      load_routing_options<T>(plan_of(g), s, args_.logits, args_.mask, args_.capsule_mask, group(g),
                              users_.histories);
    });
  }

  // Adds the votes of a position, times a row of coefficients, to the partial sums of its chunk.
  void add_votes(int64_t g, int64_t l, const Vec<T>* scales, const Vec<T>* mask,
                 const Vec<T>* votes) const {
    Vec<T>* to = partial(g, l / kChunk);
    const bool is_first = l % kChunk == 0;
    for (int64_t k = 0; k < p_.capsules; ++k) {
      Vec<T> scale = scales[k * length(g) + l];
      if (mask != nullptr) scale *= mask[l];
      for (int64_t d = k * p_.d; d < (k + 1) * p_.d; ++d) {
        to[d] = is_first ? scale * votes[d] : to[d] + scale * votes[d];
      }
    }
  }

  void sum_chunks(int64_t g, Vec<T>* sums) const {
    copy_vectors<T>(sums, partial(g, 0), kd_);
    for (int64_t chunk = 1; chunk * kChunk < length(g); ++chunk) {
      const Vec<T>* from = partial(g, chunk);
      for (int64_t i = 0; i < kd_; ++i) sums[i] += from[i];
    }
  }

  // The logits of a position from the capsules that iteration `step` ended with.
  void update_logits(int64_t g, int64_t l, int64_t step, const Vec<T>* votes) const {
    const RoutingLogits<T> s = logits_of(g, step);
    const Vec<T>* mask = mask_after(g);
    for (int64_t k = 0; k < p_.capsules; ++k) {
      const Vec<T>* vote = votes + k * p_.d;
      Vec<T> agreement = dot<T>(vectors(capsule_term(step), g) + k * p_.d, vote, p_.d);
      if (p_.normalize_agreement) agreement *= inverse_norm<T>(vote, p_.d);
      const int64_t i = k * length(g) + l;
      if (p_.update == Update::accumulate) {
        agreement += s.logits[i];
      } else if (p_.update == Update::coupling) {
        agreement += mask == nullptr ? s.coupling[i] : s.coupling[i] * mask[l];
      }
      s.logits[i] = agreement;
    }
  }

  // Leaves the couplings as the softmax gave them; the mask is applied where they are used.
  void iterate() const {
    const bool at_once = p_.axis == SoftmaxAxis::capsules;
    for (int64_t step = 0; step < p_.iterations; ++step) {
      const auto sum = [&](int64_t g, int64_t l, const Vec<T>* votes) {
        add_votes(g, l, coefficients(coupling_term(step), g), mask_after(g), votes);
      };
      if (at_once) {
        positions([&](int64_t g, int64_t l, const Vec<T>* votes) {
          if (step > 0) update_logits(g, l, step - 1, votes);
          softmax_logits(plan_of(g), logits_of(g, step), l, l + 1);
          sum(g, l, votes);
        });
      } else {
        if (step > 0) {
          positions([&](int64_t g, int64_t l, const Vec<T>* votes) {
            update_logits(g, l, step - 1, votes);
          });
        }
        groups([&](int64_t g) { softmax_logits(plan_of(g), logits_of(g, step), 0, length(g)); });
        positions(sum);
      }
      groups([&](int64_t g) {
        sum_chunks(g, sums(step, g));
        if (step + 1 == p_.iterations) return;
        copy_vectors<T>(vectors(capsule_term(step), g), sums(step, g), kd_);
        if (p_.inner_squash) squash_all(vectors(capsule_term(step), g));
      });
    }
  }

  // The gradient of the last sums, which stand in sums(last).
  void load_sum_gradient(int64_t g) const {
    Vec<T>* grad = vectors(terms_ - 1, g);
    load_matrix<T>(grad, args_.grad, group(g));
    if (p_.final_squash) squash_gradient(grad, sums(p_.iterations - 1, g));
  }

  void squash_gradient(Vec<T>* grad, const Vec<T>* sums) const {
    for (int64_t k = 0; k < p_.capsules; ++k) {
      squash_backward_lanes<T>(grad + k * p_.d, sums + k * p_.d, p_.d, p_.squash);
    }
  }

  // From the gradient of the last sums to all terms, in passes like those of iterate(): a pass goes
  // through a weighted sum to its couplings and logits, and on through the agreement that made them
  // to the capsules of the iteration before.
  void walk_back() {
    const bool at_once = p_.axis == SoftmaxAxis::capsules;
    coupling_grad_ = Buffer<Vec<T>>(blocks_.groups * kl_);
    logit_grad_ = Buffer<Vec<T>>(blocks_.groups * kl_);
    if (p_.normalize_agreement) {
      radial_ = Buffer<Vec<T>>(blocks_.groups * kl_);
      groups([&](int64_t g) {
        for (int64_t i = g * kl_; i < (g + 1) * kl_; ++i) radial_.get()[i] = Vec<T>{};
      });
    }
    for (int64_t step = p_.iterations - 1; step >= (args_.grad_logits ? 0 : 1); --step) {
      const auto to_coupling = [&](int64_t g, int64_t l, const Vec<T>* votes) {
        coupling_gradient(g, l, step, votes);
      };
      const auto to_agreement = [&](int64_t g, int64_t l, const Vec<T>* votes) {
        if (step > 0) agreement_gradient(g, l, step - 1, votes);
      };
      if (at_once) {
        positions([&](int64_t g, int64_t l, const Vec<T>* votes) {
          to_coupling(g, l, votes);
          logit_gradient(g, l, l + 1, step);
          to_agreement(g, l, votes);
        });
      } else {
        positions(to_coupling);
        groups([&](int64_t g) { logit_gradient(g, 0, length(g), step); });
        if (step > 0) positions(to_agreement);
      }
      if (step == 0) return;
      groups([&](int64_t g) {
        Vec<T>* grad = vectors(coupling_term(step - 1), g);
        sum_chunks(g, grad);
        if (p_.inner_squash) squash_gradient(grad, sums(step - 1, g));
      });
    }
  }

  void coupling_gradient(int64_t g, int64_t l, int64_t step, const Vec<T>* votes) const {
    const bool add = p_.update == Update::coupling && step + 1 < p_.iterations;
    for (int64_t k = 0; k < p_.capsules; ++k) {
      const int64_t i = g * kl_ + k * length(g) + l;
      Vec<T>& grad = coupling_grad_.get()[i];
      grad = dot<T>(vectors(coupling_term(step), g) + k * p_.d, votes + k * p_.d, p_.d);
      if (add) grad += logit_grad_.get()[i];
    }
  }

  void logit_gradient(int64_t g, int64_t begin, int64_t end, int64_t step) const {
    Vec<T>* from = coupling_grad_.get() + g * kl_;
    Vec<T>* to = logit_grad_.get() + g * kl_;
    softmax_gradient(plan_of(g), logits_of(g, step), from, begin, end);
    const bool add = p_.update == Update::accumulate && step + 1 < p_.iterations;
    for (int64_t k = 0; k < p_.capsules; ++k) {
      for (int64_t i = k * length(g) + begin; i < k * length(g) + end; ++i) {
        to[i] = add ? to[i] + from[i] : from[i];
      }
    }
  }

  void agreement_gradient(int64_t g, int64_t l, int64_t step, const Vec<T>* votes) const {
    Vec<T>* grads = coefficients(capsule_term(step), g);
    for (int64_t k = 0; k < p_.capsules; ++k) {
      const int64_t i = k * length(g) + l;
      Vec<T> grad = logit_grad_.get()[g * kl_ + i];
      if (p_.normalize_agreement) {
        const Vec<T>* vote = votes + k * p_.d;
        const Vec<T> norm = inverse_norm<T>(vote, p_.d);
        const Vec<T> agreement =
            norm * dot<T>(vectors(capsule_term(step), g) + k * p_.d, vote, p_.d);
        radial_.get()[g * kl_ + i] += grad * agreement * radial_factor<T>(norm);
        grad *= norm;
      }
      grads[i] = grad;
    }
    add_votes(g, l, grads, nullptr, votes);
  }

  // Normalised votes take part in their own gradient.
  bool needs_votes() const { return radial_.get() != nullptr; }

  // Gradient of the vote of capsule k at position l: the sum of its terms.
  void vote_gradient(Vec<T>* grad, int64_t g, int64_t l, int64_t k, const Vec<T>* votes) const {
    for (int64_t term = 0; term < terms_; ++term) {
      const Vec<T> scale = coefficients(term, g)[k * length(g) + l];
      const Vec<T>* vector = vectors(term, g) + k * p_.d;
      for (int64_t d = 0; d < p_.d; ++d) {
        grad[d] = term == 0 ? scale * vector[d] : grad[d] + scale * vector[d];
      }
    }
    if (!needs_votes()) return;
    const Vec<T> radial = radial_.get()[g * kl_ + k * length(g) + l];
    for (int64_t d = 0; d < p_.d; ++d) grad[d] -= radial * votes[k * p_.d + d];
  }

  int64_t votes_scratch(int64_t groups) const { return needs_votes() ? groups * kd_ : 0; }

  void store_gradients() const {
    if (args_.grad_inputs) store_input_gradient();
    if (args_.grad_weight) store_weight_gradient();
  }

  void store_input_gradient() const {
    const int64_t most = blocks_.per_block, d_in = p_.d_in, d = p_.d;
    parallel_(chunks_ * blocks_.count, kChunk * most * kd_ * (d_in + terms_) * kLanes<T>,
              [&](int64_t begin, int64_t end) {
                Scratch<T> scratch(most * (d_in + d) + votes_scratch(most));
                Vec<T>* grad = scratch.take(most * d_in);
                Vec<T>* vote_grad = scratch.take(most * d);
                Vec<T>* votes = scratch.take(votes_scratch(most));
                for (int64_t task = begin; task < end; ++task) {
                  const int64_t block = task % blocks_.count, size = blocks_.size(block);
                  const int64_t first = task / blocks_.count * kChunk;
                  const int64_t end = std::min(first + kChunk, block_length(block));
                  for (int64_t l = first; l < end; ++l) {
                    if (needs_votes()) {
                      load_inputs(grad, block, l);
                      form_votes(votes, grad, size, l, 0, p_.capsules);
                    }
                    for (int64_t k = 0; k < p_.capsules; ++k) {
                      for (int64_t i = 0; i < size; ++i) {
                        const int64_t g = first_of(block) + i;
                        if (l < length(g)) {
                          vote_gradient(vote_grad + i * d, g, l, k, votes + i * kd_);
                        }
                      }
                      multiply<T>({grad, d_in, 1}, {vote_grad, d, 1}, p_.weight->transposed(l, k),
                                  size, d_in, d, k > 0);
                    }
                    for (int64_t i = 0; i < size; ++i) {
                      store_input(grad + i * d_in, first_of(block) + i, l);
                    }
                  }
                }
              });
  }

  // The threads share out the matrices, and the users come in one order.
  void store_weight_gradient() const {
    const int64_t d_in = p_.d_in, d = p_.d, width = padded<T>(d), in_width = padded<T>(d_in);
    const int64_t vectors = width / kLanes<T>, matrix = d_in * vectors;
    // A unit: the matrices of one position, or one matrix that serves all positions.
    const bool own = p_.kind == RoutingWeight::per_position;
    const int64_t positions = own ? 1 : p_.length, capsules = own ? p_.capsules : 1;
    const int64_t work = blocks_.batch * positions * capsules * d * (d_in + terms_);
    parallel_(own ? args_.grad_weight.size[0] : p_.capsules, work, [&](int64_t begin, int64_t end) {
      Scratch<T> scratch(capsules * matrix + d_in + d + in_width + width + votes_scratch(1));
      Vec<T>* sums = scratch.take(capsules * matrix);
      Vec<T>* input = scratch.take(d_in);
      Vec<T>* vote_grad = scratch.take(d);
      // Rows of the users of one group.
      T* input_rows = reinterpret_cast<T*>(scratch.take(in_width));
      Vec<T>* grad_rows = scratch.take(width);
      Vec<T>* votes = scratch.take(votes_scratch(1));
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first_l = own ? unit : 0, first_k = own ? 0 : unit;
        for (int64_t i = 0; i < capsules * matrix; ++i) sums[i] = Vec<T>{};
        for (int64_t i = 0; i < blocks_.groups * positions; ++i) {
          const int64_t g = i / positions, l = first_l + i % positions;
          if (l >= length(g)) continue;
          const Group rows = {0, group(g).users};
          load_input(input, g, l);
          save_rows<T>(input_rows, in_width, input, d_in, rows);
          if (needs_votes()) form_votes(votes, input, 1, l, first_k, first_k + capsules);
          for (int64_t k = 0; k < capsules; ++k) {
            vote_gradient(vote_grad, g, l, first_k + k, votes);
            save_rows<T>(reinterpret_cast<T*>(grad_rows), width, vote_grad, d, rows);
            multiply<T>({sums + k * matrix, 1, vectors}, {grad_rows, 1, vectors},
                        SharedMatrix<T>(input_rows, in_width, 1), vectors, d_in, rows.users, true);
          }
        }
        for (int64_t k = 0; k < capsules; ++k) {
          const View& grad = args_.grad_weight;
          store_sums<T>(sums + k * matrix, d_in, d,
                        own ? matrix_of(grad, unit, k) : matrix_of(grad, unit));
        }
      }
    });
  }

  const RoutingArgs& args_;
  const RoutingPlan<T>& p_;
  const Users<T>& users_;
  const Parallel& parallel_;
  const Blocks<T> blocks_;
  const int64_t terms_, chunks_, kl_, kd_;
  Buffer<Vec<T>> coefficients_;  // terms x groups x K x L
  Buffer<Vec<T>> vectors_;       // terms x groups x K x D
  Buffer<Vec<T>> logits_;        // groups x K x L
  Buffer<Vec<T>> mask_, present_;
  Buffer<Vec<T>> partial_;  // groups x chunks x K x D
  Buffer<Vec<T>> sums_;     // groups x K x D, for every iteration that is kept
  Buffer<Vec<T>> coupling_grad_, logit_grad_, radial_;  // groups x K x L, of a full gradient
};

}  // namespace

template <class T>
void route_positions(const RoutingArgs& args, const RoutingPlan<T>& whole, const Users<T>& users) {
  PositionRouting<T>(args, whole, users, 1).forward();
}

template <class T>
void route_positions_backward(const RoutingArgs& args, const RoutingPlan<T>& whole,
                              const Users<T>& users) {
  if (args.full_gradient) {
    PositionRouting<T>(args, whole, users, RoutingTrace<T>::terms(whole)).full_backward();
  } else {
    PositionRouting<T>(args, whole, users, 1).last_backward();
  }
}

#define MIMNET_FAST_INSTANTIATE(T)                                                              \
  template void route_positions<T>(const RoutingArgs&, const RoutingPlan<T>&, const Users<T>&); \
  template void route_positions_backward<T>(const RoutingArgs&, const RoutingPlan<T>&,          \
                                            const Users<T>&);
MIMNET_FAST_INSTANTIATE(float)
MIMNET_FAST_INSTANTIATE(double)

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
