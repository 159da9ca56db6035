#include "ops.h"

namespace mimnet_fast::binding {
namespace {

// The inputs of both ops, in the order of the schemas.
struct Inputs {
  const Tensor& history;
  const OptionalTensor& table;
  const Tensor &source, &item, &prototype, &routing_weight, &w1, &b1, &w2, &b2;
  const Tensor &fine_kw, &fine_kb, &fine_vw, &fine_vb, &coarse_kw, &coarse_kb, &coarse_vw,
      &coarse_vb, &fusion_weight, &fusion_bias, &logits;
  const OptionalTensor& mask;
  int64_t iterations, padding;
};

// Whether kernels can run on them. The Python function finds out what is wrong where this is false,
// and looks at nothing before.
bool fit(const Inputs& in, bool jagged) {
  if (in.source.dim() != 2 || in.logits.dim() < 2 || in.w1.dim() != 2) return false;
  const int64_t batch = in.source.size(0), d = in.source.size(1), hidden = in.w1.size(0);
  const int64_t k = in.logits.size(in.logits.dim() - 2);
  const int64_t length = in.logits.size(in.logits.dim() - 1);
  const auto is = [&](const Tensor& tensor, std::initializer_list<int64_t> sizes) {
    return fits(tensor, in.source, sizes);
  };
  const auto attention = [&](const Tensor& kw, const Tensor& kb, const Tensor& vw,
                             const Tensor& vb) {
    return is(kw, {d, d}) && is(kb, {d}) && is(vw, {d, d}) && is(vb, {d});
  };
  const auto on_device = [&](const OptionalTensor& tensor) {
    return !tensor.has_value() || tensor->device() == in.source.device();
  };
  const auto history = [&] {
    const Tensor& h = in.history;
    if (in.table.has_value()) {
      const bool ids = h.scalar_type() == ScalarType::Long || h.scalar_type() == ScalarType::Int;
      return ids && h.device() == in.source.device() && in.table->dim() == 2 &&
             is(*in.table, {in.table->size(0), d}) &&
             (jagged || (h.dim() == 2 && h.size(0) == batch && h.size(1) == length));
    }
    return jagged ? is(h, {h.size(0), d}) : is(h, {batch, length, d});
  };
  const auto logits = [&] {
    if (in.logits.dim() == 2) return jagged && is(in.logits, {k, in.history.size(0)});
    return is(in.logits, {in.logits.size(0) == 1 ? 1 : batch, k, length}) && (jagged || length > 0);
  };
  const auto mask = [&] {
    if (!in.mask.has_value()) return true;
    const Tensor& m = *in.mask;
    if (m.dim() == 2) {
      return m.scalar_type() == ScalarType::Bool && m.size(0) == batch && m.size(1) == length;
    }
    const bool integers = m.scalar_type() == ScalarType::Long || m.scalar_type() == ScalarType::Int;
    return m.dim() == 1 && integers && m.size(0) == batch + (jagged ? 1 : 0);
  };
  return d > 0 && k > 0 && hidden > 0 && in.iterations > 0 && in.padding >= 0 && in.padding < 3 &&
         is(in.item, {batch, d}) && is(in.prototype, {batch, d}) && is(in.routing_weight, {d, d}) &&
         is(in.w1, {hidden, d}) && is(in.b1, {hidden}) && is(in.w2, {d * d, hidden}) &&
         is(in.b2, {d * d}) && attention(in.fine_kw, in.fine_kb, in.fine_vw, in.fine_vb) &&
         attention(in.coarse_kw, in.coarse_kb, in.coarse_vw, in.coarse_vb) &&
         is(in.fusion_weight, {2 * d}) && (is(in.fusion_bias, {1}) || is(in.fusion_bias, {})) &&
         history() && logits() && mask() && on_device(in.mask);
}

MIMNetArgs arguments(Device& device, const Inputs& in) {
  const bool jagged = is_jagged(in.history, in.table.has_value() ? 1 : 2, in.mask);
  STD_TORCH_CHECK(fit(in, jagged),
                  "mimnet_fast: the tensors do not fit each other; "
                  "mimnet_fast.ops.mimnet_forward says which one");
  MIMNetArgs args{};
  args.history = view(in.history);
  args.table = view(in.table);
  args.source = view(in.source);
  args.item = view(in.item);
  args.prototype = view(in.prototype);
  args.routing_weight = view(in.routing_weight);
  args.w1 = view(in.w1);
  args.b1 = view(in.b1);
  args.w2 = view(in.w2);
  args.b2 = view(in.b2);
  args.fusion = fusion_weights(in.fine_kw, in.fine_vw, in.fine_vb, in.coarse_kw, in.coarse_vw,
                               in.coarse_vb, in.fusion_weight, in.fusion_bias);
  args.logits = view(in.logits);
  args.mask = view(in.mask);
  args.iterations = in.iterations;
  args.padding = Padding(in.padding);
  args.execution = device.execution();
  return args;
}

}  // namespace

Tensors4 mimnet_forward(Tensor history, OptionalTensor table, Tensor source, Tensor item,
                        Tensor prototype, Tensor routing_weight, Tensor w1, Tensor b1, Tensor w2,
                        Tensor b2, Tensor fine_kw, Tensor fine_kb, Tensor fine_vw, Tensor fine_vb,
                        Tensor coarse_kw, Tensor coarse_kb, Tensor coarse_vw, Tensor coarse_vb,
                        Tensor fusion_weight, Tensor fusion_bias, Tensor logits,
                        OptionalTensor mask, int64_t iterations, int64_t padding, bool keep) {
  Device device(source);
  MIMNetArgs args = arguments(
      device, {history,   table,      source,    item,      prototype,     routing_weight, w1,
               b1,        w2,         b2,        fine_kw,   fine_kb,       fine_vw,        fine_vb,
               coarse_kw, coarse_kb,  coarse_vw, coarse_vb, fusion_weight, fusion_bias,    logits,
               mask,      iterations, padding});
  const int64_t batch = source.size(0), d = source.size(1), k = logits.size(logits.dim() - 2);
  const ScalarType saved = saved_dtype(source);
  Tensor ratings = empty(source, {batch});
  Tensor pooled = empty(source, {batch, k, d}, saved);
  Tensor transferred = empty(source, {batch, k, d}, saved);
  args.ratings = view(ratings);
  args.pooled = view(pooled);
  args.transferred = view(transferred);
  Tensor hidden_grad =
      keep ? empty(source, {batch, k, w1.size(0)}, saved) : empty(source, {0}, saved);
  if (keep) args.hidden_grad = view(hidden_grad);
  kernels().mimnet_forward(args);
  return {ratings, pooled, transferred, hidden_grad};
}

Tensors19 mimnet_forward_backward(Tensor grad, Tensor pooled, Tensor transferred,
                                  Tensor hidden_grad, Tensor history, OptionalTensor table,
                                  Tensor source, Tensor item, Tensor prototype,
                                  Tensor routing_weight, Tensor w1, Tensor b1, Tensor w2, Tensor b2,
                                  Tensor fine_kw, Tensor fine_kb, Tensor fine_vw, Tensor fine_vb,
                                  Tensor coarse_kw, Tensor coarse_kb, Tensor coarse_vw,
                                  Tensor coarse_vb, Tensor fusion_weight, Tensor fusion_bias,
                                  Tensor logits, OptionalTensor mask, int64_t iterations,
                                  int64_t padding, int64_t needs) {
  auto grads = gradients_like<19>(
      {history, source, item, prototype, routing_weight, w1, b1, w2, b2, fine_kw, fine_kb, fine_vw,
       fine_vb, coarse_kw, coarse_kb, coarse_vw, coarse_vb, fusion_weight, fusion_bias},
      source, needs);
  Device device(source);
  MIMNetArgs args = arguments(
      device, {history,   table,      source,    item,      prototype,     routing_weight, w1,
               b1,        w2,         b2,        fine_kw,   fine_kb,       fine_vw,        fine_vb,
               coarse_kw, coarse_kb,  coarse_vw, coarse_vb, fusion_weight, fusion_bias,    logits,
               mask,      iterations, padding});
  args.pooled = view(pooled);
  args.transferred = view(transferred);
  if (hidden_grad.dim() == 3) args.hidden_grad = view(hidden_grad);
  args.grad = view(grad);
  args.grad_history = wanted(grads, needs, 0);
  args.grad_source = wanted(grads, needs, 1);
  args.grad_item = wanted(grads, needs, 2);
  args.grad_prototype = wanted(grads, needs, 3);
  args.grad_routing_weight = wanted(grads, needs, 4);
  args.grad_w1 = wanted(grads, needs, 5);
  args.grad_b1 = wanted(grads, needs, 6);
  args.grad_w2 = wanted(grads, needs, 7);
  args.grad_b2 = wanted(grads, needs, 8);
  args.grad_fusion = fusion_gradients(grads, needs, 9);
  kernels().mimnet_forward_backward(args);
  return std::tuple_cat(grads);
}

}  // namespace mimnet_fast::binding
