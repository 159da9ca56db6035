// Codes of the option names in mimnet_fast/_options.py, in the same order.
#pragma once

#include <cstdint>

namespace mimnet_fast {

enum class SquashForm : int64_t {
  sqrt_eps,
  norm_plus_eps,
  pow_clamp,
  no_div,
  none_eps,
  identity,
};

enum class SoftmaxAxis : int64_t { capsules, inputs };

enum class Padding : int64_t { zero_after, fill_before, ignore };

enum class Update : int64_t { accumulate, replace, coupling };

// The logit that Padding::fill_before writes over padded positions.
constexpr double kPaddingLogit = -1e9;

struct Squash {
  SquashForm form;
  double eps;
  double power;
};

}  // namespace mimnet_fast
