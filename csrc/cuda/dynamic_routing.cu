// Two ways. Any shape: a block takes some users, few enough for a batch to fill the device and
// enough for their outputs to occupy the threads. On tensor cores, where the shape allows: a warp
// takes a user at a time, the warps of a block share the weight. The backward of the last pass
// needs neither the inputs nor the logits, only what the forward saved.
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
  int64_t warp_bytes;   // shared memory of a warp; tensor cores only
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
          const float keep = s.options.keep[row / p.capsules * p.positions + l];
          const bool counts = !over_inputs || kept_coupling(p, keep) > 0;
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
    const float scale = coupling_scale(s.sum[row], s.options.present[row]);
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

// The weight in shared memory, once all warps have put it there.
template <int P, int D>
MIMNET_FAST_DEVICE Planes<P, D> load_weight_planes(const RoutingPlan& p, Arena& arena) {
  const Planes<P, D> weight(arena, p.matrices * D, D);
  if (p.matrices > 0) {
    load_planes(weight, p.weight, 0, D, D, D, p.weight.stride[p.weight.dims - 2],
                p.weight.stride[p.weight.dims - 1], thread_index(), block_threads());
  }
  sync_block();
  return weight;
}

constexpr int most_blocks(int planes, int d, int n) {
  return planes == 1 && d <= 64 && n == 1 ? 2 : 1;
}

// Elements of a view that is float32 or stored as the P planes are: between the kernels of a whole
// model capsules are float32 next to narrower weights.
template <int P>
MIMNET_FAST_DEVICE float read_as(const View& v, int64_t offset) {
  return P == 3 || v.dtype == DType::float32
             ? load(static_cast<const float*>(v.data) + offset)
             : widen(load(static_cast<const Stored<P>*>(v.data) + offset));
}
template <int P>
MIMNET_FAST_DEVICE void write_as(const View& v, int64_t offset, float value) {
  if (P == 3 || v.dtype == DType::float32) {
    store(static_cast<float*>(v.data) + offset, value);
  } else {
    store(static_cast<Stored<P>*>(v.data) + offset, narrow<Stored<P>>(value));
  }
}

template <int P, int D, int N>
MIMNET_FAST_KERNEL(kThreads, most_blocks(P, D, N))
route_users_tensor(RoutingLaunch args) {
  constexpr int R = D / 16;
  const RoutingPlan& p = args.plan;
  Arena shared(shared_memory());
  const Planes<P, D> weight = load_weight_planes<P, D>(p, shared);
  const int warp = thread_index() / kWarp;
  if (warp >= p.users) return;
  Arena arena(shared_memory() + shared.bytes() + warp * args.warp_bytes);
  const RoutingWarp<P, R, N> s(p, arena);
  const View& x = args.inputs;
  float* coupling = static_cast<float*>(args.coupling.data);
  float* pooled = static_cast<float*>(args.pooled.data);
  // An int, as there are no registers left for more: 2^31 results of a user fit no memory.
  const int first = int(block_index()) * p.users + warp;
  for (int b = first; b < x.size[0]; b += int(grid_blocks()) * p.users) {
    const int64_t row = int64_t(b) * p.capsules;
    RoutedUser<R, N> user;
    route_user(
        p, weight, s, b, user,
        [&](int start, int count, int padded) {
          load_planes(s.inputs, x, b * x.stride[0] + start * x.stride[1], count, padded, D,
                      x.stride[1], x.stride[2], thread_index() % kWarp, kWarp);
        },
        [&](int l, int k, float value) { store(coupling + (row + k) * p.length + l, value); });
    if (args.final_squash) {
      float norm2[N][2];
      dot_columns(user.capsules, user.capsules, norm2);
      scale_columns(user.capsules,
                    [&](int n, int j) { return squash_factor(norm2[n][j], p.squash).factor; });
    }
    for_each_element<R, N>([&](int m, int n, int i) {
      const int k = 8 * n + state_column(i);
      if (k >= p.capsules) return;
      const int64_t place = (row + k) * D + 16 * m + state_row(i);
      store(pooled + place, user.pooled[m][n][i]);
      write_as<P>(args.out, place, user.capsules[m][n][i]);
    });
    if (p.axis == SoftmaxAxis::capsules) continue;
    for (int tile = 0; tile < p.length; tile += 16) {
      for_each_element<1, N>([&](int, int n, int i) {
        const int l = tile + state_row(i), k = 8 * n + state_column(i);
        if (l >= p.length || k >= p.capsules) return;
        float* place = coupling + (row + k) * p.length + l;
        store(place, exponential(load(place) - user.top[n][i % 2]) *
                         coupling_scale(user.sum[n][i % 2], s.options.present[k]));
      });
    }
  }
}

// Neighbours in memory.
template <int P>
MIMNET_FAST_DEVICE void store_pair(Stored<P>* to, float first, float second) {
  if constexpr (P == 1) {
    store(reinterpret_cast<uint32_t*>(to), narrow_pair(first, second));
  } else if constexpr (P == 2) {
    const uint32_t high = narrow<Float16>(second).bits;
    store(reinterpret_cast<uint32_t*>(to), narrow<Float16>(first).bits | high << 16);
  } else {
    store(reinterpret_cast<Words<2>*>(to), {float_as_bits(first), float_as_bits(second)});
  }
}

