"""Which implementation serves a call, and what is said when it cannot."""

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from cases import (
    BACKENDS,
    EVERY_OP,
    Call,
    attention_call,
    interpreted,
    mimnet_call,
    routing_call,
    squash_call,
)
from torch.utils._python_dispatch import TorchDispatchMode

from mimnet_fast import BackendUnavailable, backends, ops, use_backend


def test_the_compiled_cpu_library_is_here():
    """Every other test skips a backend that is not; this one must not be green without it."""
    assert backends.available("cpu")["native"] is None
    assert backends.load_status()["_C"] is None


def test_kernels_exist_for_what_the_tests_call_backends():
    assert {"auto", *BACKENDS, "reference"} == set(backends.NAMES)
    assert list(backends.available()) == [*BACKENDS, "reference"]


class Served(TorchDispatchMode):
    """By whom calls are served."""

    def __init__(self):
        super().__init__()
        self.native = self.other = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mimnet_fast":
            self.native += 1
        else:
            self.other += 1
        return func(*args, **(kwargs or {}))


def native_calls(call, **options):
    with Served() as served:
        call(**options)
    return served.native


@pytest.fixture
def unbuilt(monkeypatch):
    """As after an install without a compiler."""
    status = dict.fromkeys(backends.load_status(), "_C.so is not built: for a test")
    monkeypatch.setattr(backends, "_load_status", status)


@pytest.mark.parametrize("name", EVERY_OP)
def test_choice(name):
    call = EVERY_OP[name]()
    assert native_calls(call) == 1
    assert native_calls(call, backend="auto") == 1
    assert native_calls(call, backend="native") == 1
    assert native_calls(call, backend="reference") == 0


