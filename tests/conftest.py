"""What all tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A busy machine is no failure: no property has a time limit of its own.
settings.register_profile("diptych", deadline=None)
settings.load_profile("diptych")

TESTS = Path(__file__).parent
SLOW = (
    "dashboard",  # starts servers and renders pages
    "experiments/test_bench.py",
    "experiments/test_bench_failures.py",
    "experiments/test_bench_records.py",
    "experiments/test_cli.py",  # real commands, many of them processes
    "experiments/test_cli_interrupts.py",
    "experiments/test_cli_mistakes.py",
    "experiments/test_cli_own_policies.py",
    "experiments/test_composition.py",
    "experiments/test_fidelity_command.py",  # real runs
    "experiments/test_fidelity_simulated.py",
    "experiments/test_future.py",
    "experiments/test_host_memory.py",
    "experiments/test_library_replay.py",
    "experiments/test_life.py",
    "experiments/test_paper.py",
    "experiments/test_plots.py",
    "experiments/test_profiling.py",  # real profiles
    "experiments/test_published.py",  # several simulations each
    "experiments/test_replay.py",  # real runs
    "experiments/test_sweeps.py",
    "experiments/test_write_a_policy.py",
    "experiments/workloads/test_describing.py",  # whole traces
    "experiments/workloads/test_workload_traces.py",
    "policies/test_continuum.py",
    "policies/test_fairness.py",
    "policies/test_library.py",  # every policy through every property
    "policies/test_live_change.py",
    "policies/test_memory_admission.py",
    "policies/test_plan_time.py",
    "policies/test_program_queues.py",
    "policies/test_router_library.py",
    "policies/test_schedulers.py",  # beside their papers' algorithms, in random schedules
    "policies/test_size_queues.py",
    "policies/test_step_formers.py",
    "runtime/kernels",  # Triton's interpreter
    "runtime/serving",  # servers and their engine processes
    "runtime/test_client.py",
    "runtime/test_default_model.py",  # the real model, and transformers beside it
    "runtime/test_engine_life.py",
    "runtime/test_engine_sampling.py",
    "runtime/test_engine_tokens.py",
    "runtime/test_llama_matches_transformers.py",
    "runtime/test_sampling.py",
    "runtime/test_tensor_parallel.py",  # processes for each rank
    "runtime/test_tokenizer.py",
    "runtime/test_torchrun.py",
    "simulator/test_qoe.py",
    "simulator/test_queueing_laws.py",
    "simulator/test_routing.py",
    "simulator/test_together.py",  # every policy, with and without
    "test_docs_run.py",
    "test_gpu_bench.py",
    "test_tiers_bench.py",
)
"""Files and folders that `make check` leaves out whole; single tests elsewhere are marked where they stand."""


LONGEST = (
    "runtime/serving",
    "runtime/test_engine_tokens.py",
    "dashboard",
    "experiments/test_cli.py",
    "experiments/test_cli_mistakes.py",
    "runtime/kernels",
    "experiments/test_fidelity_command.py",
)
"""What processes that share the suite begin with, so that none is left alone with it at the end."""

SHARING = {
    "smollm2": (
        "runtime/test_default_model.py",
        "runtime/test_engine_sampling.py",
        "runtime/test_engine_tokens.py",
        "runtime/test_llama_matches_transformers.py",
        "runtime/test_tokenizer.py",
    ),
    "server": (
        "runtime/serving/test_benchmark_clients.py",
        "runtime/serving/test_edges.py",
        "runtime/serving/test_events.py",
        "runtime/serving/test_fuzz.py",
        "runtime/serving/test_openai_package.py",
        "runtime/serving/test_operator.py",
        "runtime/serving/test_streams.py",
    ),
}
"""Files that use a fixture of the session that takes long to make: one process runs them all, and makes it once."""


@pytest.fixture(autouse=True)
def main_module_is_put_back() -> Iterator[None]:
    """Streamlit's AppTest puts the page in its place, which processes started later would run as their own."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = [TESTS / name for name in SLOW]
    for item in items:
        if any(item.path.is_relative_to(path) for path in slow):
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):  # one of several processes of pytest-xdist
        items.sort(key=_begins)


def _begins(item: pytest.Item) -> int:
    ranks = (rank for rank, name in enumerate(LONGEST + SLOW) if item.path.is_relative_to(TESTS / name))
    return next(ranks, len(LONGEST + SLOW))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With --dist loadscope a file is run by one process, which makes the fixtures of its module once.

    Not marks and --dist loadgroup: pytest-xdist 3.8 does not see the marks where pytest is 9.2.
    """
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    group_of = {
        (TESTS / name).relative_to(config.rootpath).as_posix(): g for g, names in SHARING.items() for name in names
    }

    class FilesThatShare(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return group_of.get(file, file)

    return FilesThatShare(config, log)
