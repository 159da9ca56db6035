"""Many steps of Adam on MIMNet in one call, against the loop over them."""

import re

import pytest
import torch
from cases import dtype_id, mimnet_call

from mimnet_fast import backends, ops
from mimnet_fast.ops import MIMNetParameters

NAMES = ("users", "items", "d", "k", "length", "h", "n", "batch")
SHAPES = {
    name: dict(zip(NAMES, sizes, strict=True))
    for name, sizes in {
        "small": (5, 4, 3, 2, 4, 6, 22, 5),
        "paper": (90, 70, 10, 7, 20, 50, 200, 64),
        "one_batch": (9, 9, 16, 1, 1, 1, 12, 99),
        "batches_of_one": (9, 9, 4, 3, 5, 7, 12, 1),
        "wide": (9, 9, 33, 3, 4, 9, 20, 11),  # more parameters than rows of a few users
    }.items()
}
PARAMETERS = [
    "routing_weight", "w1", "b1", "w2", "b2",
    *(f"{kind} {name}" for kind in ("fine", "coarse") for name in ("kw", "kb", "vw", "vb")),
    "fusion_weight", "fusion_bias",
]  # fmt: skip
OPTIONS = {
    "plain": {},
    "decay_and_average": {"weight_decay": 0.03, "averaging": 0.8, "average": True},
    "weighted": {"weights": True, "padding": "ignore", "iterations": 2},
    "later": {"first_step": 11, "betas": (0.7, 0.95), "eps": 1e-3},
}
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)


