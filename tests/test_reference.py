"""The references against literal loops, and reassociated forms against textbook forms."""

import itertools
import math
from functools import partial

import loops
import pytest
import torch
from cases import (
    attention_call,
    bridge_call,
    directions_of,
    fusion_call,
    mimnet_call,
    randn,
    routing_call,
)

from mimnet_fast import reference
from mimnet_fast._options import GRADIENTS, PADDINGS, SOFTMAX_AXES, SQUASH_FORMS, UPDATES
from mimnet_fast.ops._checks import lengths_to_mask

DOUBLE = torch.float64
WEIGHTS = ("shared_votes", "votes", "shared", "per_capsule", "per_position")


def close(found, expected):
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=DOUBLE).reshape(found.shape), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("form", SQUASH_FORMS)
def test_squash(form):
    x = randn(4, 5, dtype=DOUBLE)
    x[0] = 0
    for eps, power in ((1e-8, 1.0), (0.3, 0.4)):
        options = {"form": form, "eps": eps, "power": power}
        close(reference.squash(x, **options), [loops.squash(v, **options) for v in x.tolist()])
        across = reference.squash(x, 0, **options)
        close(across.T, [loops.squash(v, **options) for v in x.T.tolist()])


def routing_by_loops(call):
    """Capsules and couplings of every user, from votes written out."""
    inputs, weight, logits = call.args
    options = {"iterations": 3, "softmax_over": "capsules", "padding": "zero_after", **call.options}
    capsule_mask = options.pop("capsule_mask", None)
    mask = options.pop("mask", None)
    form = {key: options.pop(key) for key in ("eps", "power") if key in options}
    form["form"] = options.pop("squash", "sqrt_eps")
    k, length = logits.shape[1:]
    capsules, couplings = [], []
    for b in range(inputs.shape[0]):
        x = inputs[b].tolist()
        votes = [[None] * length for _ in range(k)]
        for i, j in itertools.product(range(k), range(length)):
            if weight is None:
                votes[i][j] = x[i][j] if inputs.dim() == 4 else x[j]
            else:
                at = {2: (), 3: (i,), 4: (j, i)}[weight.dim()]
                votes[i][j] = loops.row_times_matrix(x[j], weight[at].tolist())
        found, coupling = loops.dynamic_routing(
            votes,
            logits[b if logits.shape[0] > 1 else 0].tolist(),
            [True] * length if mask is None else mask[b].tolist(),
            [True] * k if capsule_mask is None else capsule_mask[b].tolist(),
            squash_options=form,
            **options,
        )
        capsules.append(found)
        couplings.append(coupling)
    return capsules, couplings


def check_routing(call):
    found = reference.dynamic_routing(*call.args, **call.options)
    for mine, expected in zip(found, routing_by_loops(call), strict=True):
        close(mine, expected)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("softmax_over", SOFTMAX_AXES)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("absent", [False, True], ids=["present", "absent_capsules"])
def test_routing(weight, softmax_over, padding, absent):
    call = routing_call(
        weight=weight,
        softmax_over=softmax_over,
        padding=padding,
        history="mask",
        absent_capsules=absent,
        dtype=DOUBLE,
    )
    check_routing(call)


@pytest.mark.parametrize(
    "options",
    [
        *({"iterations": n} for n in (1, 2, 5)),
        *({"update": update} for update in UPDATES),
        *({"squash": form} for form in SQUASH_FORMS),
        {"squash": "pow_clamp", "power": 0.3, "eps": 0.5},
        {"inner_squash": False},
        {"final_squash": False},
        {"temperature": 2.5},
        {"normalize_agreement": True},
        {"logits": "one"},
    ],
    ids=str,
)
def test_routing_options(options):
    call = routing_call(weight="per_capsule", history="mask", dtype=DOUBLE, **options)
    check_routing(call)


