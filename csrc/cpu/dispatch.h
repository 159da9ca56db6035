// The kernels for the processor at hand.
#pragma once

#include "kernels.h"

namespace mimnet_fast::cpu {

// Chosen at the first call: the widest instruction set that was built and that the processor has,
// or a lower one named by the environment variable MIMNET_FAST_ISA.
const Kernels& kernels();

const char* isa_name();

}  // namespace mimnet_fast::cpu
