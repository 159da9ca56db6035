// As target_attention.cu, with two heads.
#include "multi_granularity_attention.cuh"

#include "ops.cuh"

namespace mimnet_fast::cuda {
namespace {

struct MultiGranularityAttention {
  AttentionPlan plan;
  GatePlan gate_plan;
  View out, gate;  // in backward out is made again where there is a place for it
  View grad_item, grad_prototype, grad_interests;
  float* gate_rows;  // gradients of the gate before its sigmoid, [B*C]

  template <int D, int P>
  MIMNET_FAST_DEVICE void forward() const {
    const AttentionPlan& p = plan;
    Arena arena(shared_memory());
    const AttentionState s(p, arena, false);
    const AttentionTile tile = attention_tile(p, block_index() / p.candidate_tiles,
                                              int(block_index() % p.candidate_tiles));
    stage<P>(p, s, tile);
    load_queries(p, s, tile);
    sync_block();
    open_gate<D, false>(p, gate_plan, s, tile,
                        [&](int row, float value) { write(gate, tile.row + row, value); });
    fold_queries<D, P>(p, s, tile);
    sync_block();
    attend_forward<D, P>(p, s, tile);
    sync_block();
    project_pooled<D, P>(p, s, tile, [&](int row, int d, float value) {
      write(out, (tile.row + row) * p.d + d, value);
    });
  }

  template <int D, int P>
  MIMNET_FAST_DEVICE void backward() const {
    const AttentionPlan& p = plan;
    Arena arena(shared_memory());
    const AttentionState s(p, arena, true);
    for (int t = 0; t < p.candidate_tiles; ++t) {
      const AttentionTile tile = attention_tile(p, block_index(), t);
      const int rows = tile.rows();
      if (t == 0) stage<P>(p, s, tile);
      load_queries(p, s, tile);
      load_grad(p, s, tile);
      sync_block();
      open_gate<D, true>(p, gate_plan, s, tile, [](int, float) {});
      fold_queries<D, P>(p, s, tile);
      project_grad<D, P>(p, s, tile);
      sync_block();
      attend_backward<D, P>(p, s, tile);
      sync_block();
      save_shares(p, s, tile);
      for (int row = thread_index(); gate_rows && row < rows; row += block_threads()) {
        store(gate_rows + tile.row + row, gate_gradient(s, rows, row));
      }
      if (out) {
        project_pooled<D, P>(p, s, tile, [&](int row, int d, float value) {
          write(out, (tile.row + row) * p.d + d, value);
        });
      }
      if (grad_interests) {
        interests_gradient<D>(p, s, tile, [&](int u, int k, int d, float value) {
          write_interests_gradient(p, t, grad_interests,
                                   ((tile.user + u) * p.interests + k) * p.d + d, value);
        });
      }
      if (grad_item || grad_prototype) {
        queries_gradient<D, P>(p, gate_plan, s, tile, [&](int head, int row, int d, float value) {
          const View& to = head == 0 ? grad_item : grad_prototype;
          if (to) write(to, (tile.row + row) * p.d + d, value);
        });
      }
      sync_block();
    }
  }
};

MultiGranularityAttention attention(const MultiGranularityArgs& call) {
  MultiGranularityAttention attention{};
  AttentionPlan& p = attention.plan;
  p.heads = 2;
  p.interests = int(call.interests.size[1]);
  p.d = int(call.interests.size[2]);
  p.batch = call.item.size[0];
  p.candidates = int(call.item.size[1]);
  p.query[0] = call.item;
  p.query[1] = call.prototype;
  p.keys = call.interests;
  p.weights[0] = call.weights.fine;
  p.weights[1] = call.weights.coarse;
  p.grad = call.grad;
  p.keeps_pooled = bool(call.out);
  attention.gate_plan = {call.weights.weight, call.weights.bias, call.grad_gate};
  attention.out = call.out;
  attention.gate = call.gate;
  attention.grad_item = call.grad_item;
  attention.grad_prototype = call.grad_prototype;
  attention.grad_interests = call.grad_interests;
  return attention;
}

}  // namespace

void multi_granularity_attention(const MultiGranularityArgs& call) {
  MultiGranularityAttention attention = cuda::attention(call);
  start_attention<false>(attention, cut(attention.plan, false), call.execution.stream);
}

void multi_granularity_attention_backward(const MultiGranularityArgs& call) {
  const Stream& stream = call.execution.stream;
  const FusionWeights& grads = call.grad_weights;
  const AttentionWeights of_heads[] = {grads.fine, grads.coarse};
  MultiGranularityAttention attention = cuda::attention(call);
  AttentionPlan& p = attention.plan;
  const int64_t bytes = cut(p, true), rows = p.batch * p.candidates;
  allocate(p, of_heads, bool(grads.weight), stream);
  if (grads.weight || grads.bias) {
    attention.gate_rows = static_cast<float*>(stream.allocate(stream.owner, 4 * rows));
  }
  start_attention<true>(attention, bytes, stream);

  OuterSum sums[9];
  int count = 0;
  add_sums(p, of_heads, sums, count);
  for (int h = 0; h < p.heads; ++h) {
    const FloatRows query = query_rows(p, h);
    sums[count++] = {attention.gate_rows,          query.data, 1, query.stride, rows, 1, p.d,
                     as_row(grads.weight, h * p.d)};
  }
  sums[count++] = {nullptr, attention.gate_rows, 0, 1, rows, 1, 1, grads.bias};
  outer_sums(stream, sums, count);
}

}  // namespace mimnet_fast::cuda
