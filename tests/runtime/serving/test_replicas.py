"""The coordinator over pretended engines: what goes wrong at once, half-way, or in somebody else's router."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from policies import registry
from policies.contract import Replica, Route
from policies.replica_state import Limits
from policies.request import Request
from runtime.engine_stats import EngineStats
from runtime.sampling.params import SamplingParams
from runtime.sequence import Details
from runtime.serving import admin, errors
from runtime.serving.coordinator import Coordinator, ServedReplica
from runtime.serving.engine_client import CommandFailed, EngineGone, EngineStartError, Prompt, Sink
from runtime.serving.engine_proxy import EngineProxy
from runtime.serving.messages import EngineInfo, TokenOutput
from runtime.serving.service import EdgeLimits, Service

INFO = EngineInfo("m", 100, Limits(num_blocks=64), {}, {}, "cpu", "float32", 1, None)


class Engine(EngineProxy):
    """Takes prompts and commands, and does nothing. `breaks`: what it raises, by the command's name, and
    `hand_in_N` for prompts with N continuations."""

    def __init__(self, breaks: dict[str, Exception] | None = None) -> None:
        self.stats = EngineStats()
        self.breaks = breaks or {}
        self._sinks: dict[int, Sink] = {}
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self.cancelled: list[int] = []
        self.num_closed = 0
        self._info = INFO
        self._error: str | None = None
        self._next = 0

    @property
    def num_queued(self) -> tuple[int, int]:
        return 0, 0

    def hand_in(self, prompt: Prompt, sink: Sink) -> int:
        if f"hand_in_{prompt.params.n}" in self.breaks:
            raise self.breaks[f"hand_in_{prompt.params.n}"]
        first, self._next = self._next, self._next + prompt.params.n
        self._sinks.update(dict.fromkeys(range(first, self._next), sink))
        return first

    def cancel_requests(self, request_ids: Sequence[int]) -> None:
        self.cancelled += request_ids
        for request_id in request_ids:
            self._sinks.pop(request_id, None)

    def end(self, request_id: int) -> None:
        self._sinks.pop(request_id).put(0.0, TokenOutput(request_id, (1,), finish_reason="length"))

    def die(self) -> None:
        self._error = "it has died"
        sinks, self._sinks = dict.fromkeys(self._sinks.values()), {}
        for sink in sinks:
            sink.fail(EngineGone(self._error))

    async def command(self, name: str, arguments: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        if name in self.breaks:
            raise self.breaks[name]
        self.commands.append((name, arguments))
        return {"before_step": 0}

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.num_closed += 1
        self._error = self._error or "closed"


class Engines(list[Engine]):
    """Starts them, slowly, and keeps all that it has started. `breaks`: of those to come."""

    breaks: dict[str, Exception]

    def __init__(self) -> None:
        super().__init__()
        self.breaks = {}
        self.gate = asyncio.Event()
        self.gate.set()

    async def start(self, number: int) -> EngineProxy:
        await asyncio.sleep(0)
        await self.gate.wait()
        self.append(Engine(self.breaks))
        return self[-1]


class First:
    """Routes to the first, or to `named`; counts. `breaks`: the names of methods that raise."""

    def __init__(self, *breaks: str) -> None:
        self.breaks = breaks
        self.named: int | None = None
        self.routed: list[int] = []
        self.ended: list[int] = []

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        if "route" in self.breaks:
            raise ZeroDivisionError("nobody there")
        self.routed.append(request.id)
        return Route(replicas[0].id if self.named is None else self.named)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self.ended.append(request.id)
        if "on_end" in self.breaks:
            raise ZeroDivisionError("who was that?")


def _prompt(n: int = 1) -> Prompt:
    return Prompt([1, 2, 3], SamplingParams(max_tokens=4, n=n), Details())


async def _made(router: First | None = None, num_replicas: int = 2) -> tuple[Coordinator, Engines]:
    engines = Engines()
    return await Coordinator.start(num_replicas, router or First(), "first", engines.start), engines


def _ids(coordinator: Coordinator) -> list[int]:
    return [view.id for view in coordinator.engines]


def test_two_restarts_of_a_replica_at_once_leave_one_engine() -> None:
    async def main() -> None:
        coordinator, engines = await _made()
        await asyncio.gather(coordinator.restart(1), coordinator.restart(1))
        assert len(engines) == 3
        assert [engine.num_closed for engine in engines] == [0, 1, 0]
        assert _ids(coordinator) == [0, 1]
        assert {view.state for view in coordinator.engines} == {"serving"}
        await coordinator.restart(1)  # asked for later, it is done
        assert [engine.num_closed for engine in engines] == [0, 1, 1, 0]

    asyncio.run(main())


def test_joins_at_once_get_numbers_of_their_own() -> None:
    async def main() -> None:
        coordinator, _ = await _made()
        assert await asyncio.gather(coordinator.join(), coordinator.join(), coordinator.restart(0)) == [2, 3, None]
        assert _ids(coordinator) == [0, 1, 2, 3]

    asyncio.run(main())


def test_an_engine_that_starts_while_the_server_ends_is_closed() -> None:
    async def main() -> None:
        coordinator, engines = await _made()
        engines.gate.clear()
        joining = asyncio.create_task(coordinator.join())
        await asyncio.sleep(0.01)
        await coordinator.close()
        engines.gate.set()
        with pytest.raises(EngineStartError, match="shutting down"):
            await joining
        assert [engine.num_closed for engine in engines] == [1, 1, 1]

    asyncio.run(main())


def test_a_new_engine_has_the_swapped_policies_and_the_pause_before_it_is_routed_to() -> None:
    async def main() -> None:
        coordinator, engines = await _made()
        await coordinator.command("change_policies", {"scheduler": "static", "queue": "priority"})
        await coordinator.command("hold", {})
        engines.gate.clear()
        joining = asyncio.create_task(coordinator.join())
        await asyncio.sleep(0.01)
        await coordinator.command("change_policies", {"scheduler": "mixed"})  # while it is being started
        engines.gate.set()
        await joining
        expected = [("change_policies", {"scheduler": "mixed", "queue": "priority"}), ("hold", {})]
        assert engines[2].commands == expected
        await coordinator.restart(0)
        assert engines[3].commands == expected
        await coordinator.command("release", {})
        await coordinator.restart(1)
        assert engines[4].commands == expected[:1]

    asyncio.run(main())


def test_a_new_engine_that_refuses_the_policies_is_closed_and_not_routed_to() -> None:
    async def main() -> None:
        coordinator, engines = await _made()
        await coordinator.command("change_policies", {"scheduler": "static"})
        engines.breaks = {"change_policies": CommandFailed("no such scheduler")}
        with pytest.raises(EngineStartError, match="no such scheduler"):
            await coordinator.join()
        assert engines[2].num_closed == 1
        assert _ids(coordinator) == [0, 1]

    asyncio.run(main())


def test_a_command_that_some_replicas_do_not_do_says_which() -> None:
    async def main() -> None:
        coordinator, engines = await _made()
        engines[0].breaks = {"change_policies": EngineGone("it has died")}
        answer = await coordinator.command("change_policies", {"scheduler": "static"})
        assert answer == {
            "replicas": [{"replica": 1, "before_step": 0}],
            "failed": [{"replica": 0, "error": "it has died"}],
        }
        await coordinator.restart(0)
        assert engines[2].commands == [("change_policies", {"scheduler": "static"})]
        refusal = CommandFailed("no")
        engines[1].breaks = {"change_policies": refusal}
        engines[2].breaks = {"change_policies": EngineGone("it has died")}
        with pytest.raises(CommandFailed):
            await coordinator.command("change_policies", {"scheduler": "mixed"})
        await coordinator.restart(0)
        # What nobody did is not remembered.
        assert engines[3].commands == [("change_policies", {"scheduler": "static"})]

    asyncio.run(main())


def test_a_request_that_cannot_be_sent_leaves_nothing_behind() -> None:
    async def main() -> None:
        router = First()
        coordinator, engines = await _made(router)
        other = coordinator.submit([_prompt()])
        engines[0].breaks = {"hand_in_5": OverflowError("int too big")}
        with pytest.raises(OverflowError):
            coordinator.submit([_prompt(2), _prompt(5)])
        assert coordinator.num_live == 1
        assert engines[0].cancelled == [1, 2]  # those of the first prompt, and not the other call's
        assert router.ended == [3, 1]
        engines[0].end(0)
        assert [output.request_id for _, output in await other.next()] == [0]
        assert sorted(router.ended) == sorted(router.routed) == [0, 1, 3]

    asyncio.run(main())


def test_a_router_that_raises_refuses_the_request() -> None:
    async def main() -> None:
        coordinator, _ = await _made(First("route"))
        with pytest.raises(EngineGone, match="router has failed on the request: ZeroDivisionError: nobody there"):
            coordinator.submit([_prompt()])
        assert coordinator.num_live == 0

    asyncio.run(main())


def test_when_a_replica_dies_every_request_hears_of_it_whatever_the_router_or_the_next_replica_does() -> None:
    async def main() -> None:
        for bad_router in (True, False):
            router = First()
            coordinator, engines = await _made(router)
            calls = [coordinator.submit([_prompt()]) for _ in range(3)]
            if bad_router:
                router.breaks = ("route", "on_end")
            else:
                engines[1].breaks = {"hand_in_1": OverflowError("int too big")}
            engines[0].die()
            for call in calls:
                with pytest.raises(EngineGone, match=r"int too big|router has failed"):
                    await asyncio.wait_for(call.next(), 5)
            assert coordinator.num_live == 0
            assert len(router.ended) == len(router.routed) == (3 if bad_router else 6)

    asyncio.run(main())


def test_who_finds_every_replica_drained_is_told_when_to_come_back() -> None:
    async def main() -> None:
        coordinator, engines = await _made()
        waiting = coordinator.submit([_prompt()])
        coordinator.set_draining(1, True)
        engines[0].die()  # the prompt has nowhere to go
        for refused in (waiting.next(), _submitted(coordinator)):
            with pytest.raises(EngineGone, match="every replica is being drained") as gone:
                await refused
            assert gone.value.retry_after == 5
        engines[1].die()
        with pytest.raises(EngineGone, match="every replica is dead") as gone:
            coordinator.submit([_prompt()])
        assert gone.value.retry_after is None

    async def _submitted(coordinator: Coordinator) -> None:
        coordinator.submit([_prompt()])

    asyncio.run(main())


def test_a_router_that_raises_at_the_end_of_a_request_harms_nobody() -> None:
    async def main() -> None:
        router = First("on_end")
        coordinator, engines = await _made(router)
        call = coordinator.submit([_prompt()])
        engines[0].end(0)  # the proxy would declare the engine dead if this raised
        assert len(await call.next()) == 1
        coordinator.cancel(coordinator.submit([_prompt()]))
        assert coordinator.num_live == 0
        assert router.ended == router.routed == [0, 1]

    asyncio.run(main())


def test_a_router_that_names_a_replica_which_takes_nothing_hears_of_the_end() -> None:
    async def main() -> None:
        router = First()
        router.named = 7
        coordinator, _ = await _made(router)
        with pytest.raises(EngineGone, match="named replica 7, which takes no requests"):
            coordinator.submit([_prompt()])
        assert router.ended == router.routed == [0]

    asyncio.run(main())


MOVING = [name for name in registry.names("router") if registry.moves_kv(registry.find("router", name))]


def test_a_router_that_cannot_be_made_is_the_operators_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = "    def route(self, *a): ...\n    def on_end(self, *a): ...\n"
    bad = f"class Bad:\n{methods}    def __init__(self): raise RuntimeError('not today')\n"
    (tmp_path / "bad_router.py").write_text(bad, encoding="utf-8")
    (tmp_path / "leaving_router.py").write_text("import sys\nsys.exit(3)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    async def main() -> None:
        coordinator, engines = await _made()
        service = Service(coordinator, None, "m", EdgeLimits())  # type: ignore[arg-type]
        app = FastAPI()
        app.include_router(admin.router(service))
        errors.install(app)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            bad = [("bad_router:Bad", "not today"), ("leaving_router:Bad", "SystemExit")]
            for name, reason in bad + [(name, "moves KV between replicas") for name in MOVING]:
                answer = await http.post("/admin/policies", json={"router": name, "scheduler": "static"})
                assert answer.status_code == 400
                assert reason in answer.json()["error"]["message"]
        assert coordinator.router_name == "first"
        assert engines[0].commands == []

    asyncio.run(main())
    sys.modules.pop("bad_router", None)


def test_a_replica_forgets_the_end_of_an_old_prompt_before_its_beginning() -> None:
    replica = ServedReplica(3, Engine())
    old, new = ([f"{name}{k}".encode() for k in range(40)] for name in ("old", "new"))
    replica.sent(old)
    replica.sent(new)
    assert (replica.match(new), replica.match(old)) == (40, 24)  # 64 blocks in all
    assert replica.num_blocks == replica.num_free_blocks == 64
    assert replica.num_prefill_tokens == replica.num_outstanding_tokens == 0
