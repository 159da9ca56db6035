"""The equations as loops over Python numbers: slow, literal, and sharing nothing with the package.

They check the references, which check the kernels.
"""

import math


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def row_times_matrix(row, matrix):
    return [dot(row, column) for column in zip(*matrix, strict=True)]


def linear(matrix, bias, vector):
    return [dot(row, vector) + shift for row, shift in zip(matrix, bias, strict=True)]


def softmax(values, taking_part=None):
    """Of those that take part; the others are 0."""
    taking_part = taking_part or [True] * len(values)
    top = max((v for v, t in zip(values, taking_part, strict=True) if t), default=0.0)
    weights = [math.exp(v - top) if t else 0.0 for v, t in zip(values, taking_part, strict=True)]
    total = sum(weights)
    return [w / total if total else 0.0 for w in weights]


def squash(vector, form="sqrt_eps", eps=1e-8, power=1.0):
    n2 = dot(vector, vector)
    n = math.sqrt(n2)
    factor = {
        "sqrt_eps": lambda: n2 / (1 + n2) / math.sqrt(n2 + eps),
        "norm_plus_eps": lambda: n2 / (1 + n2) / (n + eps),
        "pow_clamp": lambda: (n2 / (1 + n2)) ** power / max(n, eps),
        "no_div": lambda: n / (1 + n2),
        "none_eps": lambda: n2 / (1 + n2) / n if n else 0.0,
        "identity": lambda: 1.0,
    }[form]()
    return [factor * x for x in vector]


def dynamic_routing(
    votes,
    logits,
    real,
    present,
    *,
    iterations,
    softmax_over,
    padding,
    update="accumulate",
    normalize_agreement=False,
    inner_squash=True,
    final_squash=True,
    temperature=1.0,
    squash_options=None,
):
    """One user: votes[k][i], logits[k][i], real[i], present[k]; returns capsules and couplings."""
    squash_options = squash_options or {}
    capsules, length = range(len(votes)), range(len(real))
    b = [list(row) for row in logits]
    for step in range(iterations):
        scores = [[b[k][i] / temperature for i in length] for k in capsules]
        taking_part = [[present[k] for _ in length] for k in capsules]
        for k in capsules:
            for i in length:
                if not real[i] and padding == "fill_before":
                    scores[k][i] = -1e9
                if not real[i] and padding == "ignore":
                    taking_part[k][i] = False
        c = [[0.0] * len(real) for _ in capsules]
        if softmax_over == "capsules":
            for i in length:
                shares = softmax(
                    [scores[k][i] for k in capsules], [taking_part[k][i] for k in capsules]
                )
                for k in capsules:
                    c[k][i] = shares[k]
        else:
            c = [softmax(scores[k], taking_part[k]) for k in capsules]
        if padding == "zero_after":
            c = [[c[k][i] if real[i] else 0.0 for i in length] for k in capsules]
        z = [
            [sum(c[k][i] * votes[k][i][j] for i in length) for j in range(len(votes[k][0]))]
            for k in capsules
        ]
        if step == iterations - 1:
            break
        v = [squash(row, **squash_options) if inner_squash else row for row in z]
        for k in capsules:
            for i in length:
                vote = votes[k][i]
                if normalize_agreement:
                    size = max(math.sqrt(dot(vote, vote)), 1e-12)
                    vote = [x / size for x in vote]
                agreement = dot(v[k], vote)
                before = {"accumulate": b[k][i], "replace": 0.0, "coupling": c[k][i]}[update]
                b[k][i] = before + agreement
    return [squash(row, **squash_options) if final_squash else row for row in z], c


def interest_bridge(interests, sources, w1, b1, w2, b2):
    """One user: interests[k] and sources[k]."""
    out = []
    for interest, source in zip(interests, sources, strict=True):
        hidden = [max(x, 0.0) for x in linear(w1, b1, interest)]
        flat = linear(w2, b2, hidden)
        columns = len(flat) // len(source)
        matrix = [flat[i * columns : (i + 1) * columns] for i in range(len(source))]
        out.append(row_times_matrix(source, matrix))
    return out


def target_attention(
    query, interests, key=None, value=None, *, present=None, scale=1.0, power=1.0, hard=False
):
    """One candidate of one user; key and value are (weight, bias) or None."""
    keys = [linear(*key, u) if key else u for u in interests]
    values = [linear(*value, u) if value else u for u in interests]
    present = present or [True] * len(interests)
    scores = [scale * dot(query, k) ** power for k in keys]
    if hard:
        best = max((k for k in range(len(keys)) if present[k]), key=lambda k: scores[k], default=-1)
        weights = [float(k == best) for k in range(len(keys))]
    else:
        weights = softmax(scores, present)
    return row_times_matrix(weights, values), weights


def multi_granularity_attention(item, prototype, interests, fine, coarse, weight, bias):
    """One candidate of one user; fine and coarse are (key_weight, key_bias, value_weight, ...)."""
    by_item, _ = target_attention(item, interests, fine[:2], fine[2:])
    by_prototype, _ = target_attention(prototype, interests, coarse[:2], coarse[2:])
    gate = 1 / (1 + math.exp(-(dot(weight, [*item, *prototype]) + bias)))
    return [(1 - gate) * f + gate * c for f, c in zip(by_item, by_prototype, strict=True)], gate