template <int P, int D, int N>
MIMNET_FAST_KERNEL(kThreads, most_blocks(P, D, N))
route_users_backward_tensor(RoutingLaunch args) {
  constexpr int R = D / 16, Q = kStatePlanes<P>;
  const RoutingPlan& p = args.plan;
  Arena shared(shared_memory());
  const Planes<P, D> weight = load_weight_planes<P, D>(p, shared);
  const View &saved = args.pooled, &given = args.grad, &coupling = args.coupling;
  Stored<P>* grad_inputs = static_cast<Stored<P>*>(args.grad_inputs.data);
  const int warp = thread_index() / kWarp;
  if (warp >= p.users) return;
  Arena arena(shared_memory() + shared.bytes() + warp * args.warp_bytes);
  const ParkedState<R, N> parking(arena);
  for (int64_t b = block_index() * p.users + warp; b < args.inputs.size[0];
       b += grid_blocks() * p.users) {
    float pooled[R][N][4] = {}, grad[R][N][4] = {};
    for_each_element<R, N>([&](int m, int n, int i) {
      const int k = 8 * n + state_column(i), d = 16 * m + state_row(i);
      if (k >= p.capsules) return;
      pooled[m][n][i] = load(static_cast<const float*>(saved.data) + b * saved.stride[0] +
                             k * saved.stride[1] + d * saved.stride[2]);
      grad[m][n][i] =
          read_as<P>(given, b * given.stride[0] + k * given.stride[1] + d * given.stride[2]);
    });
    if (args.final_squash) {
      float capsules[R][N][4], norm2[N][2], dot[N][2], along[N][2];
      times_weight<false>(p, weight, parking, pooled, capsules);
      dot_columns(capsules, capsules, norm2);
      dot_columns(capsules, grad, dot);
      scale_columns(grad, [&](int n, int j) {
        const SquashFactor<float> f = squash_factor(norm2[n][j], p.squash);
        along[n][j] = norm2[n][j] > 0 ? 2 * f.radial * (dot[n][j] / norm2[n][j]) : 0.0f;
        return f.factor;
      });
      for_each_element<R, N>(
          [&](int m, int n, int i) { grad[m][n][i] += along[n][i % 2] * capsules[m][n][i]; });
    }
    for_each_element<R, N>([&](int m, int n, int i) {
      const int k = 8 * n + state_column(i);
      const int64_t place = (b * p.capsules + k) * D + 16 * m + state_row(i);
      if (args.capsule_rows && k < p.capsules) store(args.capsule_rows + place, grad[m][n][i]);
      if (args.pooled_rows && k < p.capsules) store(args.pooled_rows + place, pooled[m][n][i]);
    });
    if (!args.grad_inputs) continue;
    float grad_pooled[R][N][4];
    times_weight<true>(p, weight, parking, grad, grad_pooled);
    // Capsules are what this product sums over, so that the state is an operand as it stands.
    uint32_t right[2 * R][Q][2] = {};
#pragma unroll
    for (int m = 0; m < R; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t pair[Q];
          split(grad_pooled[m][n][2 * half], grad_pooled[m][n][2 * half + 1], pair);
#pragma unroll
          for (int q = 0; q < Q; ++q) right[2 * m + half][q][n] = pair[q];
        }
      }
    }
    for (int row = 0; row < p.length; row += 16) {
      float c[1][N][4] = {};
      for_each_element<1, N>([&](int, int n, int i) {
        // Element i: position lane / 4 + i / 2 * 8 and a capsule of the lane's two.
        const int l = row + state_row(i), k = 8 * n + state_column(i);
        if (l >= p.length || k >= p.capsules) return;
        c[0][n][i] = load(static_cast<const float*>(coupling.data) + b * coupling.stride[0] +
                          k * coupling.stride[1] + l * coupling.stride[2]);
      });
      uint32_t left[Q][4] = {};
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t pair[Q];
          split(c[0][n][2 * half], c[0][n][2 * half + 1], pair);
#pragma unroll
          for (int q = 0; q < Q; ++q) left[q][2 * n + half] = pair[q];
        }
      }
#pragma unroll
      for (int m = 0; m < 2 * R; ++m) {
        float grad_x[4] = {};
        multiply_add(grad_x, left, right[m]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int l = row + state_row(2 * half);
          if (l < p.length) {
            store_pair<P>(grad_inputs + (b * p.length + l) * D + 8 * m + state_column(0),
                          grad_x[2 * half], grad_x[2 * half + 1]);
          }
        }
      }
    }
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

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int64_t blocks_of(const RoutingLaunch& args) {
  return (args.inputs.size[0] + args.plan.users - 1) / args.plan.users;
}

