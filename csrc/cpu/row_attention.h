// Target-guided attention on rows: vectors lie along D, not over users.
//
// Interests that come from memory and go back there would have to be transposed to lanes and back,
// which takes longer than the attention. Only scores and coefficients, K of each user, are lanes.
#pragma once

#include "rows.h"
#include "target_attention.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

// n padded rows from elements [b, c, :] of a tensor, b from `first` on, and back.
template <class T>
void load_padded(GroupRows<T> to, const View& view, int64_t first, int64_t c, int64_t n) {
  const int last = view.dims - 1;
  const int64_t d = view.size[last], stride = view.stride[last];
  with_storage(view.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t i = 0; i < n; ++i) {
      const S* const from = reinterpret_cast<const S*>(at(view, first + i, c));
      if (stride == 1) {
        for (int64_t e = 0; e < d; e += kLanes<T>) {
          vector_at(to[i] + e) = load_vector_of<T>(from + e, d - e);
        }
        continue;
      }
      for (int64_t e = 0; e < padded<T>(d); ++e) {
        to[i][e] = e < d ? widen<T>(from[e * stride]) : T(0);
      }
    }
  });
}

template <class T>
void store_padded(GroupRows<T> from, const View& view, int64_t first, int64_t c, int64_t n) {
  const int last = view.dims - 1;
  const int64_t d = view.size[last], stride = view.stride[last];
  with_storage(view.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t i = 0; i < n; ++i) {
      S* const to = reinterpret_cast<S*>(at(view, first + i, c));
      if (stride == 1) {
        for (int64_t e = 0; e < d; e += kLanes<T>) {
          store_vector_of<T>(to + e, vector_at(from[i] + e), d - e);
        }
        continue;
      }
      for (int64_t e = 0; e < d; ++e) to[e * stride] = narrow<S>(from[i][e]);
    }
  });
}

// The interests of a group as rows of T: in place where they are that, else in a copy.
template <class T>
class InterestRows {
 public:
  InterestRows() = default;
  InterestRows(const View& view, Group group, Vec<T>* copy) : view_(view), group_(group) {
    if (in_place(view)) {
      first_ = reinterpret_cast<T*>(at(view, group.first));
      user_ = view.stride[0];
      interest_ = view.stride[1];
    } else {
      first_ = reinterpret_cast<T*>(copy);
      interest_ = padded<T>(view.size[2]);
      user_ = view.size[1] * interest_;
    }
  }

  // Vectors of a copy for a group.
  static int64_t vectors(const View& view) {
    return in_place(view) ? 0 : view.size[1] * padded<T>(view.size[2]);
  }

  // Row w is interest k of user w.
  GroupRows<T> operator[](int64_t k) const { return {first_ + k * interest_, user_}; }

  void clear() const {
    for (int64_t k = 0; k < view_.size[1]; ++k) {
      for (int w = 0; w < group_.users; ++w) {
        for (int64_t e = 0; e < view_.size[2]; ++e) (*this)[k][w][e] = T(0);
      }
    }
  }
  void load() const {
    for (int64_t k = 0; !in_place(view_) && k < view_.size[1]; ++k) {
      load_padded<T>((*this)[k], view_, group_.first, k, group_.users);
    }
  }
  void store() const {
    for (int64_t k = 0; !in_place(view_) && k < view_.size[1]; ++k) {
      store_padded<T>((*this)[k], view_, group_.first, k, group_.users);
    }
  }

 private:
  static bool in_place(const View& view) {
    return view.dtype == LaneTypes<T>::dtype && (view.stride[2] == 1 || view.size[2] == 1);
  }

  View view_;
  Group group_;
  T* first_ = nullptr;
  int64_t user_ = 0, interest_ = 0;
};

// out[w] = sum_k weights[k][w] interests[k][w], as padded rows.
template <class T>
void weighted_sum(GroupRows<T> out, const Vec<T>* weights, const InterestRows<T>& interests,
                  int64_t k, int users, int64_t d) {
  for_rows<T>(users, d, [&](int w, auto one) {
    for_vectors<T>(one, d, [&](int64_t e, auto count) {
      Vec<T> sum{};
      for (int64_t i = 0; i < k; ++i) sum += weights[i][w] * load<T>(interests[i][w] + e, count);
      vector_at(out[w] + e) = sum;
    });
  });
}

template <class T>
class RowAttention {
 public:
  RowAttention(const AttentionPlan<T>& plan, bool backward) : p_(plan) {
    pack(key_, p_.key_weight, false);
    if (backward) {
      pack(key_transposed_, p_.key_weight, true);
      pack(value_, p_.value_weight, false);
    } else {
      pack(value_transposed_, p_.value_weight, true);
      if (p_.value_weight != nullptr && p_.value_bias != nullptr) {
        bias_.allocate(1, p_.d);
        for (int64_t e = 0; e < bias_.width; ++e) {
          bias_.get()[e] = e < p_.d ? p_.value_bias[e] : T(0);
        }
      }
    }
  }

  // Of n users at once, or of one group's `users`.

  // folded = W_K^T query
  void fold(GroupRows<T> folded, GroupRows<T> query, int64_t n) const {
    product(folded, query, key_, n);
  }

