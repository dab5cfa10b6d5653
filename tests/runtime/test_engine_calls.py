"""What a server needs of the engine: ids of its own, ends found in the text, calls between steps, one flush a step."""

from __future__ import annotations

import threading

import pytest

from policies.control_plane import ControlPlane
from policies.stack import StackSpec
from runtime.engine import Engine, EngineDead
from runtime.engine_stats import HOST_PARTS
from tests.runtime.engines import PATIENCE, Listener, Rows, greedy, serve, tiny


def test_ids_may_be_given_and_must_ascend() -> None:
    rows = Rows()
    with serve(tiny(), recorder=rows) as engine:
        first, second, third = Listener(), Listener(), Listener()
        assert engine.submit([1, 2], greedy(2), first, request_id=7) == 7
        assert engine.submit([1, 2], greedy(2), second) == 8
        for taken in (8, 0):
            with pytest.raises(ValueError, match=f"request id {taken} is not above the last one, 8"):
                engine.submit([1, 2], greedy(2), third, request_id=taken)
        assert first.last().request_id == 7
        second.last()
    assert sorted(rows.requests) == [7, 8]


def test_a_stop_found_in_the_text_ends_a_request_without_another_output() -> None:
    rows = Rows()
    with serve(tiny(), recorder=rows) as engine:
        listener, other = Listener(), Listener()
        request_id = engine.submit([1, 2, 3], greedy(900), listener)
        listener.wait_for_tokens(5)
        engine.stop(request_id, 5)
        engine.stop(request_id, 5)  # it has ended: nothing happens
        engine.stop(99, 1)
        engine.submit([4, 5], greedy(3), other)
        other.last()
        assert engine.call(lambda plane, now: plane.num_free_blocks).result(PATIENCE) == engine.limits.num_blocks
    assert not listener.ended
    row = rows.requests[request_id]
    assert (row["status"], row["output_tokens"]) == ("stop", 5)
    assert row["end_before_step"] is not None
    assert len(listener.token_ids) < 900


def test_calls_run_on_the_engines_thread_between_steps_in_order() -> None:
    seen: list[tuple[str, int]] = []

    def look(plane: ControlPlane, now: int) -> int:
        seen.append((threading.current_thread().name, plane.next_step))
        return now

    def fail(plane: ControlPlane, now: int) -> None:
        raise LookupError("not there")

    with serve(tiny()) as engine:
        listener = Listener()
        engine.submit([1, 2, 3], greedy(50), listener)
        times = [engine.call(look).result(PATIENCE) for _ in range(5)]
        with pytest.raises(LookupError, match="not there"):
            engine.call(fail).result(PATIENCE)
        assert len(listener.last().token_ids) == 1  # which has not disturbed it
    assert times == sorted(times)
    assert {name for name, _ in seen} == {"engine"}
    assert [step for _, step in seen] == sorted(step for _, step in seen)
    with pytest.raises(EngineDead, match="the engine is closed"):
        engine.call(look).result(PATIENCE)


def test_all_outputs_of_a_step_come_before_its_one_flush() -> None:
    events: list[str] = []
    loaded, limits = tiny(), serve(tiny())
    limits.close()
    engine = Engine(loaded, limits.limits, StackSpec().build(), on_flush=lambda: events.append("flush"), check=True)
    with engine:
        listeners = [Listener() for _ in range(4)]
        with engine._inbox:
            for i, listener in enumerate(listeners):

                def hear(output: object, listener: Listener = listener) -> None:
                    events.append("output")
                    listener(output)  # type: ignore[arg-type]

                engine.submit([1 + i, 2, 3], greedy(6), hear)
        for listener in listeners:
            listener.last()
        stats = engine.call(lambda plane, now: engine.stats()).result(PATIENCE)
        assert stats.num_running == stats.num_waiting == 0
        assert stats.num_steps >= 6
        assert stats.num_computed_tokens >= 4 * (3 + 5)
        assert set(stats.host_ns) == set(HOST_PARTS)
        assert all(stats.host_ns[part] > 0 for part in ("plan", "launch", "take", "idle"))
    told = "".join("o" if event == "output" else "." for event in events)
    assert [len(group) for group in told.split(".") if group] == [4] * 6


def test_a_held_engine_sleeps_and_still_takes_cancellations() -> None:
    with serve(tiny()) as engine:
        engine.call(ControlPlane.hold).result(PATIENCE)
        listener, other = Listener(), Listener()
        request_id = engine.submit([1, 2, 3], greedy(4), listener)
        engine.submit([1, 2, 3], greedy(4), other)
        steps = [engine.call(lambda plane, now: plane.next_step).result(PATIENCE)]
        threading.Event().wait(0.2)
        steps.append(engine.call(lambda plane, now: plane.next_step).result(PATIENCE))
        assert steps[1] - steps[0] <= 2  # it does not spin
        engine.cancel(request_id)
        assert listener.last().finish_reason == "cancelled"
        assert not other.outputs
        engine.call(ControlPlane.release).result(PATIENCE)
        assert other.last().finish_reason == "length"
