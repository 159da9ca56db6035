// Forward: a block per tile of users and candidates. Backward: a block owns its users and goes over
// their candidates in order, so that it alone sums the gradients of their interests.
#include "target_attention.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "ops.cuh"

namespace mimnet_fast::cuda {

namespace {

bool on_tensor_cores(int d) { return d == 32 || d == 64 || d == 128; }

int64_t shared_bytes(const AttentionPlan& p, bool backward) {
  Arena arena(nullptr);
  AttentionState(p, arena, backward);
  return arena.bytes();
}

bool are_float_rows(const View& v) {
  const bool even = v.size[0] == 1 || v.size[1] == 1 || v.stride[0] == v.size[1] * v.stride[1];
  return v.dtype == DType::float32 && even && (v.size[2] == 1 || v.stride[2] == 1);
}

FloatRows float_rows(const View& v, const float* saved) {
  if (saved) return {saved, v.size[2]};
  return {static_cast<const float*>(v.data), v.stride[v.size[1] == 1 ? 0 : 1]};
}

const float* of_head(const AttentionPlan& p, const float* rows, int head, int64_t width) {
  return rows ? rows + head * p.batch * p.candidates * width : nullptr;
}

}  // namespace

int64_t cut(AttentionPlan& p, bool backward) {
  constexpr int most_rows = 32;
  constexpr int64_t preferred = 96 * 1024, most_of_keys = 24 * 1024;
  const DeviceLimits limits = device_limits();
  const bool tensor = on_tensor_cores(p.d);
  p.row_stride = tensor ? p.d + 8 : tile_stride(p.d);
  p.stages_weights = !tensor && p.d <= 40;

  const auto take = [&](int64_t users, int candidates) {
    p.tile_users = int(users);
    p.candidate_tiles = std::max(1, (p.candidates + candidates - 1) / candidates);
    p.tile_candidates = std::max(1, (p.candidates + p.candidate_tiles - 1) / p.candidate_tiles);
    const int64_t keys = 4 * users * p.interests * tile_stride(p.d);
    p.stages_keys = !tensor && keys <= most_of_keys;
    return shared_bytes(p, backward);
  };
  take(1, most_rows);
  const int64_t resident = 2 * limits.multiprocessors;  // blocks that fill the device
  int64_t users = 1;
  if (p.candidate_tiles == 1) {
    users =
        std::clamp<int64_t>((p.batch + resident - 1) / resident, 1, most_rows / p.tile_candidates);
  }
  int candidates = p.tile_candidates;
  int64_t bytes = take(users, candidates);
  while (bytes > preferred && users > 1) bytes = take(--users, candidates);
  while (bytes > preferred && candidates > 1) bytes = take(1, candidates /= 2);
  if (bytes > limits.shared_memory) {
    throw std::runtime_error("mimnet_fast: attention over K=" + std::to_string(p.interests) +
                             " interests of D=" + std::to_string(p.d) + " takes " +
                             std::to_string(bytes) + " bytes of shared memory, the device has " +
                             std::to_string(limits.shared_memory));
  }
  return bytes;
}

void allocate(AttentionPlan& p, const AttentionWeights* grads, bool queries, const Stream& stream) {
  const int64_t rows = p.batch * p.candidates;
  bool key = false, value = false, bias = false, even_queries = true;
  for (int h = 0; h < p.heads; ++h) {
    key = key || grads[h].key_weight;
    value = value || grads[h].value_weight;
    bias = bias || grads[h].value_bias;
    even_queries = even_queries && are_float_rows(p.query[h]);
  }
  const auto floats = [&](bool wanted, int64_t count) {
    return wanted ? static_cast<float*>(stream.allocate(stream.owner, 4 * count)) : nullptr;
  };
  p.rows.query = floats((key || queries) && !even_queries, rows * p.heads * p.d);
  p.rows.folded_grad = floats(key, rows * p.heads * p.d);
  p.rows.grad = floats((value || bias) && !are_float_rows(p.grad), rows * p.d);
  p.rows.pooled = floats(value, rows * p.heads * p.d);
  p.rows.share = floats(bias, rows * p.heads);
  p.interests_grad = floats(p.candidate_tiles > 1, p.batch * p.interests * p.d);
}

FloatRows query_rows(const AttentionPlan& p, int head) {
  return float_rows(p.query[head], of_head(p, p.rows.query, head, p.d));
}

View as_row(View v, int64_t first) {
  if (!v) return v;
  v.data = static_cast<char*>(v.data) + first * v.stride[0] * element_size(v.dtype);
  v.dims = 2;
  v.stride[1] = v.stride[0];
  return v;
}

void add_sums(const AttentionPlan& p, const AttentionWeights* grads, OuterSum* sums, int& count) {
  const int64_t rows = p.batch * p.candidates, d = p.d;
  const FloatRows grad = float_rows(p.grad, p.rows.grad);
  for (int h = 0; h < p.heads; ++h) {
    const FloatRows query = query_rows(p, h);
    const float* folded_grad = of_head(p, p.rows.folded_grad, h, d);
    const float* pooled = of_head(p, p.rows.pooled, h, d);
    const float* share = of_head(p, p.rows.share, h, 1);
    sums[count++] = {query.data, folded_grad, query.stride, d, rows, p.d, p.d, grads[h].key_weight};
    sums[count++] = {grad.data, pooled, grad.stride, d, rows, p.d, p.d, grads[h].value_weight};
    sums[count++] = {share, grad.data, 1,   grad.stride,
                     rows,  1,         p.d, as_row(grads[h].value_bias, 0)};
  }
}

namespace {

struct TargetAttention {
  AttentionPlan plan;
  View out, coefficients;
  View grad_query, grad_interests;

