"""How requests end before their time: cancelled, refused, dropped, and nobody hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import pytest

from policies.contract import View
from policies.control_plane import RequestRefused
from policies.plan import Plan
from policies.queues.fcfs import Fcfs
from policies.schedulers.mixed import Mixed
from runtime.engine import Engine
from runtime.sequence import Output
from runtime.weights import LoadedModel
from tests.runtime.ending import all_free, some_prompts, wait_until_it_is
from tests.runtime.engines import Listener, Rows, greedy, serve, submit_together, tiny, tokens_of
from tests.runtime.test_engine_tokens import PauseAndResume

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


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
    prompts = some_prompts(6)
    with serve(tiny(), prefix_caching=False) as engine:
        expected = tokens_of(engine.generate(prompts, greedy(30)))
    rows = CancelOnDecision(situation.kind, situation.skip)
    with serve(tiny(), situation.scheduler(), recorder=rows, lag=lag, **situation.limits) as engine:
        rows.engine = engine
        listeners = submit_together(engine, prompts, greedy(30))
        lasts = [listener.last() for listener in listeners]
        wait_until_it_is(lambda: all_free(engine))
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


def test_the_blocks_are_back_when_the_client_hears_of_the_cancellation() -> None:
    free: list[bool] = []
    with serve(tiny()) as engine:

        def listen(output: Output) -> None:
            if output.finish_reason is not None:
                free.append(all_free(engine))
            elif output.token_ids:
                engine.cancel(output.request_id)

            ended(output)

        ended = Listener()
        engine.submit(some_prompts(1)[0], greedy(500), listen)
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
        wait_until_it_is(lambda: all_free(engine))
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
        wait_until_it_is(lambda: all_free(engine))
    assert rows.requests[0]["status"] == "cancelled"


# Requests that cannot be served


@pytest.mark.parametrize("lag", [0, 1])
def test_impossible_requests_get_one_clear_line_and_the_others_their_tokens(lag: int) -> None:
    good = some_prompts(2)
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
    prompts = some_prompts(3)
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
        wait_until_it_is(lambda: all_free(engine))
