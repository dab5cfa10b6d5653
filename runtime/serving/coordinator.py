"""Several engines behind one face: a router says which gets a request, and one that dies takes nobody with it silently.

A prompt whose replica dies before any of its tokens was handed on is given to another one; where tokens have gone out
already, its call ends with an error. The router is one of `policies.routers`, the very object of the simulator.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from policies.contract import CostModel, PoolRole, Router
from policies.prefix import block_keys
from policies.request import Request
from runtime.serving.engine_client import (
    Call,
    CommandFailed,
    EngineClient,
    EngineGone,
    EngineStartError,
    EngineView,
    Prompt,
)
from runtime.serving.engine_proxy import EngineProxy
from runtime.serving.messages import EngineInfo, TokenOutput

logger = logging.getLogger(__name__)

MAX_TRIES = 3
"""Replicas that a prompt is given to at most: what kills each of them may be the prompt."""

DRAINING_RETRY_SECONDS = 5
REFUSED_RETRY_SECONDS = 1
"""After which a client may try again."""

StartReplica = Callable[[int], Awaitable[EngineProxy]]
"""Starts the engine of the replica with this number."""


class ServedReplica:
    """One replica, as a router sees it (`policies.contract.Replica`).

    What this front has sent and not yet seen ended is counted here and is fresh; who runs, and the blocks, are as of
    the replica's last step. `match` knows the prompts that were sent here, as far back as the replica has blocks.
    """

    pool = ""
    role: PoolRole = "both"
    cost: CostModel | None = None

    def __init__(self, number: int, engine: EngineProxy) -> None:
        self.id = number
        self.engine = engine
        self.draining = False
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    @property
    def state(self) -> str:
        """`serving`, `draining` or `dead`."""
        if self.engine.error is not None:
            return "dead"
        return "draining" if self.draining else "serving"

    @property
    def max_num_seqs(self) -> int:
        return self.engine.info.limits.max_num_seqs

    @property
    def num_running(self) -> int:
        return min(self.engine.stats.num_running, self.engine.num_live)

    @property
    def num_waiting(self) -> int:
        return self.engine.num_live - self.num_running

    @property
    def num_prefill_tokens(self) -> int:
        return self.engine.num_queued[1]

    @property
    def num_outstanding_tokens(self) -> int:
        queued, tokens = self.engine.num_queued
        return tokens + self.engine.num_live - queued

    @property
    def num_blocks(self) -> int:
        return self.engine.info.limits.num_blocks

    @property
    def num_free_blocks(self) -> int:
        stats = self.engine.stats
        return stats.num_free_blocks if stats.num_steps else self.num_blocks

    def match(self, keys: Sequence[bytes]) -> int:
        for count, key in enumerate(keys):
            if key not in self._keys:
                return count
        return len(keys)

    def sent(self, keys: Sequence[bytes]) -> None:
        """A prompt with these blocks goes here. The first block is the last to be forgotten: without it the others
        match nothing."""
        for key in reversed(keys):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self.num_blocks:
            self._keys.popitem(last=False)

    def view(self) -> EngineView:
        return EngineView(self.id, self.engine.info, self.engine.stats, self.state, self.engine.error)


@dataclass(eq=False, slots=True)
class _Routed:
    """One prompt on its way: takes its replica's outputs, whose ids are the replica's, for the call, with ours."""

    coordinator: Coordinator
    call: Call
    prompt: Prompt
    request: Request
    keys: Sequence[bytes]
    replica: ServedReplica | None = None
    first_id: int = 0  # at the replica
    tries: int = 0
    begun: bool = False  # something has been handed on
    unfinished: set[int] = field(default_factory=set)  # continuations, by number

    def put(self, received_at: float, output: TokenOutput) -> None:
        k = output.request_id - self.first_id
        self.begun = True
        if output.finish_reason is not None:
            self.finished(k)
        self.call.put(received_at, msgspec.structs.replace(output, request_id=self.request.id + k))

    def fail(self, error: BaseException) -> None:
        self.coordinator.replica_failed(self, error)

    def finished(self, k: int) -> None:
        """A continuation has ended; with the last one the request has."""
        self.unfinished.discard(k)
        if not self.unfinished:
            self.coordinator.ended(self)


class Coordinator(EngineClient):
    """Replicas behind a router. Make it with `start`, end it with `close`."""

    def __init__(self, router: Router, router_name: str, start_replica: StartReplica) -> None:
        self.router_name = router_name
        self._router = router
        self._start_replica = start_replica
        self._replicas: list[ServedReplica] = []
        self._routed: dict[int, _Routed] = {}  # request id -> its prompt, while any of its continuations lives
        self._next_id = 0
        self._start = time.monotonic_ns()
        self._closed = False
        self._changing = asyncio.Lock()  # held while a replica is restarted or joins: one at a time
        self._commanding = asyncio.Lock()  # held while a command goes to all: none of them misses one
        self._changes: dict[str, Any] = {}  # role -> policy, of all changes so far; with `_held`, for engines to come
        self._held = False

    @classmethod
    async def start(
        cls, num_replicas: int, router: Router, router_name: str, start_replica: StartReplica
    ) -> Coordinator:
        """Start all replicas at once. Raises EngineStartError if one does not, and then none is left."""
        coordinator = cls(router, router_name, start_replica)
        starting = [asyncio.ensure_future(start_replica(number)) for number in range(num_replicas)]
        results = await asyncio.gather(*starting, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        engines = [result for result in results if isinstance(result, EngineProxy)]
        try:
            if failures:
                raise failures[0]
            for engine in engines:
                _check_alike(engine.info, engines[0].info)
        except BaseException:
            await asyncio.gather(*(engine.close() for engine in engines))
            raise
        coordinator._replicas = [ServedReplica(number, engine) for number, engine in enumerate(engines)]
        return coordinator

    # What the handlers see

    @property
    def info(self) -> EngineInfo:
        return self._replicas[0].engine.info

    @property
    def engines(self) -> Sequence[EngineView]:
        return [replica.view() for replica in self._replicas]

    @property
    def error(self) -> str | None:
        if any(replica.state != "dead" for replica in self._replicas):
            return None
        return f"every replica is dead; the last one: {self._replicas[-1].engine.error}"

    @property
    def num_queued(self) -> tuple[int, int]:
        queued = [replica.engine.num_queued for replica in self._replicas]
        return sum(q for q, _ in queued), sum(t for _, t in queued)

    @property
    def num_live(self) -> int:
        return sum(len(routed.unfinished) for routed in dict.fromkeys(self._routed.values()))

    def submit(self, prompts: Sequence[Prompt]) -> Call:
        call = Call()
        try:
            for prompt in prompts:
                first_id, n = self._next_id, prompt.params.n
                self._next_id += n
                routed = self._admit(first_id, prompt, call)
                call.request_ids += range(first_id, first_id + n)
                self._routed.update(dict.fromkeys(range(first_id, first_id + n), routed))
                self._send(routed)
        except BaseException:
            self.cancel(call)
            raise
        return call

    def cancel(self, call: Call) -> None:
        for routed in dict.fromkeys(self._routed[i] for i in call.request_ids if i in self._routed):
            if routed.replica is not None:
                routed.replica.engine.cancel_requests([routed.first_id + k for k in sorted(routed.unfinished)])
            routed.unfinished.clear()
            self.ended(routed)

    def stop(self, request_id: int, num_output_tokens: int) -> None:
        routed = self._routed.get(request_id)
        if routed is not None and routed.replica is not None:
            k = request_id - routed.request.id
            routed.replica.engine.stop(routed.first_id + k, num_output_tokens)
            routed.finished(k)

    def fail_all(self, reason: str) -> None:
        for routed in dict.fromkeys(self._routed.values()):
            self.cancel(routed.call)
            routed.call.fail(EngineGone(reason))

    async def command(self, name: str, arguments: dict[str, Any]) -> Any:
        """To every replica that lives: `replicas` are the answers of those that did it, `failed` says why others did
        not, each with its number. Raises only where none did it. A replica started later does what they did.
        """
        async with self._commanding:
            living = [replica for replica in self._replicas if replica.state != "dead"]
            if not living:
                raise EngineGone(self.error or "there is no replica")
            commands = (replica.engine.command(name, arguments) for replica in living)
            results = list(zip(living, await asyncio.gather(*commands, return_exceptions=True), strict=True))
            answers = [{"replica": replica.id, **r} for replica, r in results if not isinstance(r, BaseException)]
            errors = [(replica, r) for replica, r in results if isinstance(r, BaseException)]
            if not answers:
                raise next((error for _, error in errors if isinstance(error, CommandFailed)), errors[0][1])
            if name == "change_policies":
                self._changes.update(arguments)
            elif name in ("hold", "release"):
                self._held = name == "hold"
        return {"replicas": answers, "failed": [{"replica": r.id, "error": str(error)} for r, error in errors]}

    async def close(self) -> None:
        self._closed = True
        self.fail_all("the server is shutting down")
        await asyncio.gather(*(replica.engine.close() for replica in self._replicas))

    # What an operator does to the replicas

    def set_draining(self, number: int, draining: bool) -> None:
        """Route nothing more to a replica, or route to it again. Raises CommandFailed where there is none."""
        self._replica(number).draining = draining

    async def restart(self, number: int) -> None:
        """Put a fresh engine in the place of a replica's. What it has under way goes to others, or ends with an error
        where something was handed on already: drain it first to lose nothing.

        Raises CommandFailed where there is none, EngineStartError where the new one does not start.
        """
        replica = self._replica(number)
        async with self._changing:
            if replica not in self._replicas:
                return  # while this waited another call has put a fresh engine there
            replica.draining = True
            replica.engine.fail_all("the replica is restarted")
            await replica.engine.close()
            await self._start_one(number)

    async def join(self) -> int:
        """Start one more replica; its number. Raises EngineStartError."""
        async with self._changing:
            number = 1 + max(replica.id for replica in self._replicas)
            await self._start_one(number)
        return number

    async def _start_one(self, number: int) -> None:
        """Start an engine, have it do what the others were told to, and only then route to it."""
        engine = await self._start_replica(number)
        try:
            _check_alike(engine.info, self.info)
            async with self._commanding:
                if self._changes:
                    await engine.command("change_policies", dict(self._changes))
                if self._held:
                    await engine.command("hold", {})
                if self._closed:
                    raise EngineStartError("the server is shutting down")
                places = {replica.id: replica for replica in self._replicas}
                places[number] = ServedReplica(number, engine)
                self._replicas = list(places.values())
        except BaseException as error:
            await engine.close()
            if isinstance(error, CommandFailed | EngineGone):
                raise EngineStartError(f"the engine does not take on what the others do: {error}") from error
            raise

    def change_router(self, router: Router, name: str) -> None:
        """Let another router decide from the next request on. It hears of the end of what the old one has routed."""
        self._router, self.router_name = router, name

    def _replica(self, number: int) -> ServedReplica:
        for replica in self._replicas:
            if replica.id == number:
                return replica
        raise CommandFailed(f"there is no replica {number}; there are {', '.join(str(r.id) for r in self._replicas)}")

    # Routing

    def _now(self) -> int:
        return time.monotonic_ns() - self._start

    def _admit(self, request_id: int, prompt: Prompt, call: Call) -> _Routed:
        details = prompt.details
        request = Request(
            request_id,
            self._now(),
            len(prompt.token_ids),
            prompt.params.max_tokens or self.info.limits.max_total_tokens - len(prompt.token_ids),
            tenant=details.tenant,
            session=details.session,
            priority=details.priority,
            slo=details.slo,
        )
        limits = self.info.limits
        keys = block_keys(prompt.token_ids, limits.block_size) if limits.prefix_caching else []
        return _Routed(self, call, prompt, request, keys, unfinished=set(range(prompt.params.n)))

    def _send(self, routed: _Routed) -> None:
        """To the replica that the router names. Raises EngineGone where none takes requests, or the router refuses or
        fails; whatever it raises, the request is then nowhere."""
        able = [replica for replica in self._replicas if replica.state == "serving"]
        if not able:
            if self.error is not None:
                raise EngineGone(self.error)
            raise EngineGone("every replica is being drained", DRAINING_RETRY_SECONDS)
        try:
            route = self._router.route(routed.request, routed.keys, able, self._now())
            named = None if route is None else route.replica
        except Exception as error:
            logger.exception("the router %s has failed on a request", self.router_name)
            raise EngineGone(f"the router has failed on the request: {type(error).__name__}: {error}") from error
        if named is None:
            raise EngineGone("the router has refused the request", REFUSED_RETRY_SECONDS)
        replica = next((replica for replica in able if replica.id == named), None)
        if replica is None:
            self._tell_end(routed.request, named)
            raise EngineGone(f"the router named replica {named}, which takes no requests")
        try:
            routed.first_id = replica.engine.hand_in(routed.prompt, routed)
        except BaseException:
            self._tell_end(routed.request, named)
            raise
        routed.replica = replica
        routed.tries += 1
        replica.sent(routed.keys)

    def replica_failed(self, routed: _Routed, error: BaseException) -> None:
        """A prompt's replica is gone: try another if nothing was handed on, else end the call with the error."""
        if not routed.unfinished:
            return  # it has been cancelled meanwhile
        self._leave(routed)
        if not routed.begun and routed.tries < MAX_TRIES and not self._closed:
            try:
                self._send(routed)
                return
            except EngineGone as gone:
                error = gone
            except Exception as failure:  # the replica's other requests are still to be told
                logger.exception("a request could not be given to another replica")
                error = EngineGone(f"the request could not be given to another replica: {failure}")
        self.ended(routed)
        self.cancel(routed.call)  # the call's other prompts
        routed.call.fail(error)

    def ended(self, routed: _Routed) -> None:
        """No continuation of this prompt lives any more."""
        for request_id in range(routed.request.id, routed.request.id + routed.prompt.params.n):
            self._routed.pop(request_id, None)
        self._leave(routed)

    def _leave(self, routed: _Routed) -> None:
        """Its replica, if it has one, has this prompt no more."""
        replica, routed.replica = routed.replica, None
        if replica is not None:
            self._tell_end(routed.request, replica.id)

    def _tell_end(self, request: Request, number: int) -> None:
        """Once for every route that the router gave. What it raises is its own affair."""
        try:
            self._router.on_end(request, number, self._now())
        except Exception:
            logger.exception("the router %s has failed at the end of a request", self.router_name)


def _check_alike(one: EngineInfo, other: EngineInfo) -> None:
    """Raises EngineStartError where two engines do not serve the same: only one of them could be a replica."""
    for what in ("model", "vocab_size"):
        a, b = getattr(one, what), getattr(other, what)
        if a != b:
            raise EngineStartError(f"replicas serve the same model, and these differ in {what}: {a} and {b}")
