"""How the engine itself ends: closed, or by an error of its model, its policy, or its recorder, and nobody hangs."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import threading
import time
import weakref
from typing import Any

import pytest

from policies.contract import View
from policies.control_plane import PolicyStalled
from policies.plan import Plan
from policies.queues.fcfs import Fcfs
from policies.request import Request, Slo
from policies.schedulers.mixed import Mixed
from runtime.engine import Details, Engine, EngineDead
from runtime.model_runner import ModelRunner
from runtime.sequence import Output
from tests.runtime.ending import all_free, fail_after, some_prompts, wait_until_it_is
from tests.runtime.engines import PATIENCE, Listener, Rows, greedy, serve, submit_together, tiny, tokens_of

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("after", [0, 1, 12])
def test_a_failing_model_ends_every_request_with_its_error(
    monkeypatch: pytest.MonkeyPatch, lag: int, after: int
) -> None:
    loaded = tiny()
    fail_after(monkeypatch, loaded, after)
    rows = Rows()
    engine = serve(loaded, recorder=rows, lag=lag, max_num_seqs=2)
    cache = weakref.ref(engine._runner.kv_cache)
    for listener in submit_together(engine, some_prompts(5), greedy(40)):
        last = listener.last()
        assert last.finish_reason == "error"
        assert last.error == "the engine has stopped: ArithmeticError: the card is on fire"
    for call in (lambda: engine.generate([[1]], greedy(1)), lambda: engine.submit([1], greedy(1), Listener())):
        with pytest.raises(EngineDead, match="the card is on fire") as caught:
            call()
        assert isinstance(caught.value.__cause__, ArithmeticError)
    with pytest.raises(EngineDead):
        engine.raise_if_dead()
    engine.cancel(0)
    engine.close()
    engine.close()
    gc.collect()
    assert cache() is None, "the error holds the KV cache"
    assert {row["status"] for row in rows.requests.values()} == {"unfinished"}


def test_everybody_is_told_although_the_device_does_not_even_close(monkeypatch: pytest.MonkeyPatch) -> None:
    close = ModelRunner.close

    def fail(*_: object) -> None:
        raise ArithmeticError("the card is on fire")

    def fail_after(runner: ModelRunner) -> None:
        close(runner)
        fail()

    monkeypatch.setattr(ModelRunner, "collect", fail)
    monkeypatch.setattr(ModelRunner, "close", fail_after)
    engine = serve(tiny(), max_num_seqs=2)
    for listener in submit_together(engine, some_prompts(3), greedy(4)):
        assert listener.last().error == "the engine has stopped: ArithmeticError: the card is on fire"
    engine.close()


def test_a_stream_learns_that_the_engine_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny()
    fail_after(monkeypatch, loaded, 5)
    seen: list[Output] = []

    async def read(engine: Engine) -> None:
        async for output in engine.stream([1, 2, 3], greedy(40)):
            seen.append(output)

    with serve(loaded) as engine, pytest.raises(EngineDead, match="the card is on fire"):
        asyncio.run(read(engine))
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"priority": 2**31}, "priority must be a whole number that fits in 32 bits, not 2147483648"),
        ({"priority": 1.5}, "priority must be a whole number that fits in 32 bits, not 1.5"),
        ({"session": "a"}, "session must be a whole number that fits in 64 bits, not 'a'"),
        ({"program": 2**63}, "program must be a whole number that fits in 64 bits"),
        ({"parents": None}, "parents must be a tuple of request ids, not None"),
        ({"parents": (1, 2.0)}, "a parent must be a whole number that fits in 64 bits, not 2.0"),
        ({"tenant": 3}, "tenant must be text, not 3"),
        ({"slo": Slo(ttft_ns=1e9 / 3)}, "slo.ttft_ns must be a whole number that fits in 64 bits"),
        ({"slo": Slo(value=float("nan"))}, "slo.value must be a finite number, not nan"),
        ({"hints": {"tool": "search"}}, "hint tool must be a finite number, not 'search'"),
        ({"hints": {1: 2.0}}, "a hint's name must be text, not 1"),
    ],
)
def test_what_no_record_can_keep_of_a_request_is_refused_on_the_spot(details: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Details(**details)


@pytest.mark.parametrize("lag", [0, 1])
def test_closing_ends_the_requests_that_run_and_those_that_wait(lag: int) -> None:
    rows = Rows()
    engine = serve(tiny(), recorder=rows, lag=lag, max_num_seqs=2)
    listeners = submit_together(engine, some_prompts(4), greedy(900))
    listeners[0].wait_for_tokens(3)
    engine.close()
    for listener in listeners:
        assert listener.ended
        assert (listener.outputs[-1].finish_reason, listener.outputs[-1].error) == ("error", "the engine is closed")
    assert [rows.requests[i]["status"] for i in range(4)] == ["unfinished"] * 4
    assert [row["output_tokens"] for row in rows.requests.values()] == [len(li.token_ids) for li in listeners]
    with pytest.raises(EngineDead, match="the engine is closed"):
        engine.submit([1], greedy(1), Listener())


def test_a_plan_is_not_held_back_beyond_the_end_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    never = time.monotonic_ns() + 10**15
    held: list[int] = []
    monkeypatch.setattr(ModelRunner, "expected_end", lambda self, launched: held.append(launched.step.index) or never)
    with serve(tiny(), lag=1, plan_lead_ns=1_000) as engine:
        (done,), (more,) = engine.generate(some_prompts(2), greedy(5))
    assert held
    assert len(done.token_ids) == len(more.token_ids) == 5


def test_closing_an_engine_that_never_served_returns() -> None:
    engine = serve(tiny())
    wait_until_it_is(lambda: engine._stats.host_ns["plan"] > 0)  # it has planned nothing, and sleeps
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert engine.dead
    assert not engine._thread.is_alive()


def test_a_closed_engine_has_given_its_kv_cache_back() -> None:
    gc.disable()  # the memory is wanted at once, by the next engine
    try:
        with serve(tiny()) as engine:
            engine.generate([[1, 2, 3]], greedy(3))
            cache = weakref.ref(engine._runner.kv_cache)
            assert cache() is not None
        assert cache() is None
    finally:
        gc.enable()


def test_closing_from_inside_on_output_does_not_deadlock() -> None:
    engine = serve(tiny())
    listener = Listener()

    def listen(output: Output) -> None:
        listener(output)
        engine.close()

    engine.submit([1, 2, 3], greedy(900), listen)
    assert listener.last().error == "the engine is closed"
    engine.close()


def test_generating_inside_on_output_is_an_error_of_that_listener_alone(caplog: pytest.LogCaptureFixture) -> None:
    with serve(tiny()) as engine:

        def listen(output: Output) -> None:
            engine.generate([[1]], greedy(1))

        engine.submit([1, 2, 3], greedy(900), listen)
        wait_until_it_is(lambda: "would wait for itself" in caplog.text)
        assert tokens_of(engine.generate([[1]], greedy(2)))


@pytest.mark.parametrize("lag", [0, 1])
def test_a_listener_that_raises_loses_its_request_and_nobody_elses(caplog: pytest.LogCaptureFixture, lag: int) -> None:
    prompts = some_prompts(4)
    with serve(tiny(), prefix_caching=False) as engine:
        expected = tokens_of(engine.generate(prompts, greedy(40)))
    calls: list[Output] = []

    def listen(output: Output) -> None:
        calls.append(output)
        if len(calls) == 3:
            raise KeyError("a client's mistake")

    rows = Rows()
    with caplog.at_level(logging.ERROR), serve(tiny(), recorder=rows, lag=lag) as engine:
        engine.submit([4, 5, 6], greedy(900), listen)
        assert tokens_of(engine.generate(prompts, greedy(40))) == expected
        wait_until_it_is(lambda: all_free(engine))
    assert len(calls) == 3
    assert rows.requests[0]["status"] == "cancelled"
    assert "a client's mistake" in caplog.text
    assert "request 0" in caplog.text


class Lazy(Mixed):
    """Forgets to plan anything once two tokens have come, and to ask for another chance."""

    def __init__(self) -> None:
        super().__init__(Fcfs())

    def plan(self, view: View, now: int) -> Plan:
        if any(request.num_output_tokens >= 2 for request in view.running.values()):
            return Plan()
        return super().plan(view, now)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_policy_that_stalls_is_named_instead_of_hanging(lag: int) -> None:
    with serve(tiny(), Lazy(), lag=lag) as engine:
        done = engine.generate([[1, 2, 3]], greedy(30))[0][0]
        assert len(done.token_ids) == 2
        assert "PolicyStalled: Lazy planned nothing" in str(done.error)
        with pytest.raises(EngineDead) as caught:
            engine.raise_if_dead()
        assert isinstance(caught.value.__cause__, PolicyStalled)


class Faulty(Mixed):
    """Fails in one of the scheduler's methods, the third time it is called."""

    def __init__(self, method: str) -> None:
        super().__init__(Fcfs())
        self.method, self.left = method, 2

    def _count(self, method: str) -> None:
        self.left -= method == self.method
        if self.left < 0:
            raise ZeroDivisionError(f"in {method}")

    def add(self, request: Request, now: int) -> None:
        self._count("add")
        super().add(request, now)

    def plan(self, view: View, now: int) -> Plan:
        self._count("plan")
        return super().plan(view, now)

    def on_report(self, report: Any) -> None:
        self._count("on_report")
        super().on_report(report)


@pytest.mark.parametrize("method", ["add", "plan", "on_report"])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_policy_that_raises_ends_the_engine_and_is_quoted(method: str, lag: int) -> None:
    with serve(tiny(), Faulty(method), lag=lag) as engine:
        listeners = submit_together(engine, [[1, 2], [3, 4], [5, 6]], greedy(30))
        errors = {listener.last().error for listener in listeners}
    assert errors == {f"the engine has stopped: ZeroDivisionError: in {method}"}


class FullDisk(Rows):
    def step(self, row: tuple[object, ...]) -> None:
        if len(self.steps) == 4:
            raise OSError("no space left on device")
        super().step(row)

    def request(self, row: tuple[object, ...]) -> None:
        raise OSError("no space left on device")


def test_a_recorder_that_fails_ends_the_engine_and_everybody_is_told() -> None:
    with serve(tiny(), recorder=FullDisk()) as engine:
        for listener in submit_together(engine, some_prompts(3), greedy(30)):
            assert "no space left on device" in str(listener.last().error)
