// The instruction set that the CPU kernels run on.
#pragma once

namespace mimnet_fast::cpu {

// Chosen at the first call: the widest that was built and that the processor has, or a lower one
// named by the environment variable MIMNET_FAST_ISA.
const char* isa_name();

}  // namespace mimnet_fast::cpu
