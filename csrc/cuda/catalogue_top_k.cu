// The best items of a catalogue for every user: a block takes a user through a part of it.
//
// Keys and values are projected once per user. Then a thread rates one item of a round at a time,
// and the block keeps the best as integers in the order of the result: the score's bits above the
// index counted down. Most rounds have nothing better than the worst of these and end with a vote;
// the others are sorted in. The parts of a user are merged in the end.
#include <algorithm>

#include "block.cuh"
#include "ops.cuh"

namespace mimnet_fast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTogether = 4;  // interests of a user that meet an item in registers
constexpr float kNone = -__builtin_huge_valf();

// What an interest has in one feature.
struct alignas(16) Projected {
  float fine_key, fine_value, coarse_key, coarse_value;
};

struct CatalogueLaunch {
  View interests, items, prototypes, prototype_ids;
  FusionWeights weights;
  View excluded, excluded_offsets;
  View scores, indices;
  int64_t users, count, prototype_count;
  int k, d, top;
  int round;  // items that a block rates together
  int slots;  // a power of two, for the best and a round
  int64_t parts, part;
  Projected* projected;  // [B,K,D]
  uint64_t* ranks;       // the best of each part, [B,parts,top]
};

// Ranks: integers in the order of the result, 0 is nothing.

MIMNET_FAST_DEVICE uint64_t rank_of(float score, int64_t index) {
  if (!(score > kNone)) return 0;
  const uint32_t bits = float_as_bits(score == 0 ? 0.0f : score);  // both zeros are the same
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(ordered) << 32 | (0xffffffffu - uint32_t(index));
}
MIMNET_FAST_DEVICE float score_of(uint64_t rank) {
  const uint32_t ordered = uint32_t(rank >> 32);
  return rank == 0 ? kNone : bits_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}
MIMNET_FAST_DEVICE int64_t index_of(uint64_t rank) {
  return rank == 0 ? -1 : int64_t(0xffffffffu - uint32_t(rank));
}

// The best ranks that a block has seen, falling, in shared memory.
class Best {
 public:
  MIMNET_FAST_INLINE Best(const CatalogueLaunch& args, Arena& arena)
      : top_(args.top),
        slots_(args.slots),
        ranks_(reinterpret_cast<uint64_t*>(arena.floats(2 * args.slots))),
        vote_(reinterpret_cast<int*>(arena.floats(1))) {}

  MIMNET_FAST_DEVICE void clear() {
    for (int i = thread_index(); i < slots_; i += block_threads()) ranks_[i] = 0;
    sync_block();
  }

  // One rank of each thread; accept() is asked about those that are good enough.
  template <class Accept>
  MIMNET_FAST_DEVICE void offer(uint64_t rank, Accept accept) {
    if (thread_index() == 0) *vote_ = 0;
    sync_block();
    const bool better = rank > ranks_[top_ - 1] && accept();
    if (better) *vote_ = 1;
    sync_block();
    const bool any = *vote_ != 0;
    if (any) {
      for (int i = top_ + thread_index(); i < slots_; i += block_threads()) {
        ranks_[i] = better && i == top_ + thread_index() ? rank : 0;
      }
    }
    sync_block();
    if (any) sort();
  }

  MIMNET_FAST_DEVICE uint64_t operator[](int i) const { return ranks_[i]; }

 private:
  // Bitonic, the largest first.
  MIMNET_FAST_DEVICE void sort() {
    for (int size = 2; size <= slots_; size *= 2) {
      for (int apart = size / 2; apart > 0; apart /= 2) {
        for (int t = thread_index(); t < slots_ / 2; t += block_threads()) {
          const int i = t / apart * 2 * apart + t % apart, j = i + apart;
          const bool falling = (i & size) == 0;
          if ((ranks_[i] < ranks_[j]) == falling) {
            const uint64_t lower = ranks_[i];
            ranks_[i] = ranks_[j];
            ranks_[j] = lower;
          }
        }
        sync_block();
      }
    }
  }

  int top_, slots_;
  uint64_t* ranks_;
  int* vote_;
};

MIMNET_FAST_KERNEL(kThreads, 4) catalogue_project(CatalogueLaunch args) {
  const int64_t t = block_index() * kThreads + thread_index();
  if (t >= args.users * args.k * args.d) return;
  const int j = int(t % args.d);
  const int64_t interest = t / args.d;
  const View& from = args.interests;
  const int64_t row = interest / args.k * from.stride[0] + interest % args.k * from.stride[1];
  const auto project = [&](const View& weight) {
    float sum = 0;
    for (int i = 0; i < args.d; ++i) {
      sum += read(weight, j * weight.stride[0] + i * weight.stride[1]) *
             read(from, row + i * from.stride[2]);
    }
    return sum;
  };
  const auto bias = [&](const View& v) { return read(v, j * v.stride[0]); };
  const AttentionWeights &fine = args.weights.fine, &coarse = args.weights.coarse;
  store(args.projected + t,
        Projected{project(fine.key_weight), project(fine.value_weight) + bias(fine.value_bias),
                  project(coarse.key_weight),
                  project(coarse.value_weight) + bias(coarse.value_bias)});
}

