"""Fixtures of every test."""

import os
import sys
import zlib

if not any("cuda" in argument for argument in sys.argv):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

import pytest
import torch
from cases import SAME_TRITON_KERNELS, interpreted

from mimnet_fast import BackendUnavailable, backends


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the tensors: cpu or cuda")


@pytest.fixture(autouse=True, scope="session")
def device(request):
    """Where tensors are made unless a test says otherwise."""
    device = request.config.getoption("--device")
    torch.set_default_device(device)
    # Inputs are small, and parallel test workers take the cores already.
    torch.set_num_threads(1)
    return device


@pytest.fixture(autouse=True)
def _seed(request):
    """Random inputs that differ from test to test and not from run to run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def poisoned():
    """Uninitialised memory of tensors is NaN, that of the C++ ops included."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["native", "triton"])
def backend(request, device):
    """Each backend that has kernels; the reference is what they are compared with."""
    parameters = request.node.callspec.params
    if interpreted(request.param):
        if parameters.get("dtype") is torch.float16:
            pytest.skip("Triton's interpreter computes float16 as it does bfloat16")
        if twin := SAME_TRITON_KERNELS.get(parameters.get("name")):
            pytest.skip(f"seconds in Triton's interpreter, on the kernels of {twin}")
        half = parameters.get("dtype") is torch.bfloat16 and "shape" not in parameters
        if half and parameters.get("weight") in ("per_capsule", "per_position"):
            pytest.skip("seconds in Triton's interpreter, which test_shapes spends on bfloat16")
    return _usable(request.param, device)


@pytest.fixture(params=["reference", "native", "triton"])
def any_backend(request, device):
    """For what has to hold whatever serves the call."""
    return _usable(request.param, device)


def _usable(name, device):
    problem = backends.available(device)[name]
    if problem:
        pytest.skip(f"{name}: {problem}")
    return name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Tests of what a backend never serves are skipped, with its reason."""
    try:
        return (yield)
    except BackendUnavailable as error:
        unserved = ("kernels for float64", "no Triton kernel for", "no CUDA kernel for")
        if any(reason in str(error) for reason in unserved):
            pytest.skip(str(error))
        raise
