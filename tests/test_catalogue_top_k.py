"""The top of a whole catalogue."""

import sys

import pytest
import torch
from cases import DTYPES, Call, catalogue_call, dtype_id, interpreted, shape_id

from mimnet_fast import backends, nn, ops, reference
from mimnet_fast.ops._autograd import SUFFIX

DOUBLE = torch.float64


def tiny(backend: str, shape: dict) -> dict:
    """The shape, or what of it Triton's interpreter does in a second."""
    if not interpreted(backend):
        return shape
    most = {"b": 2, "n": 70}
    return {**shape, **{name: min(size, shape.get(name, size)) for name, size in most.items()}}


def skip_if_interpreted(backend):
    if interpreted(backend):
        pytest.skip("seconds a user in Triton's interpreter, which other tests here run")
    return backend


@pytest.fixture
def fast_backend(any_backend):
    """Each backend that has time for more than the smallest inputs."""
    return skip_if_interpreted(any_backend)


@pytest.fixture
def fast_kernels(backend):
    """The same without the reference."""
    return skip_if_interpreted(backend)


def every_score(call: Call) -> torch.Tensor:
    """All scores [B, N] in float64, excluded items -inf: no chunks, no selection."""
    interests, items, prototypes, fine, coarse, *fusion = call.map(
        lambda t: t.double() if t.is_floating_point() else t
    ).args
    ids = call.options.get("prototype_ids", torch.arange(len(items)))
    users = len(interests)
    scores = torch.full((users, len(items)), -torch.inf, dtype=DOUBLE)
    seen = [set() for _ in range(users)]
    if "exclude" in call.options:
        indices, offsets = (t.tolist() for t in call.options["exclude"])
        seen = [set(indices[offsets[i] : offsets[i + 1]]) for i in range(users)]
    for i in range(users):
        user, _ = reference.multi_granularity_attention(
            items, prototypes[ids], interests[i].expand(len(items), -1, -1), fine, coarse, *fusion
        )
        scores[i] = (user * items).sum(-1)
        scores[i, sorted(seen[i])] = -torch.inf
    return scores


