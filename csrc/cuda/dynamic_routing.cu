// Users in small numbers per block: few enough for a batch to fill the device, enough for their
// outputs to occupy the threads. The backward of the last pass needs neither the inputs nor the
// logits, only what the forward saved.
#include "dynamic_routing.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.cuh"
#include "weight_gradients.cuh"

namespace mimnet_fast::cuda {
namespace {

constexpr int kThreads = 256;

struct RoutingLaunch {
  RoutingPlan plan;
  View inputs;
  View out, coupling, pooled;
  bool final_squash;
  View grad, grad_inputs;
  float* capsule_rows;  // [B*K, D]: gradient of the capsules before the squash; or null
  float* pooled_rows;   // [B*K, D_in]: a copy of pooled; or null
};

// What a tile of users holds in backward; rows as in RoutingState.
struct RoutingGradients {
  Tile pooled, capsules, grad, grad_pooled, coupling, weight;

  MIMNET_FAST_INLINE RoutingGradients(const RoutingPlan& p, Arena& arena) {
    const int rows = p.users * p.capsules;
    pooled = arena.tile(rows, p.d_in);
    grad = arena.tile(rows, p.d);
    capsules = p.matrices > 0 ? arena.tile(rows, p.d) : pooled;
    grad_pooled = p.matrices > 0 ? arena.tile(rows, p.d_in) : grad;
    coupling = arena.tile(rows, p.positions);
    weight = routing_weight_tile(p, arena);
  }
};

struct Users {
  int64_t first;
  int count;

  explicit MIMNET_FAST_DEVICE Users(const RoutingLaunch& args) {
    const int64_t batch = args.inputs.size[0];
    first = block_index() * args.plan.users;
    count = batch - first < args.plan.users ? int(batch - first) : args.plan.users;
  }
};

// Elements of an input view between positions, between users and between the sets of a user.
struct InputStrides {
  int64_t position, element, user, vote;

