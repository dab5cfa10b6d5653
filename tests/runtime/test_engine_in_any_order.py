"""Whatever is submitted and cancelled when and by whom, everybody ends and every block returns."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.engine import Details
from runtime.sampling.params import SamplingParams
from tests.runtime.ending import all_free, some_prompts, wait_until_it_is
from tests.runtime.engines import Listener, Rows, greedy, serve, tiny
from tests.runtime.test_engine_tokens import PauseAndResume

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

_OPERATION = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 70), st.integers(1, 30), st.integers(0, 5)),
    st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 30), st.integers(0, 20), st.just(0)),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    operations=st.lists(_OPERATION, min_size=1, max_size=40),
    lag=st.sampled_from([0, 1]),
    scheduler=st.sampled_from(["mixed", "sarathi,chunk_size=24", "prefill_first", "static,max_batch_size=3", "pause"]),
    num_blocks=st.sampled_from([14, 30, 200]),
    caching=st.booleans(),
)
def test_whatever_is_submitted_and_cancelled_everybody_ends_and_every_block_returns(
    operations: list[tuple[str, int, int, int]], lag: int, scheduler: str, num_blocks: int, caching: bool
) -> None:
    rows = Rows()
    listeners: list[Listener] = []
    if scheduler == "pause":
        num_blocks = 200  # it keeps everybody's blocks
    policy = PauseAndResume(5, False) if scheduler == "pause" else scheduler
    limits: dict[str, Any] = {
        "num_blocks": num_blocks,
        "block_size": 8,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 40,
    }
    with serve(tiny(), policy, recorder=rows, lag=lag, prefix_caching=caching, **limits) as engine:
        for kind, a, b, c in operations:
            if kind == "submit":
                listeners.append(Listener())
                params = SamplingParams(seed=a, max_tokens=b, stop_token_ids=tuple(range(0, 512, 20)) if c == 0 else ())
                about = Details(forced_length=b - 3) if c == 1 and b > 3 else Details()
                engine.submit([(3 * c + k) % 512 for k in range(a)], params, listeners[-1], about)
            elif kind == "cancel":
                engine.cancel(a)
            elif a < len(listeners):
                listeners[a].wait_for_tokens(b)
        for listener in listeners:
            listener.last()
        wait_until_it_is(lambda: all_free(engine))
        engine.raise_if_dead()
    assert sorted(rows.requests) == list(range(len(listeners)))
    for i, listener in enumerate(listeners):
        _check_row(rows.requests[i], listener, lag)
    sampled = sum(row["num_samples"] for row in rows.steps)
    assert sampled == sum(_num_produced(row) for row in rows.requests.values())


def _num_produced(row: dict[str, Any]) -> int:
    runs = row["decode_runs"]
    return len(row["token_steps"]) + sum(end - start for start, end in zip(runs[::2], runs[1::2], strict=True))


def _check_row(row: dict[str, Any], listener: Listener, lag: int) -> None:
    last = listener.outputs[-1]
    status = {"error": "refused"}.get(str(last.finish_reason), last.finish_reason)
    assert row["status"] == status
    assert row["output_tokens"] == len(listener.token_ids)
    assert row["error"] == (last.error or "")
    assert sum(output.finish_reason is not None for output in listener.outputs) == 1
    # A step in flight when it ended may have computed a token more.
    assert 0 <= _num_produced(row) - row["output_tokens"] <= lag


def test_requests_from_many_threads_all_end() -> None:
    rows = Rows()
    with serve(tiny(), recorder=rows, lag=1, max_num_seqs=6, num_blocks=60, block_size=8) as engine:

        def client(seed: int) -> None:
            rng = random.Random(seed)
            for prompt in some_prompts(6, seed):
                listener = Listener()
                request_id = engine.submit(prompt, replace(greedy(rng.randint(1, 25)), temperature=1.0), listener)
                if rng.random() < 0.4:
                    listener.wait_for_tokens(rng.randint(0, 5))
                    engine.cancel(request_id)
                listener.last()

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until_it_is(lambda: all_free(engine))
    assert len(rows.requests) == 36
    assert {row["status"] for row in rows.requests.values()} == {"length", "cancelled"} | (
        {"stop"} & {row["status"] for row in rows.requests.values()}
    )
