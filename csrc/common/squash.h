// squash(x) = factor(|x|^2) x for every form, and what its gradient needs.
//
// Written for any arithmetic `Math`: SIMD lanes on the host, a scalar per thread on a device. It
// names Value and Scalar and offers sqrt, power and select.
#pragma once

#include "inline.h"
#include "options.h"

namespace mimnet_fast {

template <class Value>
struct SquashFactor {
  Value factor;
  // |x|^2 d factor / d |x|^2; the derivative alone would leave the range of a float for vectors
  // that are very long or very short.
  Value radial;
};

template <class Math>
MIMNET_FAST_INLINE SquashFactor<typename Math::Value> squash_factor(typename Math::Value norm2,
                                                                    const Squash& squash) {
  using V = typename Math::Value;
  using T = typename Math::Scalar;
  const V zero = V{};
  const V one = zero + T(1);
  const V half = zero + T(0.5);
  const T eps = T(squash.eps);
  const auto nonzero = norm2 > zero;
  const V safe = Math::select(nonzero, norm2, one);
  const V inverse = one / (one + norm2);
  switch (squash.form) {
    case SquashForm::sqrt_eps: {
      const V root2 = norm2 + eps;
      const V factor = norm2 * inverse / Math::sqrt(root2);
      return {factor, factor * (inverse - half * (norm2 / root2))};
    }
    case SquashForm::norm_plus_eps: {
      const V norm = Math::select(nonzero, Math::sqrt(safe), zero);
      const V shifted = norm + eps;
      const V factor = norm2 * inverse / shifted;
      return {factor, factor * (inverse - half * (norm / shifted))};
    }
    case SquashForm::pow_clamp: {
      const T exponent = T(squash.power);
      const V norm = Math::select(nonzero, Math::sqrt(safe), zero);
      const V floor = zero + eps;
      const auto clamped = norm <= floor;
      const V powered = Math::power(safe * inverse, exponent) / Math::select(clamped, floor, norm);
      const V factor = Math::select(nonzero, powered, zero);
      return {factor, factor * (exponent * inverse - Math::select(clamped, zero, half))};
    }
    case SquashForm::no_div:
    case SquashForm::none_eps: {
      const V factor = Math::select(nonzero, Math::sqrt(safe) * inverse, zero);
      return {factor, factor * (half - norm2 * inverse)};
    }
    case SquashForm::identity:
      break;
  }
  return {one, zero};
}

}  // namespace mimnet_fast
