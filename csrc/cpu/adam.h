// One step of Adam (Kingma and Ba, ICLR 2015) on vectors of parameters.
#pragma once

#include <cmath>

#include "../common/kernels.h"
#include "lanes.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

// Parameters and their moments.
template <class T>
struct Moving {
  Vec<T> value, first, second;
};

template <class T>
struct AdamStep {
  T take1, keep2, take2, rate, root, eps;

  // `count` is the number of the step, from 1. Differences from 1 are taken in double.
  AdamStep(const Adam& adam, double count)
      : take1(T(1 - adam.beta1)),
        keep2(T(adam.beta2)),
        take2(T(1 - adam.beta2)),
        rate(T(adam.learning_rate / (1 - std::pow(adam.beta1, count)))),
        root(T(1 / std::sqrt(1 - std::pow(adam.beta2, count)))),
        eps(T(adam.eps)) {}

  MIMNET_FAST_INLINE void operator()(Moving<T>& at, Vec<T> gradient) const {
    at.first += take1 * (gradient - at.first);
    at.second = keep2 * at.second + take2 * gradient * gradient;
    move(at);
  }

  MIMNET_FAST_INLINE void move(Moving<T>& at) const {
    at.value -= rate * at.first / (sqrt(at.second) * root + eps);
  }
};

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
