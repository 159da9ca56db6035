// Histories of different lengths in the rows of a tensor: one after another, those of user b being
// rows offsets[b] to offsets[b + 1], or each at the start of as many rows as the longest may have.
// A group costs as much as its longest history, so users are visited in order of length; whatever
// they leave behind stands where it would in any other order.
#pragma once

#include <cstring>

#include "memory.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

class Histories {
 public:
  // None: every user has as many positions as the tensor.
  Histories() = default;

  // Offsets that nobody could check, those of a traced graph, are bounded: all rows belong to one
  // user each, and no other memory is touched.
  Histories(const View& offsets, int64_t rows, int64_t lanes) : Histories(offsets.size[0] - 1) {
    int64_t start = 0;
    for (int64_t b = 0; b < batch_; ++b) {
      const int64_t end = b + 1 < batch_ ? bounded(integer(offsets, b + 1), start, rows) : rows;
      set(b, start, end - start);
      start = end;
    }
    sort(lanes);
  }

  // Of as many positions for each user, the first of which are real: a mask says which, or lengths
  // how many. None where others are real too, and where all are, for which no mask remains.
  static Histories of_mask(View& mask, int64_t positions, int64_t lanes) {
    Histories result(mask.size[0]);
    bool all = true;
    for (int64_t b = 0; b < result.batch_; ++b) {
      const int64_t length =
          mask.dims == 1 ? bounded(integer(mask, b), 0, positions) : first_ones(mask, b);
      if (length < 0) return {};
      result.set(b, b * positions, length);
      all = all && length == positions;
    }
    if (all) {
      mask = View{};
      return {};
    }
    result.sort(lanes);
    return result;
  }

  explicit operator bool() const { return known_; }
  int64_t batch() const { return batch_; }
  const int64_t* order() const { return order_.get(); }
  int64_t first(int64_t user) const { return starts_.get()[user]; }
  int64_t length(int64_t user) const { return lengths_.get()[user]; }

  // Positions to give to a group, or to any: an empty history has one that is not real.
  int64_t positions(Group group) const { return at_least_one(length(group.user(0))); }
  int64_t positions() const { return at_least_one(longest_); }

  // body(l, count, users): the first `users` of the group have positions [l, l + count).
  template <class F>
  MIMNET_FAST_INLINE void runs(Group group, F&& body) const {
    int64_t l = 0;
    for (int users = group.users; users > 0; --users) {
      const int64_t end = length(group.user(users - 1));
      if (end > l) body(l, end - l, users);
      l = end;
    }
  }

  // The users of a group that have a position, as a group of its rows, which are listed in `rows`.
  Group rows_at(Group group, int64_t l, int64_t* rows) const {
    int users = 0;
    while (users < group.users && length(group.user(users)) > l) {
      rows[users] = first(group.user(users)) + l;
      ++users;
    }
    return {0, users, rows};
  }

 private:
  explicit Histories(int64_t batch)
      : known_(true), batch_(batch), starts_(batch), lengths_(batch), order_(batch) {}

  // How many flags of row b are set before the first that is not; -1 where later ones are.
  static int64_t first_ones(const View& mask, int64_t b) {
    const int64_t count = mask.size[1], stride = mask.stride[1];
    const char* const flags = at(mask, b, 0);
    int64_t length = 0;
    if (stride == 1) {
      const void* const unset = std::memchr(flags, 0, size_t(count));
      length = unset != nullptr ? static_cast<const char*>(unset) - flags : count;
    } else {
      while (length < count && flags[length * stride] != 0) ++length;
    }
    char later = 0;
    for (int64_t l = length; l < count; ++l) later |= flags[l * stride];
    return later != 0 ? -1 : length;
  }

  static int64_t integer(const View& view, int64_t i) {
    const char* const from = at(view, i);
    return view.dtype == DType::int64 ? *reinterpret_cast<const int64_t*>(from)
                                      : *reinterpret_cast<const int32_t*>(from);
  }
  static int64_t bounded(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : (value > high ? high : value);
  }
  void set(int64_t user, int64_t start, int64_t length) {
    starts_.get()[user] = start;
    lengths_.get()[user] = length;
    longest_ = length > longest_ ? length : longest_;
  }

  static int64_t at_least_one(int64_t length) { return length > 0 ? length : 1; }

  // From long to short inside a group. Full groups are dealt so that any run of them has all
  // lengths, because a run is what a thread gets.
  void sort(int64_t lanes) {
    const Buffer<int64_t> places(longest_ + 1), sorted(batch_);
    int64_t* const place = places.get();
    for (int64_t l = 0; l <= longest_; ++l) place[l] = 0;
    for (int64_t b = 0; b < batch_; ++b) ++place[length(b)];
    for (int64_t l = longest_, next = 0; l >= 0; --l) {
      const int64_t count = place[l];
      place[l] = next;
      next += count;
    }
    for (int64_t b = 0; b < batch_; ++b) sorted.get()[place[length(b)]++] = b;
    const int64_t groups = batch_ / lanes;
    int64_t step = groups * 5 / 8 + 1;  // multiples of the golden section spread most evenly
    while (!coprime(step, groups)) ++step;
    for (int64_t i = 0; i < batch_; ++i) {
      const int64_t g = i / lanes;
      order_.get()[i] = sorted.get()[(g < groups ? g * step % groups : g) * lanes + i % lanes];
    }
  }

