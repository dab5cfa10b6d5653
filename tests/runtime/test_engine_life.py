"""How requests and the engine itself end: cancelled, refused, dropped, closed, or by an error, and nobody hangs."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import re
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.contract import View
from policies.control_plane import PolicyStalled, RequestRefused
from policies.plan import Plan
from policies.queues.fcfs import Fcfs
from policies.request import Request, Slo
from policies.schedulers.mixed import Mixed
from runtime.engine import Details, Engine, EngineDead
from runtime.model_runner import ModelRunner
from runtime.sampling.params import SamplingParams
from runtime.sequence import Output
from runtime.weights import LoadedModel
from tests.runtime.engines import PATIENCE, Listener, Rows, greedy, serve, submit_together, tiny, tokens_of
from tests.runtime.test_engine_tokens import PauseAndResume


def _prompts(count: int, seed: int = 7, low: int = 2, high: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(512) for _ in range(rng.randint(low, high))] for _ in range(count)]


def _all_free(engine: Engine) -> bool:
    return engine._plane.view.num_free_blocks == engine.limits.num_blocks


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name == "engine" or name.startswith("model-runner")]


# Cancelling


class CancelOnDecision(Rows):
    """Cancels the request of the first decision of a kind (its `skip`-th) as soon as it is taken."""

    engine: Engine

    def __init__(self, kind: str, skip: int = 0) -> None:
        super().__init__()
        self.kind, self.skip = kind, skip
        self.victim: int | None = None
        self.step_of_decision = -1

    def decision(self, row: tuple[object, ...]) -> None:
        super().decision(row)
        last = self.decisions[-1]
        if last["kind"] == self.kind and self.victim is None:
            self.skip -= 1
            if self.skip < 0:
                self.victim, self.step_of_decision = last["request_id"], last["step"]
                self.engine.cancel(last["request_id"])


@dataclass
class Situation:
    """`limits` under which a decision of `kind` finds a request in some state."""

    kind: str
    limits: dict[str, Any]
    skip: int = 0
    scheduler: Callable[[], Any] = lambda: "mixed"


SITUATIONS = {
    "waiting in the queue": Situation("blocked", {"max_num_seqs": 2}),
    "prefilling in chunks": Situation("chunk", {"max_num_batched_tokens": 7}, skip=4),
    "just admitted": Situation("admit", {}, skip=2),
    "decoding with the group": Situation("join", {}, skip=1),
    "about to reach its cap": Situation("capped", {}, skip=1),
    "preempted": Situation("preempt", {"num_blocks": 32, "block_size": 4}),
    "paused with its blocks kept": Situation("preempt", {}, scheduler=lambda: PauseAndResume(6, False)),
    "resumed": Situation("resume", {}, scheduler=lambda: PauseAndResume(6, True)),
}


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS.keys())
def test_a_cancelled_request_is_gone_before_the_next_step_and_nobody_else_notices(
    situation: Situation, lag: int
) -> None:
    prompts = _prompts(6)
    with serve(tiny(), prefix_caching=False) as engine:
        expected = tokens_of(engine.generate(prompts, greedy(30)))
    rows = CancelOnDecision(situation.kind, situation.skip)
    with serve(tiny(), situation.scheduler(), recorder=rows, lag=lag, **situation.limits) as engine:
        rows.engine = engine
        listeners = submit_together(engine, prompts, greedy(30))
        lasts = [listener.last() for listener in listeners]
        _wait_until(lambda: _all_free(engine))
    assert rows.victim is not None
    for i, (listener, last, tokens) in enumerate(zip(listeners, lasts, expected, strict=True)):
        if i != rows.victim:
            assert listener.token_ids == tokens
            continue
        assert listener.token_ids == tokens[: len(listener.token_ids)]
        row = rows.requests[i]
        if last.finish_reason == "length":  # lag 0: the step that was planned with it gave it its last token
            assert (situation.kind, lag) == ("capped", 0)
            continue
        assert (last.finish_reason, last.error) == ("cancelled", None)
        assert (row["status"], row["output_tokens"]) == ("cancelled", len(listener.token_ids))
        assert row["end_before_step"] == rows.step_of_decision + 1
        later = [d for d in rows.decisions if d["request_id"] == i and d["step"] > rows.step_of_decision]
        assert {d["kind"] for d in later} <= {"leave"}


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.002)


def test_the_blocks_are_back_when_the_client_hears_of_the_cancellation() -> None:
    free: list[bool] = []
    with serve(tiny()) as engine:

        def listen(output: Output) -> None:
            if output.finish_reason is not None:
                free.append(_all_free(engine))
            elif output.token_ids:
                engine.cancel(output.request_id)

            ended(output)

        ended = Listener()
        engine.submit(_prompts(1)[0], greedy(500), listen)
        assert ended.last().finish_reason == "cancelled"
    assert free == [True]


def test_a_request_cancelled_before_the_engine_has_seen_it_ends_at_once() -> None:
    with serve(tiny()) as engine:
        listener = Listener()
        with engine._inbox:  # nothing is delivered meanwhile
            request_id = engine.submit([1, 2, 3], greedy(100), listener)
            engine.cancel(request_id)
        assert listener.last().finish_reason == "cancelled"
        assert listener.token_ids == ()


def test_cancelling_twice_or_an_unknown_or_an_ended_request_does_nothing() -> None:
    with serve(tiny()) as engine:
        listener, other = Listener(), Listener()
        request_id = engine.submit([1, 2, 3], greedy(400), listener)
        listener.wait_for_tokens(2)
        for victim in (request_id, request_id, 12345, -1):
            engine.cancel(victim)
        assert listener.last().finish_reason == "cancelled"
        engine.cancel(engine.submit([1, 2, 3], greedy(1), other))
        other.last()
        engine.cancel(request_id)
        assert tokens_of(engine.generate([[5, 6]], greedy(3)))
        assert sum(output.finish_reason is not None for output in listener.outputs) == 1


def test_text_held_back_for_a_stop_string_comes_out_when_the_request_is_cancelled(smollm2: LoadedModel) -> None:
    assert smollm2.tokenizer is not None
    with serve(tiny(smollm2.tokenizer), max_num_seqs=4) as engine:
        free = engine.generate([[9, 8, 7]], greedy(200))[0][0].text
        listener = Listener()
        engine.submit([9, 8, 7], greedy(200, stop=(free + "!",)), listener)
        listener.wait_for_tokens(20)
        engine.cancel(listener.outputs[0].request_id)
        assert listener.last().finish_reason == "cancelled"
    assert all(output.text == "" for output in listener.outputs[:-1])
    assert listener.text == smollm2.tokenizer.decode(listener.token_ids)


def test_leaving_a_stream_early_cancels_its_request() -> None:
    rows = Rows()

    async def leave(engine: Engine) -> None:
        async with aclosing(engine.stream([1, 2, 3], greedy(900))) as outputs:
            async for output in outputs:
                if output.token_ids:
                    break

    with serve(tiny(), recorder=rows) as engine:
        asyncio.run(leave(engine))
        _wait_until(lambda: _all_free(engine))
    assert rows.requests[0]["status"] == "cancelled"
    assert rows.requests[0]["output_tokens"] < 900


def test_a_cancelled_task_cancels_its_stream() -> None:
    async def drop_task(engine: Engine) -> None:
        async def read() -> None:
            async for _ in engine.stream([1, 2, 3], greedy(900)):
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    rows = Rows()
    with serve(tiny(), recorder=rows) as engine:
        asyncio.run(drop_task(engine))
        _wait_until(lambda: _all_free(engine))
    assert rows.requests[0]["status"] == "cancelled"


# Requests that cannot be served


@pytest.mark.parametrize("lag", [0, 1])
def test_impossible_requests_get_one_clear_line_and_the_others_their_tokens(lag: int) -> None:
    good = _prompts(2)
    with serve(tiny(), prefix_caching=False) as engine:
        expected = tokens_of(engine.generate(good, greedy(10)))
    prompts = [good[0], [5] * 100, [], [5] * 60, good[1]]
    params = [greedy(10), greedy(10), greedy(10), greedy(30), greedy(10)]
    rows = Rows()
    with serve(tiny(), recorder=rows, lag=lag, max_model_len=100, num_blocks=5) as engine:
        results = [completion for (completion,) in engine.generate(prompts, params)]
    assert [results[0].token_ids, results[4].token_ids] == expected
    long, empty, large = results[1:4]
    assert "100 tokens" in str(long.error)
    assert "empty" in str(empty.error)
    assert "6 KV blocks" in str(large.error)
    assert "has 5" in str(large.error)
    for refused in (long, empty, large):
        assert (refused.finish_reason, refused.token_ids) == ("error", ())
        assert "\n" not in str(refused.error)
    assert [rows.requests[i]["status"] for i in range(5)] == ["length", "refused", "refused", "refused", "length"]


def test_a_stream_that_can_never_be_served_raises() -> None:
    async def read(engine: Engine) -> None:
        async for _ in engine.stream([], greedy(5)):
            pytest.fail("it was served")

    with serve(tiny()) as engine:
        with pytest.raises(RequestRefused, match="the prompt is empty"):
            asyncio.run(read(engine))
        assert tokens_of(engine.generate([[1]], greedy(2)))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([512], "512 is outside"), ([-1], "-1 is outside"), ([1.5], "list of token ids"), (7, "list of token ids")],
)
def test_a_prompt_that_is_none_is_refused_on_the_spot(prompt: Any, message: str) -> None:
    with serve(tiny()) as engine:
        with pytest.raises(ValueError, match=message):
            engine.generate([[1, 2], prompt], greedy(3))
        assert tokens_of(engine.generate([[1, 2]], greedy(3)))


def test_what_a_model_without_a_tokenizer_cannot_do_is_refused() -> None:
    with serve(tiny()) as engine:
        for prompt, params in (("text", greedy(3)), ([1], greedy(3, stop=("x",)))):
            with pytest.raises(ValueError, match="has no tokenizer"):
                engine.submit(prompt, params, Listener())
        with pytest.raises(ValueError, match="one text"):
            engine.generate("text", greedy(3))
        with pytest.raises(ValueError, match="2 sampling parameters"):
            engine.generate([[1]], [greedy(3)] * 2)


def test_a_model_length_beyond_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond the model's 1024"):
        serve(tiny(), max_model_len=1025)


class DropAfter(Mixed):
    """Drops every running request in its n-th plan with three of them."""

    def __init__(self, plans: int) -> None:
        super().__init__(Fcfs())
        self.plans = plans

    def plan(self, view: View, now: int) -> Plan:
        self.plans -= len(view.running) == 3
        if self.plans == 0 and view.running:
            return Plan(drop=[(request, "too late") for request in view.running.values()])
        return super().plan(view, now)


@pytest.mark.parametrize("plans", [1, 2, 9])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_dropped_request_is_told_why_and_keeps_what_it_had(plans: int, lag: int) -> None:
    prompts = _prompts(3)
    with serve(tiny(), prefix_caching=False) as engine:
        expected = tokens_of(engine.generate(prompts, greedy(20)))
    with serve(tiny(), DropAfter(plans), lag=lag) as engine:
        listeners = submit_together(engine, prompts, greedy(20))
        for listener, tokens in zip(listeners, expected, strict=True):
            last = listener.last()
            assert (last.finish_reason, last.error) == ("dropped", "too late")
            assert listener.token_ids == tokens[: len(listener.token_ids)]
            assert len(listener.token_ids) < 20
        assert tokens_of(engine.generate(prompts, greedy(20))) == expected
        _wait_until(lambda: _all_free(engine))


# The end of the engine


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("after", [0, 1, 12])
def test_a_failing_model_ends_every_request_with_its_error(
    monkeypatch: pytest.MonkeyPatch, lag: int, after: int
) -> None:
    loaded = tiny()
    forward, left = loaded.model.forward, [after]

    def fail(inputs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise ArithmeticError("the card is on fire")
        return forward(inputs)

    monkeypatch.setattr(loaded.model, "forward", fail)
    rows = Rows()
    engine = serve(loaded, recorder=rows, lag=lag, max_num_seqs=2)
    cache = weakref.ref(engine._runner.kv_cache)
    for listener in submit_together(engine, _prompts(5), greedy(40)):
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
    for listener in submit_together(engine, _prompts(3), greedy(4)):
        assert listener.last().error == "the engine has stopped: ArithmeticError: the card is on fire"
    engine.close()


def test_a_stream_learns_that_the_engine_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny()
    forward, left = loaded.model.forward, [5]

    def fail(inputs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise ArithmeticError("the card is on fire")
        return forward(inputs)

    monkeypatch.setattr(loaded.model, "forward", fail)
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
    listeners = submit_together(engine, _prompts(4), greedy(900))
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
        (done,), (more,) = engine.generate(_prompts(2), greedy(5))
    assert held
    assert len(done.token_ids) == len(more.token_ids) == 5


def test_closing_an_engine_that_never_served_returns() -> None:
    serve(tiny()).close()


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
        _wait_until(lambda: "would wait for itself" in caplog.text)
        assert tokens_of(engine.generate([[1]], greedy(2)))


@pytest.mark.parametrize("lag", [0, 1])
def test_a_listener_that_raises_loses_its_request_and_nobody_elses(caplog: pytest.LogCaptureFixture, lag: int) -> None:
    prompts = _prompts(4)
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
        _wait_until(lambda: _all_free(engine))
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
        for listener in submit_together(engine, _prompts(3), greedy(30)):
            assert "no space left on device" in str(listener.last().error)


# Anything, in any order

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
        _wait_until(lambda: _all_free(engine))
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
            for prompt in _prompts(6, seed):
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
        _wait_until(lambda: _all_free(engine))
    assert len(rows.requests) == 36
    assert {row["status"] for row in rows.requests.values()} == {"length", "cancelled"} | (
        {"stop"} & {row["status"] for row in rows.requests.values()}
    )
