#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#include "../common/kernels.h"

namespace mimnet_fast::cpu {

#if defined(MIMNET_FAST_HAVE_X86_VARIANTS)
namespace avx512 {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
#endif
namespace baseline {
const Kernels& kernels();
}

namespace {

const Kernels& choose() {
#if defined(MIMNET_FAST_HAVE_X86_VARIANTS)
  const char* cap = std::getenv("MIMNET_FAST_ISA");
  const auto allowed = [cap](const char* name) {
    // A cap of "avx2" rules out avx512; "baseline" rules out both.
    return cap == nullptr || std::strcmp(cap, "avx512") == 0 || std::strcmp(cap, name) == 0;
  };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (allowed("avx512") && avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512::kernels();
  }
  if (allowed("avx2") && avx2) return avx2::kernels();
#endif
  return baseline::kernels();
}

}  // namespace

const char* isa_name() { return kernels().target; }

}  // namespace mimnet_fast::cpu

const mimnet_fast::Kernels& mimnet_fast::kernels() {
  static const Kernels& chosen = cpu::choose();
  return chosen;
}
