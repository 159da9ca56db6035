"""Fixtures of every test."""

import zlib

import pytest
import torch

from mimnet_fast import backends


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Inputs are small, and parallel test workers take the cores already."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed(request):
    """Random inputs that differ from test to test and not from run to run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=["native"])
def backend(request):
    """Each backend that has kernels; the reference is what they are compared with."""
    problem = backends.available("cpu")[request.param]
    if problem:
        pytest.skip(f"{request.param}: {problem}")
    return request.param
