// Ratings of MIMNet and, in the same pass over the users, the gradients of their squared errors.
#pragma once

#include "../common/kernels.h"
#include "lanes.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

struct SquaredErrors {
  View target;  // [B]
  View weight;  // [B], or none
};

// Fills ratings, and the gradients of mean(weight (rating - target)^2). Nothing is kept on the way.
template <class T>
void mimnet_descent(const MIMNetArgs& args, const SquaredErrors& errors);

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