class Problem:
    """Arguments of the op, with state to copy."""

    def __init__(self, *, users, items, d, k, length, h, n, batch, dtype=torch.float32, **options):
        call = mimnet_call(b=1, length=length, k=k, d=d, h=h, dtype=dtype)
        self.parameters = call.args[4]
        flat = self.parameters.flat()
        self.moments = tuple(MIMNetParameters.of([torch.zeros_like(t) for t in flat]) for _ in "mv")
        tables = [torch.randn(rows, d).to(dtype) for rows in (30, users, items, items)]
        self.data = [
            torch.randint(users, (n,)),
            torch.randint(items, (n,)),
            torch.randint(1, 6, (n,)).to(dtype),
            torch.randint(30, (users, length)),
            torch.randint(length + 1, (users,)),
            *tables,
            torch.randn(n, k, length).to(dtype),
        ]
        self.options = {"batch_size": batch, "learning_rate": 0.01, **options}
        if self.options.get("weights"):
            self.options["weights"] = torch.rand(users).to(dtype)
        if self.options.get("average"):
            self.options["average"] = MIMNetParameters.of([t.clone() for t in flat])

    def copy(self, dtype=None):
        def convert(value):
            if isinstance(value, torch.Tensor):
                return value.to(dtype if value.is_floating_point() else None, copy=True)
            if isinstance(value, MIMNetParameters):
                return MIMNetParameters.of([convert(t) for t in value.flat()])
            return value

        copied = object.__new__(Problem)
        copied.parameters = convert(self.parameters)
        copied.moments = tuple(convert(each) for each in self.moments)
        copied.data = [convert(each) for each in self.data]
        copied.options = {name: convert(value) for name, value in self.options.items()}
        return copied

    def __call__(self, **options):
        return ops.mimnet_adam_(
            self.parameters, self.moments, *self.data, **{**self.options, **options}
        )

    def state(self):
        """All that is updated; the reference's gradients of key biases are rounding alone."""
        values = {"": self.parameters, " first": self.moments[0], " second": self.moments[1]}
        if "average" in self.options:
            values[" average"] = self.options["average"]
        return {
            name + kind: tensor
            for kind, value in values.items()
            for name, tensor in zip(PARAMETERS, value.flat(), strict=True)
            if not name.endswith("kb")
        }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_the_loop_over_batches(shape, options):
    found = Problem(**shape, **options, dtype=torch.float64)
    expected = found.copy()
    losses = found(backend="native")
    torch.testing.assert_close(losses, expected(backend="reference"))
    for name, value in expected.state().items():
        torch.testing.assert_close(found.state()[name], value, msg=name, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_single_precision(options):
    found = Problem(**SHAPES["paper"], **options)
    expected, rough = found.copy(torch.float64), found.copy()
    losses = found(backend="native")
    torch.testing.assert_close(losses.double(), expected(backend="reference"), rtol=1e-4, atol=1e-4)
    rough(backend="reference")
    for name, exact in expected.state().items():
        error = (found.state()[name] - exact).norm()
        budget = 3 * (rough.state()[name] - exact).norm() + 1e-5 * exact.norm()
        assert error <= budget, name


def test_is_what_the_optimizer_of_torch_does():
    found = Problem(**SHAPES["small"], dtype=torch.float64, weight_decay=0.02)
    leaves = [t.clone().requires_grad_() for t in found.parameters.flat()]
    optimizer = torch.optim.Adam(leaves, lr=0.01, weight_decay=0.02)
    users, items, ratings, histories, lengths, history, source, item, prototype, logits = found.data
    losses = []
    for rows in torch.arange(len(ratings)).split(SHAPES["small"]["batch"]):
        optimizer.zero_grad()
        user, chosen = users[rows], items[rows]
        rated = ops.mimnet_forward(
            histories[user], source[user], item[chosen], prototype[chosen],
            MIMNetParameters.of(leaves), logits[rows], lengths=lengths[user], table=history,
        )  # fmt: skip
        loss = torch.nn.functional.mse_loss(rated, ratings[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(found(), torch.stack(losses))
    for name, tensor, leaf in zip(PARAMETERS, found.parameters.flat(), leaves, strict=True):
        torch.testing.assert_close(tensor, leaf.detach(), msg=name)


def test_calls_go_on_where_the_last_one_ended():
    whole = Problem(**SHAPES["small"], averaging=0.8, average=True)
    parts = whole.copy()
    losses = whole()
    batch, data = SHAPES["small"]["batch"], parts.data
    found, per_rating = [], (0, 1, 2, 9)
    for cut in (slice(0, batch), slice(batch, None)):
        parts.data = [each[cut] if n in per_rating else each for n, each in enumerate(data)]
        found.append(parts(first_step=len(found)))
    assert torch.equal(torch.cat(found), losses)
    for name, value in whole.state().items():
        assert torch.equal(parts.state()[name], value), name


def test_runs_the_same_every_time():
    first = Problem(**SHAPES["paper"])
    second = first.copy()
    assert torch.equal(first(), second())
    for name, value in first.state().items():
        assert torch.equal(second.state()[name], value), name


def test_key_biases_stay():
    problem = Problem(**SHAPES["small"])
    before = problem.copy().parameters.flat()
    problem()
    for name, old, new in zip(PARAMETERS, before, problem.parameters.flat(), strict=True):
        assert torch.equal(old, new) == name.endswith("kb"), name


def test_takes_int32_strides_and_autograd_parameters():
    problem = Problem(**SHAPES["small"], weights=True)
    expected = problem.copy()
    losses = expected()
    twice = [torch.stack([each, each], dim=-1)[..., 0] for each in problem.data]
    problem.data = [each.int() if not each.is_floating_point() else each for each in twice]
    problem.options["weights"] = torch.stack([problem.options["weights"]] * 2, 1)[:, 0]
    leaves = [t.clone().requires_grad_() for t in problem.parameters.flat()]
    problem.parameters = MIMNetParameters.of(leaves)
    version = leaves[0]._version
    found = problem()
    assert torch.equal(found, losses)
    assert not found.requires_grad
    assert leaves[0]._version > version, "autograd does not see the change"
    for name, value in expected.state().items():
        assert torch.equal(problem.state()[name], value), name


def test_tracing_knows_the_shape():
    problem = Problem(**SHAPES["small"])
    users, items, ratings, histories, lengths, *tables, logits = problem.data
    vector = torch.cat([t.reshape(-1) for t in problem.parameters.flat()])
    torch.library.opcheck(
        torch.ops.mimnet_fast.mimnet_adam_.default,
        (vector, torch.zeros_like(vector), torch.zeros_like(vector), None, users, items, ratings,
         None, histories, lengths, *tables, logits, 6, 5, 3, 0, 0, 0.1, 0.9, 0.999, 1e-8, 0.0, 0.0),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


ONES = torch.ones
WRONG = {
    "no tensor": (6, None, TypeError, "source_table: got NoneType"),
    "half": (6, ONES(5, 3).half(), TypeError, "source_table: got dtype torch.float16"),
    "users": (0, torch.full((22,), 5), ValueError, "users: got 5, need 0 to 4"),
    "items": (1, torch.full((22,), -1), ValueError, "items: got -1, need 0 to 3"),
    "ratings": (2, ONES(22, 1), ValueError, "ratings: got shape [22, 1]"),
    "no ratings": (2, ONES(0), ValueError, "ratings: got N = 0"),
    "history ids": (3, torch.full((5, 4), 30), ValueError, "histories: got 30, need 0 to 29"),
    "history width": (3, torch.zeros(5, 3).long(), ValueError, "logits: got shape [22, 2, 4]"),
    "lengths": (4, torch.full((5,), 5), ValueError, "lengths: got 5, need 0 to 4"),
    "history table": (5, ONES(30, 4), ValueError, "history_table: got shape [30, 4]"),
    "source table": (6, ONES(4, 3), ValueError, "source_table: got 4 rows, need U = 5 or more"),
    "item table": (7, ONES(4, 2), ValueError, "item_table: got shape [4, 2]"),
    "prototypes": (8, ONES(3, 3), ValueError, "prototype_table: got shape [3, 3]"),
    "logits": (9, ONES(21, 2, 4), ValueError, "logits: got shape [21, 2, 4]"),
    "weights": ("weights", ONES(4), ValueError, "weights: got shape [4]"),
    "average": ("average", ONES(4), TypeError, "average: got Tensor"),
    "averaging": ("averaging", 1.5, ValueError, "averaging: got 1.5"),
    "decay": ("weight_decay", -1.0, ValueError, "weight_decay: got -1.0"),
    "batch": ("batch_size", 0, ValueError, "batch_size: got 0"),
    "betas": ("betas", (0.99, 0.9), ValueError, "need 0 < beta1 < beta2 < 1"),
    "padding": ("padding", "none", ValueError, "padding: got 'none'"),
    "iterations": ("iterations", 0, ValueError, "iterations: got 0"),
}


@pytest.mark.parametrize(("where", "value", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls_change_nothing(where, value, error, message):
    problem = Problem(**SHAPES["small"])
    before = problem.copy()
    if isinstance(where, int):
        problem.data[where] = value
    with pytest.raises(error, match=re.escape(message)):
        problem(**({where: value} if isinstance(where, str) else {}))
    for name, expected in before.state().items():
        assert torch.equal(problem.state()[name], expected), name


def test_wrong_state():
    problem = Problem(**SHAPES["small"])
    good = problem.moments
    for moments, error, message in (
        (good[:1], TypeError, "moments: got tuple, need (exp_avg, exp_avg_sq)"),
        ((good[0], good[1].flat()), TypeError, "moments[1]: got tuple, need MIMNetParameters"),
        ((good[0]._replace(w1=ONES(2, 2)), good[1]), ValueError, "moments[0].flat()[1]: got"),
    ):
        problem.moments = moments
        with pytest.raises(error, match=re.escape(message)):
            problem()
    problem.moments, problem.parameters = good, problem.parameters.flat()
    with pytest.raises(TypeError, match="parameters: got tuple, need MIMNetParameters"):
        problem()


def test_says_which_backends_there_are():
    problem = Problem(**SHAPES["small"])
    reasons = backends.explain(
        "mimnet_adam_", problem.parameters, problem.moments, *problem.data, **problem.options
    )
    assert reasons["native"] == reasons["reference"] == []
    assert reasons["triton"]