@pytest.mark.parametrize("name", EVERY_OP)
def test_without_the_library(unbuilt, name):
    call = EVERY_OP[name]()
    for mine, other in zip(call.outputs(), call.outputs(backend="reference"), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(BackendUnavailable, match="not built: for a test"):
        call(backend="native")


def test_all_reasons_are_given():
    with pytest.raises(BackendUnavailable) as caught:
        backends.select("squash", "native", torch.ones(1), {"native": ["no this", "no that"]})
    message = str(caught.value)
    for part in ("squash", "'native'", "no this; no that", 'backend="auto"'):
        assert part in message


def test_triton_says_why():
    problem = backends.available()["triton"]
    if problem is None:
        pytest.skip("Triton kernels serve this machine")
    with pytest.raises(BackendUnavailable) as caught:
        squash_call()(backend="triton")
    assert problem in str(caught.value)


def test_use_backend():
    call = squash_call()
    assert native_calls(call) == 1
    with use_backend("reference"):
        assert native_calls(call) == 0
        assert native_calls(call, backend="native") == 1, "an argument wins"
        with use_backend("auto"):
            assert native_calls(call) == 1
        assert native_calls(call) == 0
    assert native_calls(call) == 1
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert native_calls(call) == 1, "restored after an error"
    with pytest.raises(ValueError, match="use_backend: got 'cuda'"), use_backend("cuda"):
        pass
    assert native_calls(call) == 1


def test_use_backend_inside_compiled_code():
    """A change of the setting compiles anew instead of keeping the old choice."""
    torch._dynamo.reset()
    call = squash_call()
    compiled = torch.compile(call.op, backend="aot_eager", fullgraph=True)
    expected = {name: call(backend=name) for name in ("native", "reference")}
    for name in ("native", "reference", "native"):
        with use_backend(name):
            torch.testing.assert_close(compiled(*call.args), expected[name], rtol=0, atol=0)


def in_a_new_process(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_environment_variable():
    code = "import torch, mimnet_fast as m; print(m.ops.squash(torch.ones(2, 2)).sum().item() > 0)"
    assert in_a_new_process(code, MIMNET_FAST_BACKEND="reference").stdout == "True\n"
    wrong = in_a_new_process(code, MIMNET_FAST_BACKEND="nativ")
    assert "MIMNET_FAST_BACKEND: got 'nativ', need one of 'auto', 'native'" in wrong.stderr
    code += "; print(m.backends.select('squash', None, torch.ones(1), {}))"
    found = in_a_new_process(code, MIMNET_FAST_BACKEND="reference")
    assert found.stdout.split() == ["True", "reference"]


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa):
    """A plainer variant of the kernels, as another machine would choose it."""
    code = """
import torch
from mimnet_fast import nn, ops, verify
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    x, w = (4 * torch.randn(19, 9, 10)).to(dtype), torch.randn(10, 7).to(dtype)
    lengths = torch.randint(0, 10, (19,))
    b = torch.randn(19, 5, 9).to(dtype)
    found = verify(ops.dynamic_routing, x, w, b, lengths=lengths, backend="native")
    assert found, found
    bridge = [p.detach().to(dtype) for p in nn.InterestBridge(7, 5, 6, 11).parameters()]
    interests, source = torch.randn(19, 5, 7).to(dtype), torch.randn(19, 5).to(dtype)
    found = verify(ops.interest_bridge, interests, source, *bridge, backend="native")
    assert found, found
print("fine")
"""
    process = in_a_new_process(code, MIMNET_FAST_ISA=isa)
    if "MIMNET_FAST_ISA" in process.stderr:
        pytest.skip(process.stderr.splitlines()[-1])
    assert process.stdout == "fine\n", process.stderr


def test_fallback_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_logged", set())
    call = attention_call(power=2.0)
    with caplog.at_level(logging.INFO, logger="mimnet_fast"):
        call()
        call()
        mimnet_call(ids=torch.int64).trainable()(table=torch.randn(23, 4, requires_grad=True))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, "once for each reason"
    assert "a key bias cancels only with power=1" in messages[0]
    assert "the table is frozen" in messages[1]


def test_nothing_is_logged_where_a_kernel_serves(caplog):
    with caplog.at_level(logging.DEBUG, logger="mimnet_fast"):
        squash_call()()
    assert not caplog.records


@pytest.mark.parametrize("name", EVERY_OP)
def test_explain(name):
    call = EVERY_OP[name]()
    for op in (call.op, call.op.__name__):
        with Served() as served:
            found = backends.explain(op, *call.args, **call.options)
        assert served.native == 0
        assert found["native"] == found["reference"] == []
        assert list(found) == [*BACKENDS, "reference"]
    # a backend of the call does not matter
    assert backends.explain(call.op, *call.args, **call.options, backend="reference") == found


def test_explain_gives_every_reason(unbuilt):
    call = routing_call(update="coupling", normalize_agreement=True)
    assert backends.explain(call.op, *call.args, **call.options)["native"] == [
        "_C.so is not built: for a test"
    ]


def test_explain_gives_what_a_kernel_lacks():
    call = attention_call(power=2.0)
    reasons = backends.explain("target_attention", *call.args, **call.options)
    assert reasons["native"] == ["a key bias cancels only with power=1"]
    assert reasons["reference"] == []


def test_a_backend_is_judged_by_its_own_kernels():
    offsets = torch.tensor([0, 3])
    reasons = backends.explain(
        "dynamic_routing", torch.ones(3, 2), torch.ones(3, 2, 2, 2), offsets=offsets
    )
    assert reasons["native"] == []
    if backends.available()["triton"] is None:
        assert reasons["triton"] == [
            "no Triton kernel for jagged histories with a weight per position and capsule in this "
            "version"
        ]
    call = squash_call()
    with pytest.raises(BackendUnavailable, match="no CUDA kernel for it"):
        backends.select("squash", "native", call.args[0], {"native": ["no CUDA kernel for it"]})
    assert backends.select("squash", "native", call.args[0], {"triton": ["no"]}) == "native"


def test_explain_raises_as_the_call():
    with pytest.raises(ValueError, match="temperature: got 0"):
        backends.explain("dynamic_routing", torch.ones(1, 2, 3), num_capsules=2, temperature=0.0)


def test_explain_disturbs_no_other_thread():
    call, stop, failures = squash_call(), threading.Event(), []

    def work():
        while not stop.is_set():
            try:
                call()
            except Exception as error:  # a failure of any kind counts
                failures.append(error)
                return

    worker = threading.Thread(target=work)
    worker.start()
    for _ in range(300):
        backends.explain("squash", *call.args)
    stop.set()
    worker.join()
    assert not failures


def test_status_cannot_be_changed_from_outside():
    backends.load_status()["_C"] = "gone"
    assert backends.load_status()["_C"] is None


@pytest.mark.parametrize("name", EVERY_OP)
def test_devices_without_kernels(name):
    """Meta tensors have shapes and no values: the reference serves them."""
    call = EVERY_OP[name]()
    meta = call.map(lambda t: t.to("meta"))
    shapes = [out.shape for out in call.outputs()]
    assert [out.shape for out in meta.outputs()] == shapes
    assert "meta" in backends.available("meta")["native"]
    with pytest.raises(BackendUnavailable, match="no compiled kernels for meta tensors"):
        meta(backend="native")


def test_a_damaged_library_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    assert "does not load" in backends._load("_C")
    assert "is not built" in backends._load("_other")


def test_calls_from_several_threads(backend):
    """Kernels keep working memory per thread."""
    if interpreted(backend):
        pytest.skip("Triton's interpreter is one for all threads")
    calls = [EVERY_OP[name](b=33) for name in EVERY_OP]
    expected = [call.gradients(backend=backend) for call in calls]
    failures = []

    def work(order):
        for i in order:
            found = calls[i].gradients(backend=backend)
            if not all(map(torch.equal, found, expected[i])):
                failures.append(calls[i])

    orders = [list(range(len(calls))) * 3, list(range(len(calls)))[::-1] * 3] * 2
    threads = [threading.Thread(target=work, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert Call(ops.squash, (torch.zeros(1),))(backend=backend).item() == 0
