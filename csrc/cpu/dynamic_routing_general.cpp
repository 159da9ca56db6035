#include "dynamic_routing.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

template <class T>
void find_norms(const RoutingPlan<T>& p, const RoutingState<T>& s) {
  const int64_t length = p.length, d_in = p.d_in, d = p.d;
  for (int64_t k = 0; k < p.capsules; ++k) {
    Vec<T>* norms = s.inverse_norm + k * length;
    if (p.kind == RoutingWeight::none && k > 0) {
      copy_vectors<T>(norms, s.inverse_norm, length);
      continue;
    }
    const Vec<T>* inputs =
        s.inputs + (p.kind == RoutingWeight::none_per_capsule ? k * length * d_in : 0);
    for (int64_t l = 0; l < length; l += kTileM) {
      const int64_t rows = length - l < kTileM ? length - l : kTileM;
      const Vec<T>* votes = inputs + l * d_in;
      if (p.kind == RoutingWeight::per_capsule) {
        multiply<T>({s.votes, d, 1}, {votes, d_in, 1}, p.weight->at(0, k), rows, d, d_in, false);
        votes = s.votes;
      }
      for (int64_t i = 0; i < rows; ++i) norms[l + i] = inverse_norm<T>(votes + i * d, d);
    }
  }
}

// The logits of the next iteration from the coupling and the capsules seen from the input space.
template <class T>
void update_logits(const RoutingPlan<T>& p, RoutingState<T>& s) {
  const int64_t count = p.capsules * p.length;
  if (p.update == Update::coupling) copy_vectors<T>(s.logits, s.coupling, count);
  const bool add = p.update != Update::replace;
  if (!p.normalize_agreement) return compare_inputs(p, s.logits, s.back, s.inputs, add);
  compare_inputs(p, s.agreement, s.back, s.inputs, false);
  for (int64_t i = 0; i < count; ++i) {
    s.agreement[i] *= s.inverse_norm[i];
    s.logits[i] = add ? s.logits[i] + s.agreement[i] : s.agreement[i];
  }
}

}  // namespace

template <class T>
void route_any(const RoutingPlan<T>& p, RoutingState<T>& s, const RoutingTrace<T>* trace) {
  const int64_t kl = p.capsules * p.length, kd = p.capsules * p.d, ki = p.capsules * p.d_in;
  if (p.normalize_agreement) find_norms(p, s);
  for (int64_t step = 0;; ++step) {
    softmax_logits(p, s, 0, p.length);
    if (trace != nullptr) copy_vectors<T>(trace->softmax + step * kl, s.coupling, kl);
    mask_coupling(p, s);
    pool_inputs(p, s.pooled, s.coupling, s.inputs);
    apply_routing_weight(p, s.capsules, s.pooled);
    if (trace != nullptr) {
      copy_vectors<T>(trace->coefficients + 2 * step * kl, s.coupling, kl);
      copy_vectors<T>(trace->pooled + 2 * step * ki, s.pooled, ki);
      copy_vectors<T>(trace->sums + step * kd, s.capsules, kd);
    }
    if (step + 1 == p.iterations) return;
    if (p.inner_squash) {
      for (int64_t k = 0; k < p.capsules; ++k) squash_lanes<T>(s.capsules + k * p.d, p.d, p.squash);
    }
    apply_routing_weight_transposed(p, s.back, s.capsules);
    update_logits(p, s);
    if (trace != nullptr) {
      copy_vectors<T>(trace->vectors + (2 * step + 1) * kd, s.capsules, kd);
      copy_vectors<T>(trace->seen + (2 * step + 1) * ki, s.back, ki);
      if (p.normalize_agreement) copy_vectors<T>(trace->agreement + step * kl, s.agreement, kl);
    }
  }
}

template <class T>
void softmax_gradient(const RoutingPlan<T>& p, const RoutingLogits<T>& s, Vec<T>* grad,
                      int64_t begin, int64_t end) {
  const int64_t k = p.capsules, length = p.length;
  const bool fill = p.padding == Padding::fill_before;
  const auto slice = [&](const Vec<T>* c, Vec<T>* g, int64_t count, int64_t stride) {
    subtract_mean<T>(g, c, count, stride);
    for (int64_t i = 0; i < count * stride; i += stride) g[i] *= c[i] * p.inverse_temperature;
  };
  // The mask multiplies couplings after the softmax, or replaces logits before it.
  const auto mask = [&] {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t l = begin; l < end; ++l) grad[i * length + l] *= s.mask[l];
    }
  };
  if (s.mask != nullptr && !fill) mask();
  if (p.axis == SoftmaxAxis::capsules) {
    for (int64_t l = begin; l < end; ++l) slice(s.coupling + l, grad + l, k, length);
  } else {
    for (int64_t i = 0; i < k; ++i) slice(s.coupling + i * length, grad + i * length, length, 1);
  }
  if (s.mask != nullptr && fill) mask();
}

