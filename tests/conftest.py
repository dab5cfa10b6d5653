"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no failure: no property has a time limit of its own.
settings.register_profile("diptych", deadline=None)
settings.load_profile("diptych")

TESTS = Path(__file__).parent
SLOW = (
    "dashboard",  # starts servers and renders pages
    "experiments/test_bench.py",
    "experiments/test_bench_records.py",
    "experiments/test_cli.py",  # real commands, many of them processes
    "experiments/test_fidelity_command.py",  # real runs
    "experiments/test_library_replay.py",
    "experiments/test_published.py",  # several simulations each
    "experiments/test_replay.py",  # real runs
    "experiments/test_write_a_policy.py",
    "experiments/workloads/test_describing.py",  # whole traces
    "experiments/workloads/test_workload_traces.py",
    "policies/test_library.py",  # every policy through every property
    "runtime/kernels",  # Triton's interpreter
    "runtime/serving",  # servers and their engine processes
    "runtime/test_client.py",
    "runtime/test_default_model.py",  # the real model, and transformers beside it
    "runtime/test_engine_sampling.py",
    "runtime/test_engine_tokens.py",
    "runtime/test_llama_matches_transformers.py",
    "runtime/test_tokenizer.py",
    "test_gpu_bench.py",
)
"""Files and folders that `make check` leaves out whole; single tests elsewhere are marked where they stand."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = [TESTS / name for name in SLOW]
    for item in items:
        if any(item.path.is_relative_to(path) for path in slow):
            item.add_marker(pytest.mark.slow)