// A user in shared memory, and the items of a round.
struct CatalogueState {
  Best best;
  Projected* projected;  // [K,D]
  float* gate;           // [2*D] and the bias
  Tile item, guide;      // [round, D]

  MIMNET_FAST_INLINE CatalogueState(const CatalogueLaunch& args, Arena& arena)
      : best(args, arena),
        projected(reinterpret_cast<Projected*>(arena.floats(int64_t(4) * args.k * args.d))),
        gate(arena.floats(2 * args.d + 1)),
        item(arena.tile(args.round, args.d)),
        guide(arena.tile(args.round, args.d)) {}
};

// A softmax over what comes in parts, and the values that it weighs.
struct Attended {
  float most = kNone, sum = 0, value = 0;

  MIMNET_FAST_DEVICE void add(const float (&score)[kTogether], const float (&values)[kTogether]) {
    float above = most;
#pragma unroll
    for (int n = 0; n < kTogether; ++n) above = maximum(above, score[n]);
    const float scale = exponential(most - above);
    most = above;
    sum *= scale;
    value *= scale;
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const float weight = exponential(score[n] - above);
      sum += weight;
      value += weight * values[n];
    }
  }
};

// The score of item `row` of the round.
MIMNET_FAST_DEVICE float rate(const CatalogueLaunch& args, const CatalogueState& s, int row) {
  float logit = s.gate[2 * args.d];
  for (int i = 0; i < args.d; ++i) {
    logit += s.gate[i] * s.item(row, i) + s.gate[args.d + i] * s.guide(row, i);
  }
  Attended fine, coarse;
  for (int first = 0; first < args.k; first += kTogether) {
    float fine_score[kTogether] = {}, fine_value[kTogether] = {};
    float coarse_score[kTogether] = {}, coarse_value[kTogether] = {};
    for (int i = 0; i < args.d; ++i) {
      const float item = s.item(row, i), guide = s.guide(row, i);
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        const int k = first + n < args.k ? first + n : first;
        const Projected p = s.projected[k * args.d + i];
        fine_score[n] += p.fine_key * item;
        fine_value[n] += p.fine_value * item;
        coarse_score[n] += p.coarse_key * guide;
        coarse_value[n] += p.coarse_value * item;
      }
    }
#pragma unroll
    for (int n = 1; n < kTogether; ++n) {
      if (first + n >= args.k) fine_score[n] = coarse_score[n] = kNone;
    }
    fine.add(fine_score, fine_value);
    coarse.add(coarse_score, coarse_value);
  }
  const float share = 1 / (1 + exponential(-logit));
  return (1 - share) * (fine.value / fine.sum) + share * (coarse.value / coarse.sum);
}

// Row of an item's prototype; -1: there is none.
MIMNET_FAST_DEVICE int64_t prototype_of(const CatalogueLaunch& args, int64_t item) {
  if (!args.prototype_ids) return item;
  const int64_t row = read_integer(args.prototype_ids, item * args.prototype_ids.stride[0]);
  return 0 <= row && row < args.prototype_count ? row : -1;
}

MIMNET_FAST_DEVICE bool is_excluded(const CatalogueLaunch& args, int64_t user, int64_t item) {
  if (!args.excluded) return false;
  const auto bound = [&](int64_t i) {  // offsets are unchecked on a device
    const int64_t value = read_integer(args.excluded_offsets, i * args.excluded_offsets.stride[0]);
    return value < 0 ? 0 : value < args.excluded.size[0] ? value : args.excluded.size[0];
  };
  const int64_t end = bound(user + 1);
  for (int64_t i = bound(user); i < end; ++i) {
    if (read_integer(args.excluded, i * args.excluded.stride[0]) == item) return true;
  }
  return false;
}

