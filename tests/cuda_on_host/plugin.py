"""pytest plugin: the tests of the ops meet the CUDA kernels on the host as the native backend."""

import cases
import torch

import cuda_on_host


def pytest_configure():
    cuda_on_host.load()
    cases.CUDA_ON_HOST = True
    cases.DTYPES = tuple(dtype for dtype in cases.DTYPES if dtype is not torch.float64)
