"""Many steps of Adam in one call, against the loop over them and against `torch.optim`."""

import re

import pytest
import torch
from cases import dtype_id
from torch.nn import Parameter

from mimnet_fast import backends, ops

SHAPES = {
    "small": {"users": 7, "items": 5, "d": 3, "ratings": 40, "batch": 4},
    "paper": {"users": 200, "items": 300, "d": 10, "ratings": 5000, "batch": 64},
    "wide": {"users": 20, "items": 30, "d": 67, "ratings": 500, "batch": 256},
    "gaps_longer_than_the_series": {"users": 900, "items": 5, "d": 4, "ratings": 900, "batch": 1},
    "one_batch": {"users": 9, "items": 9, "d": 16, "ratings": 30, "batch": 1000},
}
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)


def problem(users, items, d, ratings, batch, dtype=torch.float32):
    """Arguments of the op, rows of all frequencies and some of none."""
    tables = [torch.randn(count, d).to(dtype) for count in (users, items)]
    moments = [(torch.zeros_like(table), torch.zeros_like(table)) for table in tables]
    ids = [(torch.rand(ratings).square() * 0.9 * count).long() for count in (users, items)]
    truth = torch.randint(1, 6, (ratings,)).to(dtype)
    return [*tables, *moments, *ids, truth], {"batch_size": batch}


def copied(arguments, dtype=None):
    return [
        copied(each, dtype)
        if isinstance(each, tuple | list)
        else each.to(dtype if each.is_floating_point() else None, copy=True)
        for each in arguments
    ]


def state(arguments):
    users, items, of_users, of_items = arguments[:4]
    return {"users": users, "items": items} | {
        f"{name}[{index}]": moment
        for name, moments in (("of_users", of_users), ("of_items", of_items))
        for index, moment in enumerate(moments)
    }


def check_same_training(found, expected, rough):
    """Close to float64; where the loop in the same dtype is farther away, at most thrice as far."""
    for name, exact in state(expected).items():
        scale = exact.abs().max()
        error = (state(found)[name] - exact).abs().max() / scale
        budget = 3 * (state(rough)[name] - exact).abs().max() / scale
        assert error <= max(budget, 1e-6 if found[0].dtype is torch.float32 else 1e-7), name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@both_dtypes