  // Scores and coefficients, and the interests that they weight. `present` may be null.
  void attend(GroupRows<T> pooled, Vec<T>* coefficients, Vec<T>* scores, GroupRows<T> folded,
              const InterestRows<T>& interests, const Vec<T>* present, int users) const {
    for (int64_t k = 0; k < p_.interests; ++k) {
      scores[k] = dot_rows<T>(folded, interests[k], users, p_.d);
    }
    weigh<T>(p_, coefficients, scores, present);
    weighted_sum<T>(pooled, coefficients, interests, p_.interests, users, p_.d);
  }

  // out = W_V pooled + b_V sum_k a_k
  void values(GroupRows<T> out, GroupRows<T> pooled, const Vec<T>* coefficients, int64_t n) const {
    const bool bias = bias_.get() != nullptr;
    for (int64_t i = 0; bias && i < n; i += kLanes<T>, coefficients += p_.interests) {
      Vec<T> total{};
      for (int64_t k = 0; k < p_.interests; ++k) total += coefficients[k];
      for (int w = 0; w < kLanes<T> && i + w < n; ++w) {
        for (int64_t e = 0; e < p_.d; e += kLanes<T>) {
          vector_at(out[i + w] + e) = total[w] * vector_at(bias_.get() + e);
        }
      }
    }
    product(out, pooled, value_transposed_, n, bias);
  }

  // pooled_grad = W_V^T out_grad
  void values_backward(GroupRows<T> pooled_grad, GroupRows<T> out_grad, int64_t n) const {
    product(pooled_grad, out_grad, value_, n);
  }

  // After `attend`: sets folded_grad, and sets or adds to interests_grad where it is not null.
  // coefficients_grad may be null; score_grad is room for K lanes.
  void attend_backward(GroupRows<T> folded_grad, const InterestRows<T>* interests_grad,
                       bool accumulate, Vec<T>* score_grad, const Vec<T>* coefficients_grad,
                       const Vec<T>* coefficients, const Vec<T>* scores, GroupRows<T> folded,
                       GroupRows<T> pooled_grad, const InterestRows<T>& interests,
                       int users) const {
    for (int64_t k = 0; k < p_.interests; ++k) {
      score_grad[k] = dot_rows<T>(pooled_grad, interests[k], users, p_.d);
      if (coefficients_grad != nullptr) score_grad[k] += coefficients_grad[k];
    }
    weigh_backward<T>(p_, score_grad, coefficients, scores);
    weighted_sum<T>(folded_grad, score_grad, interests, p_.interests, users, p_.d);
    for (int64_t k = 0; interests_grad != nullptr && k < p_.interests; ++k) {
      const GroupRows<T> to = (*interests_grad)[k];
      for_rows<T>(users, p_.d, [&](int w, auto one) {
        const T a = coefficients[k][w], g = score_grad[k][w];
        for_vectors<T>(one, p_.d, [&](int64_t e, auto count) {
          const Vec<T> share =
              a * load<T>(pooled_grad[w] + e, count) + g * load<T>(folded[w] + e, count);
          store<T>(to[w] + e, accumulate ? load<T>(to[w] + e, count) + share : share, count);
        });
      });
    }
  }

  // query_grad = W_K folded_grad
  void query_backward(GroupRows<T> query_grad, GroupRows<T> folded_grad, int64_t n) const {
    product(query_grad, folded_grad, key_transposed_, n);
  }

 private:
  void pack(Rows<T>& to, const T* matrix, bool transposed) const {
    if (matrix == nullptr) return;
    const int64_t d = p_.d;
    to.allocate(d, d);
    for (int64_t i = 0; i < d; ++i) {
      T* row = to.get() + i * to.width;
      for (int64_t j = 0; j < d; ++j) row[j] = transposed ? matrix[j * d + i] : matrix[i * d + j];
      for (int64_t j = d; j < to.width; ++j) row[j] = T(0);
    }
  }

  // out[i] (+)= rows[i] matrix; a matrix that was not given is the identity.
  void product(GroupRows<T> out, GroupRows<T> rows, const Rows<T>& matrix, int64_t n,
               bool accumulate = false) const {
    const int64_t width = padded<T>(p_.d), vectors = width / kLanes<T>;
    if (matrix.get() != nullptr) {
      return multiply<T>({&vector_at(out.first), 1, out.step / kLanes<T>},
                         {&vector_at(matrix.get()), 1, vectors},
                         SharedMatrix<T>(rows.first, 1, rows.step), vectors, n, p_.d, accumulate);
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t e = 0; e < width; e += kLanes<T>) vector_at(out[i] + e) = vector_at(rows[i] + e);
    }
  }

  const AttentionPlan<T>& p_;
  Rows<T> key_, key_transposed_, value_, value_transposed_, bias_;
};

// Users of block i, and room for a padded row of each user of a block.
template <class T>
int64_t users_of(const Blocks<T>& blocks, int64_t i) {
  const int64_t most = blocks.per_block * kLanes<T>, left = blocks.batch - i * most;
  return left < most ? left : most;
}
template <class T>
GroupRows<T> take_rows(Scratch<T>& scratch, const Blocks<T>& blocks, int64_t d) {
  const int64_t width = padded<T>(d);
  return {reinterpret_cast<T*>(scratch.take(blocks.per_block * width)), width};
}

// The rows that gradients keep of a block's users and candidate c.
template <class T>
GroupRows<T> kept_rows(const Rows<T>& rows, const Blocks<T>& blocks, int64_t block,
                       int64_t candidates, int64_t c) {
  const int64_t first = block * blocks.per_block * kLanes<T>;
  return {rows.get() + (first * candidates + c) * rows.width, candidates * rows.width};
}

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