// Starts as many blocks as fit on the device, for warps that take users in turn.
void launch_users(void (*kernel)(RoutingLaunch), const Stream& stream, const RoutingLaunch& args,
                  int64_t bytes, int most_per_multiprocessor) {
  constexpr int least_warps = 4;      // to load the weight
  constexpr int64_t reserved = 1024;  // bytes of shared memory that a block takes besides its own
  const DeviceLimits device = device_limits();
  const int64_t fit = (device.shared_memory + reserved) / (bytes + reserved);
  const int64_t per_multiprocessor = std::min<int64_t>(fit, most_per_multiprocessor);
  const int64_t blocks = std::min(blocks_of(args), per_multiprocessor * device.multiprocessors);
  launch(kernel, blocks, std::max(args.plan.users, least_warps) * kWarp, bytes, stream, args);
}

// body(planes, D, eights of capsules) for shapes that tensor cores serve, if this is one.
template <class F>
bool with_tensor_shape(const RoutingPlan& p, DType dtype, F body) {
  const auto with_planes = [&](auto d, auto n) {
    switch (planes_of(dtype)) {
      case 1:
        return body(std::integral_constant<int, 1>(), d, n);
      case 2:
        return body(std::integral_constant<int, 2>(), d, n);
      default:
        return body(std::integral_constant<int, 3>(), d, n);
    }
  };
  const int columns = (p.capsules + 7) / 8;
  if (p.votes > 1 || p.matrices > 1 || p.d_in != p.d || columns > 2) return false;
  if (p.weight && p.weight.dtype != dtype) return false;
  switch (p.d + columns) {
    case 32 + 1:
      return with_planes(std::integral_constant<int, 32>(), std::integral_constant<int, 1>());
    case 32 + 2:
      return with_planes(std::integral_constant<int, 32>(), std::integral_constant<int, 2>());
    case 64 + 1:
      return with_planes(std::integral_constant<int, 64>(), std::integral_constant<int, 1>());
    case 64 + 2:
      return with_planes(std::integral_constant<int, 64>(), std::integral_constant<int, 2>());
    case 128 + 1:
      return with_planes(std::integral_constant<int, 128>(), std::integral_constant<int, 1>());
    default:
      return false;
  }
}

template <int P, int D>
int64_t weight_bytes(const RoutingPlan& p) {
  Arena arena(nullptr);
  Planes<P, D>(arena, p.matrices * D, D);
  return arena.bytes();
}

// Users of a block, one for each of its warps, when the batch is dealt to all multiprocessors.
int share_of_block(int64_t batch, const DeviceLimits& device) {
  const int64_t share = (batch + device.multiprocessors - 1) / device.multiprocessors;
  return int(std::clamp<int64_t>(share, 1, kThreads / kWarp));
}

// Both return false where the device has too little shared memory.

template <int P, int D, int N>
bool launch_forward_tensor(const Stream& stream, RoutingLaunch args) {
  RoutingPlan& p = args.plan;
  const DeviceLimits device = device_limits();
  const auto warp_bytes = [&] {
    Arena arena(nullptr);
    RoutingWarp<P, D / 16, N>(p, arena);
    return arena.bytes();
  };
  const auto bytes = [&](int users) { return weight_bytes<P, D>(p) + users * warp_bytes(); };
  p.users = share_of_block(args.inputs.size[0], device);
  p.positions = int(round_up(p.length, 16));
  // Rather a history in tiles than a multiprocessor with less than four warps.
  while (p.positions > 16 && bytes(std::min(p.users, 4)) > device.shared_memory) {
    p.positions = int(round_up(p.positions / 2, 16));
  }
  while (p.users > 1 && bytes(p.users) > device.shared_memory) --p.users;
  if (bytes(p.users) > device.shared_memory) return false;
  args.warp_bytes = warp_bytes();
  launch_users(route_users_tensor<P, D, N>, stream, args, bytes(p.users), most_blocks(P, D, N));
  return true;
}

template <int P, int D, int N>
bool launch_backward_tensor(const Stream& stream, RoutingLaunch args) {
  RoutingPlan& p = args.plan;
  const DeviceLimits device = device_limits();
  Arena arena(nullptr);
  ParkedState<D / 16, N>{arena};
  args.warp_bytes = arena.bytes();
  p.users = share_of_block(args.inputs.size[0], device);
  const int64_t bytes = weight_bytes<P, D>(p) + p.users * args.warp_bytes;
  if (bytes > device.shared_memory) return false;
  launch_users(route_users_backward_tensor<P, D, N>, stream, args, bytes, most_blocks(P, D, N));
  return true;
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
  const bool done = with_tensor_shape(args.plan, args.inputs.dtype, [&](auto p, auto d, auto n) {
    return launch_forward_tensor<p(), d(), n()>(call.execution.stream, args);
  });
  if (done) return;
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
  const bool done = with_tensor_shape(p, args.inputs.dtype, [&](auto planes, auto d, auto n) {
    return launch_backward_tensor<planes(), d(), n()>(call.execution.stream, args);
  });
  if (!done) {
    const int64_t bytes = choose_tile<RoutingGradients>(args.plan, batch);
    with_width(p, [&](auto d) {
      launch(route_users_backward<d()>, blocks_of(args), kThreads, bytes, call.execution.stream,
             args);
    });
  }
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
