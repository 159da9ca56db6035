// squash(x) = factor(|x|^2) x for every form, and the slope that its gradient needs.
//
// Written for any arithmetic `Math`: SIMD lanes on the host, a scalar per thread on a device. It
// names Value and Scalar and offers sqrt, power and select.
#pragma once

#include "options.h"

#if defined(__CUDACC__)
#define MIMNET_FAST_SHARED __host__ __device__ __forceinline__
#else
#define MIMNET_FAST_SHARED inline __attribute__((always_inline))
#endif

namespace mimnet_fast {

template <class Value>
struct SquashFactor {
  Value factor;
  Value slope;  // d factor / d |x|^2, 0 at x = 0 where it multiplies a zero vector
};

template <class Math>
MIMNET_FAST_SHARED SquashFactor<typename Math::Value> squash_factor(typename Math::Value norm2,
                                                                    const Squash& squash) {
  using V = typename Math::Value;
  using T = typename Math::Scalar;
  const V zero = V{};
  const V one = zero + T(1);
  const T eps = T(squash.eps);
  const auto nonzero = norm2 > zero;
  const V safe = Math::select(nonzero, norm2, one);
  const V inverse = one / (one + norm2);
  switch (squash.form) {
    case SquashForm::sqrt_eps: {
      const V root2 = norm2 + eps;
      const V scale = inverse / Math::sqrt(root2);
      return {norm2 * scale, scale * (inverse - norm2 / (root2 + root2))};
    }
    case SquashForm::norm_plus_eps: {
      const V norm = Math::select(nonzero, Math::sqrt(safe), zero);
      const V shifted = norm + eps;
      const V scale = inverse / shifted;
      return {norm2 * scale, scale * (inverse - norm / (shifted + shifted))};
    }
    case SquashForm::pow_clamp: {
      const T exponent = T(squash.power);
      const V norm = Math::select(nonzero, Math::sqrt(safe), zero);
      const V floor = zero + eps;
      const auto clamped = norm <= floor;
      const V factor = Math::power(safe * inverse, exponent) / Math::select(clamped, floor, norm);
      const V half = Math::select(clamped, zero, zero + T(0.5));
      return {Math::select(nonzero, factor, zero),
              Math::select(nonzero, factor / safe * (exponent * inverse - half), zero)};
    }
    case SquashForm::no_div:
    case SquashForm::none_eps: {
      const V factor = Math::sqrt(safe) * inverse;
      const V slope = factor / safe * (zero + T(0.5) - norm2 * inverse);
      return {Math::select(nonzero, factor, zero), Math::select(nonzero, slope, zero)};
    }
    case SquashForm::identity:
      break;
  }
  return {one, zero};
}

}  // namespace mimnet_fast
