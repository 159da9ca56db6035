#include "ops.h"

namespace mimnet_fast::binding {
namespace {

// Kernels take four dimensions; more are folded into two, which copies if the strides do not fit.
Tensor foldable(const Tensor& x) {
  if (x.dim() <= kMaxDims) return x;
  return torch::stable::reshape(x, {-1, x.size(x.dim() - 1)});
}

Tensor run(const Tensor& x, const Tensor* grad, const Squash& form) {
  const Tensor folded = foldable(x);
  Tensor out = empty(folded, folded.sizes());
  Device device(x);
  SquashArgs args{};
  args.x = view(folded);
  args.out = view(out);
  args.squash = form;
  args.execution = device.execution();
  if (x.numel() > 0) {
    if (grad != nullptr) {
      const Tensor folded_grad = foldable(*grad);
      args.grad = view(folded_grad);
      kernels().squash_backward(args);
    } else {
      kernels().squash(args);
    }
  }
  return x.dim() <= kMaxDims ? out : torch::stable::view(out, x.sizes());
}

}  // namespace

Tensor squash(Tensor x, int64_t form, double eps, double power) {
  return run(x, nullptr, {SquashForm(form), eps, power});
}

Tensor squash_backward(Tensor grad, Tensor x, int64_t form, double eps, double power) {
  return run(x, &grad, {SquashForm(form), eps, power});
}

}  // namespace mimnet_fast::binding