MIMNET_FAST_KERNEL(kThreads, 4) catalogue_rate(MIMNET_FAST_ARGUMENTS CatalogueLaunch args) {
  Arena arena(shared_memory());
  CatalogueState s(args, arena);
  const int64_t user = block_index() / args.parts, part = block_index() % args.parts;
  const int64_t stop = part + 1 < args.parts ? (part + 1) * args.part : args.count;
  for (int t = thread_index(); t < args.k * args.d; t += block_threads()) {
    s.projected[t] = load(args.projected + user * args.k * args.d + t);
  }
  const FusionWeights& fusion = args.weights;
  for (int t = thread_index(); t <= 2 * args.d; t += block_threads()) {
    s.gate[t] =
        t < 2 * args.d ? read(fusion.weight, t * fusion.weight.stride[0]) : read(fusion.bias, 0);
  }
  s.best.clear();
  for (int64_t first = part * args.part; first < stop; first += args.round) {
    const int here = stop - first < args.round ? int(stop - first) : args.round;
    for (int t = thread_index(); t < here * args.d; t += block_threads()) {
      const int row = t / args.d, i = t % args.d;
      const int64_t guide = prototype_of(args, first + row);
      const View &items = args.items, &prototypes = args.prototypes;
      s.item(row, i) = read(items, (first + row) * items.stride[0] + i * items.stride[1]);
      s.guide(row, i) =
          guide < 0 ? 0 : read(prototypes, guide * prototypes.stride[0] + i * prototypes.stride[1]);
    }
    sync_block();
    const int row = thread_index();
    uint64_t rank = 0;
    if (row < here && prototype_of(args, first + row) >= 0) {
      rank = rank_of(rate(args, s, row), first + row);
    }
    s.best.offer(rank, [&] { return !is_excluded(args, user, first + row); });
  }
  uint64_t* list = args.ranks + block_index() * args.top;
  for (int i = thread_index(); i < args.top; i += block_threads()) store(list + i, s.best[i]);
}

MIMNET_FAST_KERNEL(kThreads, 4) catalogue_merge(MIMNET_FAST_ARGUMENTS CatalogueLaunch args) {
  Arena arena(shared_memory());
  Best best(args, arena);
  const int64_t user = block_index(), count = args.parts * args.top;
  best.clear();
  for (int64_t first = 0; first < count; first += args.round) {
    const int64_t i = first + thread_index();
    const bool given = thread_index() < args.round && i < count;
    best.offer(given ? load(args.ranks + user * count + i) : 0, [] { return true; });
  }
  for (int i = thread_index(); i < args.top; i += block_threads()) {
    const View &scores = args.scores, &indices = args.indices;
    write(scores, user * scores.stride[0] + i * scores.stride[1], score_of(best[i]));
    store(static_cast<int64_t*>(indices.data) + user * indices.stride[0] + i * indices.stride[1],
          index_of(best[i]));
  }
}

}  // namespace

void catalogue_top_k(const CatalogueArgs& call) {
  constexpr int64_t preferred = 48 * 1024;
  const Stream& stream = call.execution.stream;
  const DeviceLimits limits = device_limits();
  CatalogueLaunch args{};
  args.interests = call.interests;
  args.items = call.items;
  args.prototypes = call.prototypes;
  args.prototype_ids = call.prototype_ids;
  args.weights = call.weights;
  args.excluded = call.excluded;
  args.excluded_offsets = call.excluded_offsets;
  args.scores = call.scores;
  args.indices = call.indices;
  args.users = call.interests.size[0];
  args.count = call.items.size[0];
  args.prototype_count = call.prototypes.size[0];
  args.k = int(call.interests.size[1]);
  args.d = int(call.interests.size[2]);
  args.top = int(call.scores.size[1]);
  if (args.users == 0) return;

  const auto cut = [&](int round) {
    args.round = round;
    args.slots = 2;
    while (args.slots < args.top + kThreads) args.slots *= 2;
    Arena arena(nullptr);
    CatalogueState(args, arena);
    return arena.bytes();
  };
  int64_t bytes = cut(kThreads);
  while (bytes > preferred && args.round > kWarp) bytes = cut(args.round / 2);
  if (bytes > limits.shared_memory) {
    throw std::runtime_error(
        "mimnet_fast: the best " + std::to_string(args.top) + " for K=" + std::to_string(args.k) +
        " interests of D=" + std::to_string(args.d) + " take " + std::to_string(bytes) +
        " bytes of shared memory, the device has " + std::to_string(limits.shared_memory));
  }
  // Few users leave the device idle, so that several blocks share a user.
  const int64_t resident = 8 * limits.multiprocessors, rounds = (args.count - 1) / args.round + 1;
  args.parts = std::clamp<int64_t>(resident / args.users, 1, (rounds + 7) / 8);
  args.part = ((rounds - 1) / args.parts + 1) * args.round;
  args.parts = (args.count - 1) / args.part + 1;

  const auto allocate = [&](int64_t count) { return stream.allocate(stream.owner, count); };
  const int64_t elements = args.users * args.k * args.d;
  args.projected = static_cast<Projected*>(allocate(elements * int64_t(sizeof(Projected))));
  args.ranks = static_cast<uint64_t*>(allocate(8 * args.users * args.parts * args.top));
  launch(catalogue_project, (elements + kThreads - 1) / kThreads, kThreads, 0, stream, args);
  launch(catalogue_rate, args.users * args.parts, kThreads, bytes, stream, args);
  launch(catalogue_merge, args.users, kThreads, bytes, stream, args);
}

}  // namespace mimnet_fast::cuda
