// Two heads of an attention, the item's and its prototype's, and the gate that divides between
// them: the share of the prototype is sigmoid(w . [item; prototype] + b), the item has the rest.
#pragma once

#include "target_attention.cuh"

namespace mimnet_fast::cuda {

struct GatePlan {
  View weight, bias;
  View grad;  // [B,C], backward only
};

MIMNET_FAST_DEVICE float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

// Shares of both heads, as put(row of the tile, gate) too; in backward the part of their gradients
// that needs no attention.
template <int D, bool kBackward, class Put>
MIMNET_FAST_DEVICE void open_gate(const AttentionPlan& p, const GatePlan& gate,
                                  const AttentionState& s, const AttentionTile& tile, Put put) {
  const Width<D> d(p.d);
  const int rows = tile.rows();
  const auto vector = [](const View& v, int i) { return read(v, i * v.stride[0]); };
  share_rows(rows, [&](int row, int lane, bool valid) {
    float logit = 0, fine = 0, coarse = 0;
    for (int j = lane; j < d; j += kAttentionLanes) {
      logit += vector(gate.weight, j) * s.query(row, j);
      logit += vector(gate.weight, d + j) * s.query(rows + row, j);
      if (kBackward) {
        fine += vector(p.weights[0].value_bias, j) * s.grad(row, j);
        coarse += vector(p.weights[1].value_bias, j) * s.grad(row, j);
      }
    }
    logit = row_sum(logit) + vector(gate.bias, 0);
    fine = row_sum(fine);
    coarse = row_sum(coarse);
    if (!valid || lane != 0) return;
    s.share[row] = sigmoid(-logit);
    s.share[rows + row] = sigmoid(logit);
    put(row, s.share[rows + row]);
    if constexpr (kBackward) {
      if (gate.grad) {
        const int u = row / tile.candidates, c = tile.first_candidate + row % tile.candidates;
        coarse += read(gate.grad, (tile.user + u) * gate.grad.stride[0] + c * gate.grad.stride[1]);
      }
      s.share_grad[row] = fine;
      s.share_grad[rows + row] = coarse;
    }
  });
}

// Of the gate before its sigmoid, after attend_backward.
MIMNET_FAST_DEVICE float gate_gradient(const AttentionState& s, int rows, int row) {
  return s.share[row] * s.share[rows + row] * (s.share_grad[rows + row] - s.share_grad[row]);
}

// put(head, row of the head, d, gradient of the query), with what comes to it through the gate.
template <int D, int P, class Put>
MIMNET_FAST_DEVICE void queries_gradient(const AttentionPlan& p, const GatePlan& gate,
                                         const AttentionState& s, const AttentionTile& tile,
                                         Put put) {
  const int rows = tile.rows();
  query_gradient<D, P>(p, s, tile, [&](int row, int d, float value) {
    const int head = row < rows ? 0 : 1, in_head = row - head * rows;
    const float weight = read(gate.weight, (head * p.d + d) * gate.weight.stride[0]);
    put(head, in_head, d, value + weight * gate_gradient(s, rows, in_head));
  });
}

}  // namespace mimnet_fast::cuda