  template <int D, int P>
  MIMNET_FAST_DEVICE void forward() const {
    const AttentionPlan& p = plan;
    Arena arena(shared_memory());
    const AttentionState s(p, arena, false);
    const AttentionTile tile = attention_tile(p, block_index() / p.candidate_tiles,
                                              int(block_index() % p.candidate_tiles));
    stage<P>(p, s, tile);
    load_queries(p, s, tile);
    share_alike(s, tile);
    sync_block();
    fold_queries<D, P>(p, s, tile);
    sync_block();
    attend_forward<D, P>(p, s, tile);
    sync_block();
    project_pooled<D, P>(p, s, tile, [&](int row, int d, float value) {
      write(out, (tile.row + row) * p.d + d, value);
    });
    for (int t = thread_index(); t < tile.rows() * p.interests; t += block_threads()) {
      write(coefficients, tile.row * p.interests + t,
            s.coefficients(t / p.interests, t % p.interests));
    }
  }

  template <int D, int P>
  MIMNET_FAST_DEVICE void backward() const {
    const AttentionPlan& p = plan;
    Arena arena(shared_memory());
    const AttentionState s(p, arena, true);
    for (int t = 0; t < p.candidate_tiles; ++t) {
      const AttentionTile tile = attention_tile(p, block_index(), t);
      if (t == 0) stage<P>(p, s, tile);
      load_queries(p, s, tile);
      load_grad(p, s, tile);
      share_alike(s, tile);
      sync_block();
      fold_queries<D, P>(p, s, tile);
      project_grad<D, P>(p, s, tile);
      sync_block();
      attend_backward<D, P>(p, s, tile);
      sync_block();
      save_shares(p, s, tile);
      if (grad_interests) {
        interests_gradient<D>(p, s, tile, [&](int u, int k, int d, float value) {
          write_interests_gradient(p, t, grad_interests,
                                   ((tile.user + u) * p.interests + k) * p.d + d, value);
        });
      }
      if (grad_query) {
        query_gradient<D, P>(p, s, tile, [&](int row, int d, float value) {
          write(grad_query, (tile.row + row) * p.d + d, value);
        });
      }
      sync_block();
    }
  }

 private:
  static MIMNET_FAST_DEVICE void share_alike(const AttentionState& s, const AttentionTile& tile) {
    for (int row = thread_index(); row < tile.rows(); row += block_threads()) s.share[row] = 1;
  }
};

TargetAttention attention(const AttentionArgs& call) {
  TargetAttention attention{};
  AttentionPlan& p = attention.plan;
  p.heads = 1;
  p.interests = int(call.interests.size[1]);
  p.d = int(call.interests.size[2]);
  p.batch = call.query.size[0];
  p.candidates = int(call.query.size[1]);
  p.query[0] = call.query;
  p.keys = call.interests;
  p.capsule_mask = call.capsule_mask;
  p.weights[0] = call.weights;
  p.scale = float(call.scale);
  p.power = int(call.power);
  p.hard = call.hard;
  p.grad = call.grad;
  p.grad_coefficients = call.grad_coefficients;
  attention.out = call.out;
  attention.coefficients = call.coefficients;
  attention.grad_query = call.grad_query;
  attention.grad_interests = call.grad_interests;
  return attention;
}

}  // namespace

void target_attention(const AttentionArgs& call) {
  TargetAttention attention = cuda::attention(call);
  start_attention<false>(attention, cut(attention.plan, false), call.execution.stream);
}

void target_attention_backward(const AttentionArgs& call) {
  const Stream& stream = call.execution.stream;
  TargetAttention attention = cuda::attention(call);
  AttentionPlan& p = attention.plan;
  const int64_t bytes = cut(p, true);
  allocate(p, &call.grad_weights, false, stream);
  start_attention<true>(attention, bytes, stream);
  OuterSum sums[3];
  int count = 0;
  add_sums(p, &call.grad_weights, sums, count);
  outer_sums(stream, sums, count);
}

}  // namespace mimnet_fast::cuda