@pytest.mark.parametrize("per_interest", [False, True], ids=["per_user", "per_interest"])
def test_bridge(per_interest):
    call = bridge_call(per_interest=per_interest, dtype=DOUBLE)
    interests, source, *weights = call.args
    sources = source if per_interest else source[:, None].expand(-1, 3, -1)
    expected = [
        loops.interest_bridge(u, s, *(w.tolist() for w in weights))
        for u, s in zip(interests.tolist(), sources.tolist(), strict=True)
    ]
    close(reference.interest_bridge(*call.args), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"project": "none"},
        {"project": "key"},
        {"project": "value"},
        {"scale": 0.4},
        {"hard": True},
        {"power": 2.0},
        {"power": 3.0, "scale": 2.0},
        {"absent_capsules": True},
        {"absent_capsules": True, "hard": True},
    ],
    ids=str,
)
def test_attention(options):
    call = attention_call(c=3, dtype=DOUBLE, **options)
    query, interests, *weights = call.args
    plain = dict(call.options)
    mask = plain.pop("capsule_mask", torch.ones(5, 4, dtype=torch.bool))
    key = [w.tolist() for w in weights[:2] if w is not None]
    value = [w.tolist() for w in weights[2:] if w is not None]
    expected = [
        loops.target_attention(q, u, key, value, present=present, **plain)
        for rows, u, present in zip(query.tolist(), interests.tolist(), mask.tolist(), strict=True)
        for q in rows
    ]
    out, shares = reference.target_attention(*call.args, **call.options)
    close(out, [o for o, _ in expected])
    close(shares, [w for _, w in expected])
    # one candidate without its dimension
    one, _ = reference.target_attention(query[:, 1], *call.args[1:], **call.options)
    torch.testing.assert_close(one, out[:, 1], rtol=1e-12, atol=1e-12)


def fusion_by_loops(item, prototype, interests, fine, coarse, weight, bias):
    fine, coarse = ([t.tolist() for t in part] for part in (fine, coarse))
    return [
        loops.multi_granularity_attention(i, p, u, fine, coarse, weight.tolist(), bias.item())
        for i, p, u in zip(item.tolist(), prototype.tolist(), interests.tolist(), strict=True)
    ]


def test_fusion():
    call = fusion_call(dtype=DOUBLE)
    expected = fusion_by_loops(*call.args)
    out, gate = reference.multi_granularity_attention(*call.args)
    close(out, [o for o, _ in expected])
    close(gate, [g for _, g in expected])


@pytest.mark.parametrize("padding", PADDINGS)
def test_mimnet(padding):
    call = mimnet_call(ids=torch.int64, history="mask", padding=padding, dtype=DOUBLE)
    history, source, item, prototype, p, logits = call.args
    table, mask = call.options["table"], call.options["mask"]
    ratings = []
    for b in range(5):
        votes = [
            loops.row_times_matrix(table[i].tolist(), p.routing_weight.tolist())
            for i in history[b].tolist()
        ]
        interests, _ = loops.dynamic_routing(
            [votes] * 3,
            logits[b].tolist(),
            mask[b].tolist(),
            [True] * 3,
            iterations=3,
            softmax_over="capsules",
            padding=padding,
        )
        bridge = [t.tolist() for t in (p.w1, p.b1, p.w2, p.b2)]
        transferred = loops.interest_bridge(interests, [source[b].tolist()] * 3, *bridge)
        ((user, _),) = fusion_by_loops(
            item[b : b + 1], prototype[b : b + 1], torch.tensor([transferred], dtype=DOUBLE),
            p.fine, p.coarse, p.fusion_weight, p.fusion_bias,
        )  # fmt: skip
        ratings.append(loops.dot(user, item[b].tolist()))
    close(reference.mimnet_forward(*call.args, **call.options), ratings)


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", ["reference", "auto"])
def test_last_gradient_takes_couplings_for_constants(name, weight, iterations):
    """The gradient of squash(sum of coupled votes), couplings by loops."""
    call = routing_call(weight=weight, iterations=iterations, history="mask", dtype=DOUBLE)
    _, couplings = routing_by_loops(call)
    inputs, matrix, _ = call.args
    leaves = [t.clone().requires_grad_() for t in (inputs, matrix) if t is not None]
    votes = {
        "shared_votes": lambda x: x[:, None],
        "votes": lambda x: x,
        "shared": lambda x, w: (x @ w)[:, None],
        "per_capsule": lambda x, w: torch.einsum("bli,kid->bkld", x, w),
        "per_position": lambda x, w: torch.einsum("bli,lkid->bkld", x, w),
    }[weight](*leaves)
    capsules = reference.squash((torch.tensor(couplings, dtype=DOUBLE)[..., None] * votes).sum(2))
    expected = torch.autograd.grad(capsules, leaves, directions_of([capsules]))
    _, *found, logits = call.gradients(backend=name)
    assert not logits.any()
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_full_gradient_is_the_derivative_of_the_function(gradient):
    call = routing_call(
        b=2, length=3, k=2, d_in=3, d=2, history="mask", dtype=DOUBLE, gradient=gradient
    )
    call = call.map(lambda t: t if t.dtype is torch.bool else t / 10).trainable()

    def function(*tensors):
        return reference.dynamic_routing(*tensors, **call.options)[0]

    exact = torch.autograd.gradcheck(function, call.args, raise_exception=False)
    assert exact == (gradient == "full")