def brute_force(scores: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By sorting everything: best first, of equals the lower index; -inf and -1 at the end."""
    rows = []
    for row in scores.tolist():
        order = sorted(range(len(row)), key=lambda n: (-row[n], n))[:top]
        best = [(row[n], n) for n in order if row[n] > -torch.inf]
        rows.append(best + [(-torch.inf, -1)] * (top - len(best)))
    found = torch.tensor(rows, dtype=DOUBLE).reshape(len(rows), top, 2)
    return found[..., 0], found[..., 1].long()


SHAPES = [
    {},
    {"b": 1, "n": 1, "k": 1, "d": 1, "top": 1},
    {"b": 0, "top": 3},
    {"b": 33, "n": 129, "k": 7, "d": 10, "seen": 20, "top": 20},
    {"b": 3, "n": 50, "k": 1, "d": 5, "prototypes": None},
    {"b": 17, "n": 95, "k": 3, "d": 31, "prototypes": None, "seen": 4, "bias_dims": 1},
    {"b": 2, "n": 9, "seen": 30, "top": 12},
    {"b": 70, "n": 300, "k": 2, "d": 4, "prototypes": 40, "top": 3},
    {"b": 2, "n": 2500, "k": 5, "seen": 40, "top": 30},  # in several parts
]


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_exact_in_float64(fast_backend, shape):
    """The same items in the same order as from all scores sorted."""
    call = catalogue_call(dtype=DOUBLE, **shape)
    scores, indices = call(backend=fast_backend)
    best, order = brute_force(every_score(call), call.options["k"])
    assert torch.equal(indices, order)
    torch.testing.assert_close(scores, best, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", [t for t in DTYPES if t is not DOUBLE], ids=dtype_id)
def test_exact_up_to_rounding(any_backend, dtype, shape):
    """Every chosen item has its own score; none that was left out is clearly better."""
    if interpreted(any_backend) and dtype is not torch.float32:
        pytest.skip("Triton's interpreter is slow and has another test of half precision")
    call = catalogue_call(dtype=dtype, **tiny(any_backend, shape))
    scores, indices = call(backend=any_backend)
    assert scores.dtype is dtype
    exact = every_score(call)
    best, order = brute_force(exact, call.options["k"])
    chosen = exact.gather(1, indices.clamp(min=0)).masked_fill(indices < 0, -torch.inf)
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(scores.double(), chosen, rtol=rounding, atol=1e-5)
    torch.testing.assert_close(chosen, best, rtol=1e-5, atol=1e-5)
    assert torch.equal(indices < 0, order < 0)
    for row in indices.tolist():
        real = [n for n in row if n >= 0]
        assert len(set(real)) == len(real)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("top", [1, 20, 300])
def test_lower_index_wins_a_tie(any_backend, top, dtype):
    """Small whole numbers and one interest, so that every score is exact and most are tied."""
    if interpreted(any_backend) and dtype is torch.float16:
        pytest.skip("Triton's interpreter computes float16 as it does bfloat16")
    shape = tiny(any_backend, {"b": 21, "n": 250})
    call = catalogue_call(**shape, k=1, d=3, seen=9, dtype=DOUBLE)
    call = call.map(lambda t: t.round().clamp(-1, 2) if t.is_floating_point() else t)
    interests, items, prototypes, fine, coarse, weight, bias = call.args
    args = interests, items, prototypes, fine, coarse, 0 * weight, 0 * bias
    call = Call(call.op, args, call.options)
    best, order = brute_force(every_score(call), top)
    call = call.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
    scores, indices = call(k=top, backend=any_backend)
    assert torch.equal(indices, order)
    assert torch.equal(scores, best.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("prototypes", [2, None])
def test_a_score_does_not_depend_on_the_place(fast_kernels, prototypes, dtype):
    """The catalogue ten times over: all copies of the best item, in order, then the next."""
    call = catalogue_call(b=19, n=9, k=3, prototypes=prototypes, top=9, dtype=dtype)
    _, once = call(backend=fast_kernels)
    interests, items, guides, *others = call.args
    options = {}
    if prototypes is None:
        guides = guides.repeat(10, 1)
    else:
        options["prototype_ids"] = call.options["prototype_ids"].repeat(10)
    _, indices = ops.catalogue_top_k(
        interests, items.repeat(10, 1), guides, *others, 45, backend=fast_kernels, **options
    )
    copies = once[:, :, None] + 9 * torch.arange(10)
    assert torch.equal(indices, copies.flatten(1)[:, :45])


def test_prototypes_by_id_and_by_row_agree(fast_backend):
    call = catalogue_call(b=20, n=130, dtype=DOUBLE)
    interests, items, prototypes, *others = call.args
    ids = call.options["prototype_ids"]
    found = ops.catalogue_top_k(interests, items, prototypes[ids], *others, 7, backend=fast_backend)
    for mine, other in zip(found, call(backend=fast_backend), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_every_argument_counts(fast_backend):
    call = catalogue_call(b=20, n=130, top=130, dtype=DOUBLE)
    scores, _ = call(backend=fast_backend)
    key_biases = (4, 8)
    for i, tensor in enumerate(call.tensors()[:13]):
        tensors = call.tensors()
        tensors[i] = tensor + torch.randn_like(tensor)
        found, _ = call.with_tensors(tensors)(backend=fast_backend)
        distance = (found - scores).abs().max()
        assert distance < 1e-12 if i in key_biases else distance > 1e-3, i


def test_scores_are_the_ratings_of_the_model(fast_backend):
    """What the attention over the whole catalogue as candidates gives, item by item."""
    call = catalogue_call(b=4, n=12, top=12, dtype=DOUBLE)
    interests, items, prototypes, *attention = call.args
    candidates = items.expand(4, -1, -1)
    guides = prototypes[call.options["prototype_ids"]].expand(4, -1, -1)
    user = ops.multi_granularity_attention(
        candidates, guides, interests, *attention, backend="reference"
    )
    scores, indices = call(backend=fast_backend)
    torch.testing.assert_close(scores, (user * candidates).sum(-1).gather(1, indices))


def test_strides(fast_backend):
    call = catalogue_call(b=18, n=70, seen=5, dtype=DOUBLE)
    strided = call.map(lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t)
    transposed = call.map(lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1) if t.dim() else t)
    for other in (strided, transposed):
        for mine, found in zip(
            call(backend=fast_backend), other(backend=fast_backend), strict=True
        ):
            torch.testing.assert_close(found, mine, rtol=1e-13, atol=1e-13)


def test_ids_of_32_bits(fast_backend):
    call = catalogue_call(seen=5)
    narrow = call.map(lambda t: t if t.is_floating_point() else t.int())
    for mine, found in zip(call(backend=fast_backend), narrow(backend=fast_backend), strict=True):
        assert torch.equal(mine, found)


def test_few_users_on_several_threads(fast_backend):
    call = catalogue_call(b=2, n=1500, seen=40, top=30, dtype=DOUBLE)
    alone = call(backend=fast_backend)
    torch.set_num_threads(3)
    try:
        together = call(backend=fast_backend)
    finally:
        torch.set_num_threads(1)
    _, order = brute_force(every_score(call), 30)
    assert torch.equal(together[1], order)
    assert torch.equal(together[0], alone[0])


def test_items_that_are_not_finite_are_not_chosen(any_backend):
    call = catalogue_call(b=2, n=20, top=20)
    call.args[1][4] = torch.nan
    scores, indices = call(backend=any_backend)
    assert not (indices == 4).any()
    assert (indices[:, -1] == -1).all()
    assert (indices[:, :-1] >= 0).all()
    assert not scores.isnan().any()


def test_large_inputs_stay_finite(fast_backend):
    call = catalogue_call(b=17).map(lambda t: t * 1e4 if t.is_floating_point() else t)
    scores, _ = call(backend=fast_backend)
    assert scores.isfinite().all()


def test_inference_only(fast_backend):
    call = catalogue_call().trainable()
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        call(backend=fast_backend)
    with torch.no_grad():
        scores, _ = call(backend=fast_backend)
    assert not scores.requires_grad


def test_weights_of_a_module(fast_backend):
    attention = nn.MultiGranularityAttention(6)
    interests, items, prototypes = catalogue_call().args[:3]
    with torch.no_grad():
        _, indices = ops.catalogue_top_k(
            interests, items, prototypes, *attention.weights(), k=2,
            prototype_ids=torch.zeros(40, dtype=torch.int32), backend=fast_backend,
        )  # fmt: skip
    assert indices.shape == (5, 2)


def test_opcheck(backend):
    samples = [{"b": 0}, {"seen": 4, "dtype": torch.bfloat16}]
    if not interpreted(backend):
        samples.append({"prototypes": None})
    for options in samples:
        call = catalogue_call(**{"b": 1, "n": 20, "top": 3, **options})
        interests, items, prototypes, fine, coarse, *fusion = call.args
        seen = call.options.get("exclude", (None, None))
        ids = call.options.get("prototype_ids")
        op = getattr(torch.ops.mimnet_fast, f"catalogue_top_k{SUFFIX[backend]}").default
        torch.library.opcheck(
            op, (interests, items, prototypes, ids, *fine, *coarse, *fusion, *seen, 3)
        )


def test_compile_with_dynamic_shapes(fast_kernels):
    catalogue_call()(backend=fast_kernels)  # a backend without a kernel says so in its own words
    torch._dynamo.reset()
    compiled = torch.compile(ops.catalogue_top_k, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (b, n) in enumerate(((9, 40), (4, 23), (12, 31))):
        call = catalogue_call(b=b, n=n, seen=6)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            found = compiled(*call.args, **call.options, backend=fast_kernels)
        for mine, other in zip(found, call(backend=fast_kernels), strict=True):
            torch.testing.assert_close(mine, other)


def test_autocast(fast_kernels):
    call = catalogue_call()
    half = call.map(lambda t: t.bfloat16() if t.is_floating_point() else t)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(backend=fast_kernels)
    for mine, other in zip(found, half(backend=fast_kernels), strict=True):
        assert torch.equal(mine, other)
    assert found[0].dtype is torch.bfloat16


def test_an_unchecked_prototype_id_harms_its_item_only(backend):
    """A traced graph looks at no values."""
    call = catalogue_call(b=1, n=20, top=20)
    call(backend=backend)
    compiled = torch.compile(call.op, fullgraph=True, backend="aot_eager")
    call.options["prototype_ids"][3], call.options["prototype_ids"][11] = -2, 10**12
    _, indices = compiled(*call.args, **call.options, backend=backend)
    assert sorted(indices[0].tolist()) == [-1, -1, *(n for n in range(20) if n not in (3, 11))]


def test_what_triton_does_not_serve(device):
    if problem := backends.available(device)["triton"]:
        pytest.skip(problem)
    call = catalogue_call(top=65)
    reasons = backends.explain("catalogue_top_k", *call.args, **call.options)["triton"]
    assert reasons == [
        "no Triton kernel for catalogue_top_k with k = 65 in this version, at most 64 "
        "in torch.float32"
    ]


WRONG = {
    "no_items": (lambda a, o: (a[0], a[1][:0], *a[2:]), "items: got N = 0"),
    "width": (lambda a, o: (a[0], a[1][:, :5], *a[2:]), r"items: got shape \[40, 5\]"),
    "dtype": (lambda a, o: (a[0], a[1].double(), *a[2:]), "items: got dtype torch.float64"),
    "k": (lambda a, o: o.update(k=0), "k: got 0, need at least 1"),
    "k_type": (lambda a, o: o.update(k=1.5), "k: got float, need an integer"),
    "rows": (lambda a, o: o.pop("prototype_ids") * 0, "prototypes: got 3 rows for 40 items"),
    "ids": (lambda a, o: o["prototype_ids"].fill_(3), "prototype_ids: got 3, need 0 to 2"),
    "ids_type": (
        lambda a, o: o.update(prototype_ids=torch.zeros(40)),
        "prototype_ids: got dtype torch.float32",
    ),
    "ids_shape": (
        lambda a, o: o.update(prototype_ids=torch.zeros(39, dtype=torch.int64)),
        r"prototype_ids: got shape \[39\]",
    ),
    "seen": (lambda a, o: o["exclude"][0].fill_(40), r"exclude\[0\]: got 40, need 0 to 39"),
    "offsets": (lambda a, o: o["exclude"][1].add_(1), r"exclude\[1\]: start at 1"),
    "pair": (lambda a, o: o.update(exclude=o["exclude"][0]), "exclude: got Tensor"),
    "fine": (lambda a, o: (*a[:3], a[3][:3], *a[4:]), "fine: got 3 tensors"),
    "interests": (lambda a, o: (a[0][0], *a[1:]), "interests: got shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    change, message = WRONG[name]
    call = catalogue_call(seen=9)
    args, options = call.args, dict(call.options)
    changed = change(args, options)
    with pytest.raises((TypeError, ValueError), match=message):
        ops.catalogue_top_k(*(changed if isinstance(changed, tuple) else args), **options)


def test_the_reassociated_form_agrees():
    for prototypes in (3, None):
        call = catalogue_call(n=60, prototypes=prototypes, seen=9, dtype=DOUBLE)
        for mine, other in zip(
            reference.catalogue_top_k_reassociated(*call.args, **call.options),
            reference.catalogue_top_k(*call.args, **call.options),
            strict=True,
        ):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_the_reference_in_chunks(monkeypatch):
    call = catalogue_call(n=60, seen=20, dtype=DOUBLE)
    whole = call(backend="reference")
    monkeypatch.setattr(sys.modules[reference.catalogue_top_k.__module__], "_ELEMENTS", 7 * 5 * 6)
    scores, indices = call(backend="reference")
    assert torch.equal(indices, whole[1])
    torch.testing.assert_close(scores, whole[0])
