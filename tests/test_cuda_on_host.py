"""The CUDA kernels on a machine without a GPU, on the executor of tests/cuda_on_host."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import cuda_on_host
import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(cuda_on_host.MISSING), reason=f"not found: {', '.join(cuda_on_host.MISSING)}"
    ),
]

TESTS = Path(__file__).parent
OPS = sorted(
    source.stem
    for source in (TESTS.parent / "csrc" / "cuda").glob("*.cu")
    if (TESTS / f"test_{source.stem}.py").exists()
)


@pytest.fixture(params=["ascending", "descending"])
def order(request, monkeypatch):
    """Of blocks and threads: where two of them race, one of the orders shows it."""
    monkeypatch.setenv("MIMNET_FAST_HOST_ORDER", request.param)
    return request.param


@pytest.mark.parametrize("op", OPS)
def test_op(op, order):
    cuda_on_host.build("cuda_on_host")
    names = (op, "memory", "gradients") if order == "ascending" else (op,)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "cuda_on_host.plugin"),
            *("-p", "no:cacheprovider", "--capture=sys", "--maxfail=3", "-k", f"{op} and native"),
            *(TESTS / f"test_{name}.py" for name in names),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(TESTS),
            "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1",
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_cpu_kernels_give_way():
    """One registration serves all ops."""
    program = """
import cuda_on_host, torch
cuda_on_host.load()
torch.ops.mimnet_fast.squash(torch.ones(3, dtype=torch.float64), 0, 1e-8, 1.0)
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
    )
    assert "CUDA kernels serve no float64" in run.stderr


@pytest.fixture(scope="module")
def probe():
    """Runs a kernel of probes.cu on tensors; an exception says what it did wrong."""
    function = ctypes.CDLL(cuda_on_host.build("probes")).probe
    number = ctypes.c_int64
    function.restype = ctypes.c_char_p
    function.argtypes = [
        *(ctypes.c_char_p, ctypes.c_void_p, number, ctypes.c_void_p, number),
        *(number, ctypes.c_int, number),
    ]

    def run(name, given, out, *, blocks=1, threads=32, shared_bytes=0):
        problem = function(
            name.encode(),
            *(given.data_ptr(), given.nbytes, out.data_ptr(), out.nbytes),
            *(blocks, threads, shared_bytes),
        )
        if problem:
            raise RuntimeError(problem.decode())
        return out

    return run


def test_every_thread_runs_once(probe, order):
    out = probe("positions", torch.empty(0), torch.zeros(5, 96, 4).long(), blocks=5, threads=96)
    block, thread = torch.meshgrid(torch.arange(5), torch.arange(96), indexing="ij")
    expected = [block, torch.full_like(block, 5), thread, torch.full_like(block, 96)]
    assert torch.equal(out, torch.stack(expected, -1))


@pytest.mark.parametrize("threads", [32, 64, 1024])
def test_barriers(probe, order, threads):
    x = torch.randn(3, threads)
    out = probe(
        "reverse", x, torch.zeros_like(x), blocks=3, threads=threads, shared_bytes=4 * threads
    )
    assert torch.equal(out, x.flip(1))
    if threads == 32:
        out = probe("reverse_in_warp", x, torch.zeros(32), shared_bytes=128)
        assert torch.equal(out, x[0].flip(0))


def test_a_missing_barrier_shows(probe, order):
    x = torch.randn(64)
    out = probe("reverse_without_barrier", x, torch.zeros(64), threads=64, shared_bytes=256)
    assert out.isnan().sum() == 32


def test_shuffles(probe, order):
    x = torch.randn(2, 3, 32)
    out = probe("shuffles", x, torch.zeros(2, 3, 32, 3), blocks=2, threads=96)
    assert torch.equal(out[..., 0], x[..., 5:6].expand(x.shape))
    assert torch.equal(out[..., 1], x.roll(-1, -1))
    assert torch.equal(out[..., 2], x[..., torch.arange(32) ^ 5])


