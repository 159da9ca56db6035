"""Benchmarks: `pytest bench --benchmark-only`, or all in one table: `python -m bench.compare`."""