template <class T>
void route_backward(const RoutingPlan<T>& p, const RoutingState<T>& s, const RoutingTrace<T>& trace,
                    bool wants_logits) {
  const int64_t kl = p.capsules * p.length, kd = p.capsules * p.d, ki = p.capsules * p.d_in;
  for (int64_t i = 0; p.normalize_agreement && i < kl; ++i) trace.radial[i] = Vec<T>{};
  RoutingLogits<T> logits = s;
  for (int64_t step = p.iterations - 1; step >= 0; --step) {
    const bool is_last = step + 1 == p.iterations;
    Vec<T>* sum_grad = trace.vectors + 2 * step * kd;
    if (!is_last) {
      // Through the agreement after this iteration to its capsules.
      const int64_t term = 2 * step + 1;
      Vec<T>* coefficients = trace.coefficients + term * kl;
      copy_vectors<T>(coefficients, trace.logit_grad, kl);
      for (int64_t i = 0; p.normalize_agreement && i < kl; ++i) {
        trace.radial[i] +=
            coefficients[i] * trace.agreement[step * kl + i] * radial_factor<T>(s.inverse_norm[i]);
        coefficients[i] *= s.inverse_norm[i];
      }
      pool_inputs(p, trace.pooled + term * ki, coefficients, s.inputs);
      apply_routing_weight(p, sum_grad, trace.pooled + term * ki);
      for (int64_t k = 0; p.inner_squash && k < p.capsules; ++k) {
        squash_backward_lanes<T>(sum_grad + k * p.d, trace.sums + step * kd + k * p.d, p.d,
                                 p.squash);
      }
    }
    // Through the weighted sum to the coupling and its logits.
    Vec<T>* seen = trace.seen + 2 * step * ki;
    apply_routing_weight_transposed(p, seen, sum_grad);
    if (step == 0 && !wants_logits) return;
    compare_inputs(p, trace.coupling_grad, seen, s.inputs, false);
    for (int64_t i = 0; !is_last && p.update == Update::coupling && i < kl; ++i) {
      trace.coupling_grad[i] += trace.logit_grad[i];
    }
    logits.coupling = trace.softmax + step * kl;
    softmax_gradient(p, logits, trace.coupling_grad, 0, p.length);
    const bool add = !is_last && p.update == Update::accumulate;
    for (int64_t i = 0; i < kl; ++i) {
      trace.logit_grad[i] =
          add ? trace.logit_grad[i] + trace.coupling_grad[i] : trace.coupling_grad[i];
    }
  }
}

template <class T>
void traced_input_gradient(const RoutingPlan<T>& p, Vec<T>* grad, const RoutingState<T>& s,
                           const RoutingTrace<T>& trace) {
  routing_input_gradient(p, grad, trace.coefficients, trace.seen, RoutingTrace<T>::terms(p));
  if (!p.normalize_agreement) return;
  // Votes that are normalised are inputs here, of one capsule or of all.
  const bool own = p.kind == RoutingWeight::none_per_capsule;
  for (int64_t i = 0; i < p.capsules * p.length; ++i) {
    const int64_t first = (own ? i : i % p.length) * p.d_in;
    for (int64_t d = first; d < first + p.d_in; ++d) grad[d] -= trace.radial[i] * s.inputs[d];
  }
}

#define MIMNET_FAST_INSTANTIATE(T)                                                               \
  template void route_any<T>(const RoutingPlan<T>&, RoutingState<T>&, const RoutingTrace<T>*);   \
  template void route_backward<T>(const RoutingPlan<T>&, const RoutingState<T>&,                 \
                                  const RoutingTrace<T>&, bool);                                 \
  template void traced_input_gradient<T>(const RoutingPlan<T>&, Vec<T>*, const RoutingState<T>&, \
                                         const RoutingTrace<T>&);                                \
  template void softmax_gradient<T>(const RoutingPlan<T>&, const RoutingLogits<T>&, Vec<T>*,     \
                                    int64_t, int64_t);
MIMNET_FAST_INSTANTIATE(float)
MIMNET_FAST_INSTANTIATE(double)

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