def test_shared_memory_is_poisoned_before_every_block(probe):
    out = probe(
        "first_of_shared_memory", torch.empty(0), torch.zeros(3, 32), blocks=3, shared_bytes=128
    )
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("name", "dtype", "per_thread"),
    [("bfloat16", torch.bfloat16, 1), ("pairs", torch.bfloat16, 2), ("float16", torch.float16, 1)],
)
def test_rounding(probe, name, dtype, per_thread):
    scales = torch.arange(-30.0, 31).exp2()
    special = torch.tensor([0.0, torch.inf, torch.nan, 65504, 65520, 1e-45, 3e-8, 3.4e38])
    x = torch.cat([torch.randn(64, 61).mul(scales).flatten(), special.repeat(8)])
    blocks = len(x) // (32 * per_thread)
    out = probe(f"round_trip_of_{name}", x, torch.zeros_like(x), blocks=blocks)
    torch.testing.assert_close(out, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_packs(probe):
    x = torch.randn(128)
    assert torch.equal(probe("copy_packs", x, torch.zeros(128)), x)


@pytest.mark.parametrize("name", ["multiply_by_layout", "multiply_loaded", "multiply_transposed"])
def test_matrix_product(probe, order, name):
    """Small whole numbers, so that no order of the sum rounds."""
    a, b = (torch.randint(-8, 9, size).bfloat16() for size in ((16, 16), (16, 8)))
    given = torch.cat([a.flatten(), b.flatten()])
    out = probe(name, given, torch.zeros(16, 8), shared_bytes=given.nbytes)
    assert torch.equal(out, 1 + a.float() @ b.float())


WRONG = {
    "return_before_barrier": "40 are at sync_block .probes.cu:.*; 24 are at the end",
    "wait_at_two_barriers": "32 are at sync_block .probes.cu:.*; 32 are at sync_block",
    "shuffle_without_a_lane": "threads 32 to 63 do not meet: 31 are at shuffle .*; 1 are at the",
    "shuffle_in_two_places": "threads 0 to 31 do not meet: 16 are at shuffle .*; 16 are at shuffle",
    "meet_warp_and_block": "1 are at sync_block .*; 31 are at sync_warp",
    "load_past_the_end": "load of 4 bytes outside .*, ends 4 bytes after a tensor.* thread 15",
    "load_before_the_start": "load of 1 bytes outside .*, starts 1 bytes before a tensor",
    "load_across_the_end": "load of 8 bytes outside .*, ends 4 bytes after a tensor.* thread 7",
    "store_past_the_end": "store of 4 bytes outside .*, ends 4 bytes after a tensor.* thread 16",
    "store_to_input": "store of 1 bytes to an input",
    "load_misaligned": "load of 4 bytes at an address that is not aligned",
    "load_pack_misaligned": "load of 16 bytes at an address that is not aligned",
    "store_pack_misaligned": "store of 16 bytes at an address that is not aligned",
    "write_before_shared_memory": "a write before the start of shared memory, in block 0",
    "write_past_shared_memory": "a write past the end of shared memory, in block 0",
    "matrix_past_shared_memory": "a row of a matrix outside of shared memory .* thread 16",
    "matrix_misaligned": "a row of a matrix is not aligned",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_reported(probe, name):
    given, out = torch.zeros(15), torch.zeros(16)
    with pytest.raises(RuntimeError, match=f"{WRONG[name]}.* the launch at probes.cu:"):
        probe(name, given, out, threads=64, shared_bytes=256)
    assert torch.equal(probe("copy_packs", x := torch.randn(128), torch.zeros(128)), x)


@pytest.mark.parametrize(
    ("threads", "shared_bytes", "message"),
    [
        (48, 0, "48 threads"),
        (2048, 0, "2048 threads"),
        (32, 227 * 1024 + 1, "bytes of shared memory"),
    ],
)
def test_impossible_launches_are_reported(probe, threads, shared_bytes, message):
    with pytest.raises(RuntimeError, match=message):
        probe(
            "copy_packs",
            torch.zeros(128),
            torch.zeros(128),
            threads=threads,
            shared_bytes=shared_bytes,
        )