  static bool coprime(int64_t a, int64_t b) {
    while (b > 0) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    return a == 1;
  }

  bool known_ = false;
  int64_t batch_ = 0, longest_ = 0;
  Buffer<int64_t> starts_, lengths_, order_;
};

// Histories whose padding costs nothing: values [B, L, ..] become their rows [B*L, ..] where a mask
// or lengths tell where each history ends, and the rows stand one after another in memory.
inline Histories without_padding(View& values, View& mask, int64_t lanes) {
  if (!mask || values.stride[0] != values.size[1] * values.stride[1]) return {};
  Histories found = Histories::of_mask(mask, values.size[1], lanes);
  if (!found) return found;
  values.size[1] *= values.size[0];
  --values.dims;
  for (int d = 0; d < values.dims; ++d) {
    values.size[d] = values.size[d + 1];
    values.stride[d] = values.stride[d + 1];
  }
  return found;
}

// Row i of a matrix as values of one number each.
MIMNET_FAST_INLINE View values_of_row(const View& matrix, int64_t i) {
  View values = matrix;
  values.data = at(matrix, i);
  values.size[0] = matrix.size[1];
  values.stride[0] = matrix.stride[1];
  values.size[1] = values.stride[1] = 1;
  return values;
}

// body(l, rows) for every position of a group, with the rows of the users that have it as a group.
template <class T, class F>
MIMNET_FAST_INLINE void each_position(const Histories& h, Group group, F&& body) {
  h.runs(group, [&](int64_t first, int64_t count, int) {
    for (int64_t l = first; l < first + count; ++l) {
      int64_t rows[kLanes<T>];
      body(l, h.rows_at(group, l, rows));
    }
  });
}

namespace histories {

// body(rows, l, users, count): `count` numbers in the memory of `users` users, from position l on.
template <class T, class F>
MIMNET_FAST_INLINE void each_row(const View& values, const Histories& h, Group group, F&& body) {
  const int64_t width = values.size[1];
  const bool adjacent = values.stride[1] == 1 && values.stride[0] == width;
  with_storage(values.dtype, [&](auto storage) {
    using S = decltype(storage);
    h.runs(group, [&](int64_t l, int64_t count, int users) {
      const int64_t end = l + count, step = adjacent ? count : 1;
      for (; l < end; l += step) {
        S* rows[kLanes<T>];
        for (int w = 0; w < users; ++w) {
          rows[w] = reinterpret_cast<S*>(at(values, h.first(group.user(w)) + l));
        }
        body(rows, l, users, step * width);
      }
    });
  });
}

}  // namespace histories

// lanes[l * width + e] = values[first + l, e] of every user, 0 behind the end of a history.
template <class T>
void load_histories(Vec<T>* lanes, const View& values, const Histories& h, Group group) {
  const int64_t width = values.size[1];
  for (int64_t e = 0; e < width; ++e) lanes[e] = Vec<T>{};
  histories::each_row<T>(values, h, group, [&](auto rows, int64_t l, int users, int64_t count) {
    load_lanes_from<T>(lanes + l * width, rows, users, count, values.stride[1]);
  });
}

template <class T>
void store_histories(const Vec<T>* lanes, const View& values, const Histories& h, Group group) {
  const int64_t width = values.size[1];
  histories::each_row<T>(values, h, group, [&](auto rows, int64_t l, int users, int64_t count) {
    store_lanes_to<T>(lanes + l * width, rows, users, count, values.stride[1]);
  });
}

// The same for a matrix [K, T] and K rows of lanes.
template <class T>
void load_history_rows(Vec<T>* lanes, const View& matrix, const Histories& h, Group group) {
  const int64_t length = h.positions(group);
  for (int64_t i = 0; i < matrix.size[0]; ++i) {
    load_histories<T>(lanes + i * length, values_of_row(matrix, i), h, group);
  }
}

template <class T>
void store_history_rows(const Vec<T>* lanes, const View& matrix, const Histories& h, Group group) {
  const int64_t length = h.positions(group);
  for (int64_t i = 0; i < matrix.size[0]; ++i) {
    store_histories<T>(lanes + i * length, values_of_row(matrix, i), h, group);
  }
}

// K rows of lanes for a batch [B, K, L], which gets 0 behind the positions of the group.
template <class T>
void store_history_matrix(const Vec<T>* lanes, const View& batch, const Histories& h, Group group) {
  const int64_t length = h.positions(group);
  View real = batch;
  real.size[2] = length;
  for (int64_t i = 0; i < batch.size[1]; ++i) {
    store_rows<T>(lanes + i * length, real, group, i);
    with_storage(batch.dtype, [&](auto storage) {
      using S = decltype(storage);
      for (int w = 0; w < group.users; ++w) {
        S* row = reinterpret_cast<S*>(at(batch, group.user(w), i));
        for (int64_t l = length; l < batch.size[2]; ++l) row[l * batch.stride[2]] = narrow<S>(T(0));
      }
    });
  }
}

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