def runs(function, call):
    """Outputs and gradients of a reference function called as `call` says."""
    call = call.trainable()
    out = function(*call.args, **call.options)
    outputs = out if isinstance(out, tuple) else (out,)
    pairs = zip(outputs, directions_of(outputs), strict=True)
    used, directions = zip(*[pair for pair in pairs if pair[0].requires_grad], strict=True)
    grads = torch.autograd.grad(
        used, call.leaves(), directions, allow_unused=True, materialize_grads=True
    )
    return [*outputs, *grads]


REASSOCIATED = {
    **{
        f"dynamic_routing-{weight}-{axis}-{padding}": partial(
            routing_call,
            weight=weight,
            history="mask",
            softmax_over=axis,
            padding=padding,
            absent_capsules=absent,
            dtype=DOUBLE,
        )
        for weight, axis, padding, absent in itertools.product(
            WEIGHTS[:4], SOFTMAX_AXES, PADDINGS, (False, True)
        )
    },
    **{
        f"dynamic_routing-{name}": partial(
            routing_call, weight="per_capsule", dtype=DOUBLE, **options
        )
        for name, options in {
            "options": {
                "inner_squash": False,
                "final_squash": False,
                "temperature": 2.0,
                "iterations": 4,
            },
            "form": {"squash": "pow_clamp", "power": 0.5, "eps": 0.1, "logits": "one"},
        }.items()
    },
    "interest_bridge-per_user": partial(bridge_call, dtype=DOUBLE),
    "interest_bridge-per_interest": partial(bridge_call, per_interest=True, dtype=DOUBLE),
    **{
        f"target_attention-{name}": partial(attention_call, dtype=DOUBLE, **options)
        for name, options in {
            "plain": {},
            "candidates": {"c": 3, "scale": 0.4},
            "no_bias": {"project": "no_bias"},
            "key": {"project": "key"},
            "value": {"project": "value"},
            "none": {"project": "none"},
            "mask": {"absent_capsules": True},
        }.items()
    },
    "multi_granularity_attention": partial(fusion_call, dtype=DOUBLE),
    "multi_granularity_attention-candidates": partial(fusion_call, c=3, dtype=DOUBLE),
    "mimnet_forward": partial(mimnet_call, history="mask", dtype=DOUBLE),
    "mimnet_forward-ids": partial(
        mimnet_call, ids=torch.int64, history="mask", padding="fill_before", dtype=DOUBLE
    ),
}


@pytest.mark.parametrize("name", REASSOCIATED)
def test_reassociated_is_textbook(name):
    call = REASSOCIATED[name]()
    op = name.split("-")[0]
    textbook = runs(getattr(reference, op), call)
    reassociated = runs(getattr(reference, f"{op}_reassociated"), call)
    for mine, other in zip(reassociated, textbook, strict=True):
        scale = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12 * max(scale, 1.0))


def test_half_precision_is_computed_in_single():
    """1e-8 is 0 in float16, and a mean of 4096 ones in bfloat16 stalls at 256."""
    x = torch.zeros(1, 3, dtype=torch.float16, requires_grad=True)
    (grad,) = torch.autograd.grad(reference.squash(x).sum(), x)
    assert grad.isfinite().all()
    ones = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    logits = torch.zeros(1, 1, 4096, dtype=torch.bfloat16)
    total, _ = reference.dynamic_routing(ones, None, logits, iterations=1, final_squash=False)
    assert total.dtype is torch.bfloat16
    assert total.item() == 4096


def test_lengths_to_mask():
    mask = lengths_to_mask(torch.tensor([0, 2, 3, 9, -1]), 3)
    assert mask.sum(1).tolist() == [0, 2, 3, 3, 0]
    assert mask[1].tolist() == [True, True, False]


def test_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="squash form 'sine'"):
        reference.squash(torch.ones(2), form="sine")
    assert math.isclose(loops.squash([3.0, 4.0], eps=1e-12)[0], 3 / 5 * 25 / 26)