  explicit MIMNET_FAST_DEVICE InputStrides(const View& v)
      : position(v.stride[v.dims - 2]),
        element(v.stride[v.dims - 1]),
        user(v.stride[0]),
        vote(v.dims == 4 ? v.stride[1] : 0) {}
};

MIMNET_FAST_DEVICE void load_inputs(const RoutingPlan& p, const Tile& inputs, const View& v,
                                    const Users& users, int start, int count) {
  const InputStrides stride(v);
  const bool joined = count == p.length && (p.votes == 1 || stride.user == p.votes * stride.vote) &&
                      (p.votes == 1 ? stride.user : stride.vote) == p.length * stride.position;
  const int sets = joined ? 1 : users.count * p.votes;
  const int rows = joined ? users.count * p.votes * count : count;
  for (int n = 0; n < sets; ++n) {
    const int64_t offset = (users.first + n / p.votes) * stride.user + n % p.votes * stride.vote +
                           start * stride.position;
    read_matrix(v, offset, rows, p.d_in, stride.position, stride.element,
                [&](int i, int j, float value) { inputs(n * p.positions + i, j) = value; });
  }
}

// put(row, j, value) for rows [B,K,D] of users.
template <class Put>
MIMNET_FAST_DEVICE void load_rows(const RoutingPlan& p, const View& v, const Users& users,
                                  int width, Put put) {
  const bool joined = v.stride[0] == p.capsules * v.stride[1];
  const int rows = joined ? users.count * p.capsules : p.capsules;
  for (int first = 0; first < users.count * p.capsules; first += rows) {
    read_matrix(v, (users.first + first / p.capsules) * v.stride[0], rows, width, v.stride[1],
                v.stride[2], [&](int i, int j, float value) { put(first + i, j, value); });
  }
}

template <int D>
MIMNET_FAST_KERNEL(kThreads, 2)
route_users(RoutingLaunch args) {
  const RoutingPlan& p = args.plan;
  Arena arena(shared_memory());
  const RoutingState s(p, arena);
  const Users users(args);
  const int rows = users.count * p.capsules;
  const int64_t first_row = users.first * p.capsules;
  const bool over_inputs = p.axis == SoftmaxAxis::inputs;
  load_routing_weight(p, s.weight);
  route<D>(
      p, s, users.first, users.count,
      [&](int start, int count) { load_inputs(p, s.inputs, args.inputs, users, start, count); },
      [&](int start, int count) {
        for (int t = thread_index(); t < rows * count; t += block_threads()) {
          const int row = t / count, l = t % count;
          const bool counts = !over_inputs || p.padding == Padding::fill_before ||
                              s.keep[row / p.capsules * p.positions + l] > 0;
          write(args.coupling, (first_row + row) * p.length + start + l,
                counts ? s.coupling(row, l) : kRemoved);
        }
      });
  squash_factors(p, rows, s.capsules, args.final_squash, s.factor);
  sync_block();
  for (int t = thread_index(); t < rows * p.d; t += block_threads()) {
    const int row = t / p.d, j = t % p.d;
    write(args.out, first_row * p.d + t, s.factor[row] * s.capsules(row, j));
  }
  for (int t = thread_index(); t < rows * p.d_in; t += block_threads()) {
    write(args.pooled, first_row * p.d_in + t, s.pooled(t / p.d_in, t % p.d_in));
  }
  if (!over_inputs) return;
  for (int t = thread_index(); t < rows * p.length; t += block_threads()) {
    const int row = t / p.length;
    const int64_t place = first_row * p.length + t;
    const float scale = s.sum[row] > 0 ? s.present[row] / s.sum[row] : 0.0f;
    write(args.coupling, place, exponential(read(args.coupling, place) - s.top[row]) * scale);
  }
}

template <int D>
MIMNET_FAST_KERNEL(kThreads, 2)
route_users_backward(RoutingLaunch args) {
  const RoutingPlan& p = args.plan;
  Arena arena(shared_memory());
  const RoutingGradients s(p, arena);
  const Users users(args);
  const int rows = users.count * p.capsules;
  const int64_t first_row = users.first * p.capsules;
  load_routing_weight(p, s.weight);
  load_rows(p, args.pooled, users, p.d_in, [&](int row, int i, float value) {
    s.pooled(row, i) = value;
    if (args.pooled_rows) store(args.pooled_rows + (first_row + row) * p.d_in + i, value);
  });
  load_rows(p, args.grad, users, p.d, [&](int row, int j, float value) { s.grad(row, j) = value; });
  sync_block();
  if (args.final_squash) {
    if (p.matrices > 0) {
      times_weight<D>(p, s.weight, rows, s.pooled,
                      [&](int row, int j, float sum) { s.capsules(row, j) = sum; });
      sync_block();
    }
    squash_backward(p, rows, s.capsules, s.grad);
    sync_block();
  }
  if (args.capsule_rows) {
    for (int t = thread_index(); t < rows * p.d; t += block_threads()) {
      store(args.capsule_rows + first_row * p.d + t, s.grad(t / p.d, t % p.d));
    }
  }
  if (!args.grad_inputs) return;
  if (p.matrices > 0) {
    times_weight_transposed<D>(p, s.weight, rows, s.grad,
                               [&](int row, int i, float sum) { s.grad_pooled(row, i) = sum; });
  }
  const View& coupling = args.coupling;
  for (int start = 0; start < p.length; start += p.positions) {
    const int count = p.length - start < p.positions ? p.length - start : p.positions;
    sync_block();  // until nobody reads the tile before
    for (int t = thread_index(); t < rows * count; t += block_threads()) {
      const int row = t / count, l = t % count;
      s.coupling(row, l) = read(coupling, (users.first + row / p.capsules) * coupling.stride[0] +
                                              row % p.capsules * coupling.stride[1] +
                                              (start + l) * coupling.stride[2]);
    }
    sync_block();
    input_gradient<D>(p, users.count, count, s.coupling, s.grad_pooled,
                      [&](int n, int l, int d, float value) {
                        const int64_t set = users.first * p.votes + n;
                        write(args.grad_inputs, (set * p.length + start + l) * p.d_in + d, value);
                      });
  }
}

RoutingLaunch make_launch(const RoutingArgs& call) {
  const View& x = call.inputs;
  RoutingLaunch args{};
  RoutingPlan& p = args.plan;
  p.length = int(x.size[x.dims - 2]);
  p.capsules = int(call.capsules);
  p.d_in = int(x.size[x.dims - 1]);
  p.d = call.weight ? int(call.weight.size[call.weight.dims - 1]) : p.d_in;
  p.votes = x.dims == 4 ? p.capsules : 1;
  p.matrices = !call.weight ? 0 : call.weight.dims == 2 ? 1 : p.capsules;
  p.iterations = int(call.iterations);
  p.axis = call.axis;
  p.padding = call.padding;
  p.inner_squash = call.inner_squash;
  p.inverse_temperature = float(1 / call.temperature);
  p.squash = call.squash;
  p.weight = call.weight;
  p.logits = call.logits;
  p.mask = call.mask;
  p.capsule_mask = call.capsule_mask;
  args.inputs = x;
  args.out = call.out;
  args.coupling = call.coupling;
  args.pooled = call.pooled;
  args.final_squash = call.final_squash;
  args.grad = call.grad;
  args.grad_inputs = call.grad_inputs;
  return args;
}

template <class State>
int64_t shared_bytes(RoutingPlan p, int users, int positions) {
  p.users = users;
  p.positions = positions;
  Arena arena(nullptr);
  State(p, arena);
  return arena.bytes();
}

// Chooses the tile, and returns the bytes that it takes.
template <class State>
int64_t choose_tile(RoutingPlan& p, int64_t batch) {
  constexpr int64_t preferred = 48 * 1024;  // several blocks share a multiprocessor
  constexpr int64_t busy = 2 * kThreads;    // outputs that keep a block busy
  const DeviceLimits device = device_limits();
  const auto bytes = [&](int users, int positions) {
    return shared_bytes<State>(p, users, positions);
  };
  int positions = p.length;
  while (positions > 16 && bytes(1, positions) > preferred) positions = (positions + 1) / 2;
  while (positions > 1 && bytes(1, positions) > device.shared_memory) positions /= 2;
  if (bytes(1, positions) > device.shared_memory) {
    throw std::runtime_error(
        "dynamic_routing: K = " + std::to_string(p.capsules) +
        ", D_in = " + std::to_string(p.d_in) + " and D = " + std::to_string(p.d) + " take " +
        std::to_string(bytes(1, 1)) + " bytes of shared memory per user, but the device has " +
        std::to_string(device.shared_memory));
  }
  const int64_t outputs = int64_t(p.capsules) * std::min(positions, p.d_in);
  const int64_t most = std::min((busy + outputs - 1) / outputs, batch / device.multiprocessors / 2);
  int users = 1;
  while (users < most && bytes(users + 1, positions) <= preferred) ++users;
  p.users = users;
  p.positions = positions;
  return bytes(users, positions);
}

template <class F>
void with_width(const RoutingPlan& p, F body) {
  switch (p.d_in == p.d ? p.d : 0) {
    case 8:
      return body(std::integral_constant<int, 8>());
    case 10:
      return body(std::integral_constant<int, 10>());
    case 16:
      return body(std::integral_constant<int, 16>());
    case 64:
      return body(std::integral_constant<int, 64>());
    default:
      return body(std::integral_constant<int, 0>());
  }
}

int64_t blocks_of(const RoutingLaunch& args) {
  return (args.inputs.size[0] + args.plan.users - 1) / args.plan.users;
}

float* rows(const Execution& execution, int64_t count, int64_t width) {
  // An empty batch still needs an address: an outer sum without one has no left operand.
  const int64_t floats = std::max<int64_t>(1, count * width);
  return static_cast<float*>(
      execution.stream.allocate(execution.stream.owner, floats * int64_t(sizeof(float))));
}

bool is_contiguous(const View& v) {
  return v.stride[2] == 1 && v.stride[1] == v.size[2] && v.stride[0] == v.size[1] * v.size[2];
}

}  // namespace

void dynamic_routing(const RoutingArgs& call) {
  RoutingLaunch args = make_launch(call);
  const int64_t bytes = choose_tile<RoutingState>(args.plan, args.inputs.size[0]);
  with_width(args.plan, [&](auto d) {
    launch(route_users<d()>, blocks_of(args), kThreads, bytes, call.execution.stream, args);
  });
}

void dynamic_routing_backward(const RoutingArgs& call) {
  RoutingLaunch args = make_launch(call);
  const RoutingPlan& p = args.plan;
  const int64_t batch = args.inputs.size[0], all_rows = batch * p.capsules;
  const float* pooled_rows = static_cast<const float*>(call.pooled.data);
  if (call.grad_weight) {
    args.capsule_rows = rows(call.execution, all_rows, p.d);
    if (!call.pooled || !is_contiguous(call.pooled)) {
      pooled_rows = args.pooled_rows = rows(call.execution, all_rows, p.d_in);
    }
  }
  const int64_t bytes = choose_tile<RoutingGradients>(args.plan, batch);
  with_width(p, [&](auto d) {
    launch(route_users_backward<d()>, blocks_of(args), kThreads, bytes, call.execution.stream,
           args);
  });
  if (!call.grad_weight) return;
  // Row r of matrix n stands at r * matrices + n; a shared weight takes all rows alike.
  std::vector<OuterSum> sums;
  for (int n = 0; n < p.matrices; ++n) {
    View out = call.grad_weight;
    if (out.dims == 3) {
      out.data = static_cast<char*>(out.data) + n * out.stride[0] * element_size(out.dtype);
      out.dims = 2;
      for (int d = 0; d < 2; ++d) {
        out.size[d] = call.grad_weight.size[d + 1];
        out.stride[d] = call.grad_weight.stride[d + 1];
      }
    }
    sums.push_back({pooled_rows + n * p.d_in, args.capsule_rows + n * p.d,
                    int64_t(p.matrices) * p.d_in, int64_t(p.matrices) * p.d, all_rows / p.matrices,
                    p.d_in, p.d, out});
  }
  outer_sums(call.execution.stream, sums.data(), int(sums.size()));
}

}  // namespace mimnet_fast::cuda