def test_is_adam_on_every_row(shape, dtype):
    arguments, options = problem(**shape, dtype=dtype)
    options |= {"learning_rate": 0.02, "first_step": 3}
    expected, rough = copied(arguments, torch.float64), copied(arguments)
    exact_losses = ops.matrix_factorization_adam_(*expected, **options, backend="reference")
    ops.matrix_factorization_adam_(*rough, **options, backend="reference")
    losses = ops.matrix_factorization_adam_(*arguments, **options, backend="native")
    check_same_training(arguments, expected, rough)
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_is_what_the_optimizer_of_torch_does(backend):
    arguments, options = problem(**SHAPES["paper"], dtype=torch.float64)
    tables = [Parameter(table.clone()) for table in arguments[:2]]
    optimizer = torch.optim.Adam(tables, lr=0.02)
    losses = []
    for user, item, truth in zip(*(each.split(64) for each in arguments[4:]), strict=True):
        optimizer.zero_grad()
        error = (tables[0][user] * tables[1][item]).sum(1) - truth
        loss = error.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found = ops.matrix_factorization_adam_(
        *arguments, **options, learning_rate=0.02, backend=backend
    )
    torch.testing.assert_close(found, torch.stack(losses), rtol=1e-6, atol=1e-7)
    for table, moments, parameter in zip(arguments[:2], arguments[2:4], tables, strict=True):
        torch.testing.assert_close(table, parameter.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(moments[0], optimizer.state[parameter]["exp_avg"])
        torch.testing.assert_close(moments[1], optimizer.state[parameter]["exp_avg_sq"])


@pytest.mark.parametrize("eps", [1e-5, 1e-2, 1.0])
@both_dtypes
def test_moments_near_eps(eps, dtype):
    """Where eps is much of the denominator, missed steps cannot be summed in closed form."""
    arguments, options = problem(**SHAPES["paper"], dtype=dtype)
    options |= {"learning_rate": 0.02, "eps": eps}
    expected, rough = copied(arguments, torch.float64), copied(arguments)
    ops.matrix_factorization_adam_(*expected, **options, backend="reference")
    ops.matrix_factorization_adam_(*rough, **options, backend="reference")
    ops.matrix_factorization_adam_(*arguments, **options, backend="native")
    check_same_training(arguments, expected, rough)


def test_calls_go_on_where_the_last_one_ended():
    """Any cut between batches gives the same training."""
    shape = SHAPES["paper"]
    arguments, options = problem(**shape, dtype=torch.float64)
    in_parts = copied(arguments)
    losses = [ops.matrix_factorization_adam_(*arguments, **options)]
    parts, step = [], 0
    for cut in (slice(0, 64), slice(64, 64 * 40), slice(64 * 40, None)):
        tables, columns = in_parts[:4], [each[cut] for each in in_parts[4:]]
        parts.append(ops.matrix_factorization_adam_(*tables, *columns, **options, first_step=step))
        step += len(parts[-1])
    torch.testing.assert_close(torch.cat(parts), losses[0], rtol=1e-6, atol=1e-7)
    for name, expected in state(arguments).items():
        torch.testing.assert_close(state(in_parts)[name], expected, rtol=1e-6, atol=1e-7, msg=name)


def test_runs_the_same_every_time():
    arguments, options = problem(**SHAPES["paper"])
    again = copied(arguments)
    losses = [ops.matrix_factorization_adam_(*each, **options) for each in (arguments, again)]
    assert torch.equal(*losses)
    for name, expected in state(arguments).items():
        assert torch.equal(state(again)[name], expected), name


def test_takes_parameters_int32_and_columns_of_a_table():
    arguments, options = problem(**SHAPES["small"])
    expected = copied(arguments)
    ops.matrix_factorization_adam_(*expected, **options)
    columns = torch.stack(arguments[4:6], dim=1).int()
    arguments[0] = Parameter(arguments[0])
    version = arguments[0]._version
    truth = torch.stack([arguments[6]] * 2, dim=1)[:, 0]
    losses = ops.matrix_factorization_adam_(
        *arguments[:4], columns[:, 0], columns[:, 1], truth, **options
    )
    assert not losses.requires_grad
    assert torch.equal(arguments[0], expected[0])
    assert arguments[0]._version > version, "autograd does not see the change"


def test_says_which_backends_there_are():
    arguments, options = problem(**SHAPES["small"])
    reasons = backends.explain("matrix_factorization_adam_", *arguments, **options)
    assert reasons["native"] == reasons["reference"] == []
    assert reasons["triton"]


def test_tracing_knows_the_shape():
    arguments, _ = problem(**SHAPES["small"])
    users, items, of_users, of_items, *columns = arguments
    torch.library.opcheck(
        torch.ops.mimnet_fast.matrix_factorization_adam_.default,
        (users, items, *of_users, *of_items, *columns, 3, 0, 0.1, 0.9, 0.999, 1e-8),
        test_utils=("test_schema", "test_faketensor"),
    )


WRONG = {
    "no tensor": (0, None, TypeError, "user_table: got NoneType"),
    "one dimension": (0, torch.ones(7), ValueError, "user_table: got shape [7], need [U, D]"),
    "half": (0, torch.ones(7, 3).half(), TypeError, "user_table: got dtype torch.float16"),
    "other width": (1, torch.ones(5, 4), ValueError, "item_table: got shape [5, 4]"),
    "strides": (1, torch.ones(3, 5).T, ValueError, "item_table: got strides (1, 5)"),
    "no pair": (2, torch.ones(7, 3), TypeError, "user_moments: got Tensor"),
    "moment's shape": (3, (torch.ones(5, 3), torch.ones(4, 3)), ValueError, "item_moments[1]: got"),
    "floating ids": (4, torch.ones(40), TypeError, "user_ids: got dtype torch.float32"),
    "too few ids": (4, torch.zeros(39).long(), ValueError, "user_ids: got shape [39]"),
    "id out of the table": (5, torch.full((40,), 5), ValueError, "item_ids: got 5, need 0 to 4"),
    "negative id": (5, torch.full((40,), -1), ValueError, "item_ids: got -1"),
    "no ratings": (6, torch.ones(0), ValueError, "ratings: got N = 0"),
    "ratings' dtype": (6, torch.ones(40).double(), TypeError, "ratings: got dtype torch.float64"),
    "batch size": ("batch_size", 0, ValueError, "batch_size: got 0"),
    "steps": ("first_step", -1, ValueError, "first_step: got -1"),
    "rate": ("learning_rate", 0.0, ValueError, "learning_rate: got 0.0"),
    "eps": ("eps", 0.0, ValueError, "eps: got 0.0"),
    "one beta": ("betas", 0.9, TypeError, "betas: got float"),
    "order of betas": ("betas", (0.99, 0.9), ValueError, "need 0 < beta1 < beta2 < 1"),
    "no first moment": ("betas", (0.0, 0.9), ValueError, "betas[0]: got 0.0"),
    "Triton": ("backend", "triton", backends.BackendUnavailable, "no Triton kernel"),
}


@pytest.mark.parametrize(("where", "value", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls_change_nothing(where, value, error, message, monkeypatch):
    if value == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments, options = problem(**SHAPES["small"])
    before = copied(arguments)
    given = list(arguments)
    if isinstance(where, int):
        given[where] = value
    else:
        options[where] = value
    with pytest.raises(error, match=re.escape(message)):
        ops.matrix_factorization_adam_(*given, **options)
    for name, expected in state(before).items():
        assert torch.equal(state(arguments)[name], expected), name


def test_one_table_for_both_sides():
    arguments, options = problem(**SHAPES["small"])
    arguments[1], arguments[3] = arguments[0], arguments[2]
    with pytest.raises(ValueError, match="item_table: got user_table"):
        ops.matrix_factorization_adam_(*arguments, **options)
