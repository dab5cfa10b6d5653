"""One replica's brain, used whole by both panels: `submit`, `cancel`, `plan(now)`, `report(report)`.

Both panels do nothing but call these four, in the order that `policies.loop` fixes, and carry out what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from policies.contract import CostModel, Recorder, View
from policies.enactment import Enactment
from policies.plan import FOREVER, Plan, Report, Step
from policies.replica_state import Limits, ReplicaState
from policies.request import Request, Slo, State
from policies.stack import PolicyStack


class RequestRefused(ValueError):
    """This request can never be served here; the message says why, with both numbers."""


class PolicyStalled(RuntimeError):
    """The policy plans nothing although requests wait, nothing is in flight, and it did not ask to be woken."""


class ControlPlane:
    """Holds the requests, the block pool, the prefix index and the policy stack of one replica.

    `recorder` gets the rows of `policies.records`; None costs nothing. `on_end` is called with every request that ends,
    however it ends, inside the call that ends it. `check=True` verifies the invariants (blocks,
    requests and places conserved, clock monotone) after every call.
    """

    def __init__(
        self,
        limits: Limits,
        stack: PolicyStack,
        *,
        replica: int = 0,
        cost: CostModel | None = None,
        recorder: Recorder | None = None,
        on_end: Callable[[Request], None] | None = None,
        check: bool = False,
    ) -> None:
        self.limits = limits
        self.stack = stack
        self.replica = replica
        self._state = ReplicaState(limits, stack, cost)
        self.on_end = on_end
        self._recorder = recorder
        self._check = check
        self._next_index = 0
        self._before_step: dict[int, int] = {}
        self._blocked: dict[int, str] = {}
        self._empty_rows: list[tuple[object, ...]] = []
        self._plan_rows: dict[int, tuple[object, ...]] = {}
        self._empty_plans = 0
        self._last_ns = 0

    # What a panel may look at

    @property
    def view(self) -> View:
        """The replica as policies see it."""
        return self._state

    @property
    def num_live(self) -> int:
        """Requests waiting, running or paused."""
        return len(self._state.requests)

    @property
    def num_running(self) -> int:
        return len(self._state.running)

    @property
    def num_waiting(self) -> int:
        return self._state.num_waiting

    @property
    def num_outstanding_tokens(self) -> int:
        return self._state.num_outstanding_tokens

    @property
    def num_free_blocks(self) -> int:
        return self._state.num_free_blocks

    @property
    def next_step(self) -> int:
        """Index of the next call of `plan`."""
        return self._next_index

    def block_table(self, request: Request) -> Sequence[int]:
        """The request's blocks, in order of its tokens."""
        return request._blocks

    def decode_group(self) -> Sequence[Request]:
        """The members of the decode group, in order of joining."""
        return list(self._state.group.members.values())

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks of this chain are cached here."""
        return len(self._state.pool.lookup(keys))

    def extend_keys(self, request: Request, keys: Sequence[bytes]) -> None:
        """Name the blocks that generated tokens have filled, before the report of the step that filled them."""
        request._keys.extend(keys)

    # The four calls

    def submit(self, request: Request, now: int, keys: Sequence[bytes] = ()) -> None:
        """A request arrives. `keys`: the hash chain of its prompt's full blocks (longer where the future is known).

        Raises RequestRefused, with the refusal recorded, if it could never be served; the others are not affected.
        Its `max_tokens` is cut to what the model's limit leaves.
        """
        self._advance(now)
        reason = self._refusal(request)
        if reason is not None:
            self.refuse(request, reason)
            raise RequestRefused(reason)
        self._before_step[request.id] = self._next_index
        request.max_tokens = min(request.max_tokens, self.limits.max_model_len - request.num_prompt_tokens)
        if self.limits.prefix_caching:
            request._keys = list(keys)
        self._state.requests[request.id] = request
        self._state.waiting_tokens += request.num_pending_tokens
        self.stack.scheduler.add(request, now)
        self._verify()

    def refuse(self, request: Request, reason: str) -> None:
        """Record a request that is turned away: here, or by a router before it got here."""
        request.state = State.REFUSED
        self._record_request(request, 0, error=reason)
        if self.on_end is not None:
            self.on_end(request)

    def _refusal(self, request: Request) -> str | None:
        limits = self.limits
        if request.id in self._state.requests:
            return f"request id {request.id} is in use"
        if request.num_prompt_tokens < 1:
            return "the prompt is empty; give at least one token"
        if request.max_tokens < 1:
            return f"max_tokens must be at least 1, not {request.max_tokens}"
        if request.num_prompt_tokens >= limits.max_model_len:
            return (
                f"the prompt has {request.num_prompt_tokens} tokens; the model's limit of {limits.max_model_len} "
                f"leaves room for a prompt of {limits.max_model_len - 1} at most"
            )
        longest = min(request.num_prompt_tokens + request.max_tokens, limits.max_model_len)
        blocks = -(-longest // limits.block_size)
        if blocks > limits.num_blocks:
            return (
                f"prompt and max_tokens need {blocks} KV blocks of {limits.block_size} tokens; this replica has "
                f"{limits.num_blocks}: lower max_tokens or shorten the prompt"
            )
        return None

    def cancel(self, request_id: int, now: int, num_output_tokens: int | None = None) -> bool:
        """End a request in whatever state it is; its blocks are free at once. False if it had ended."""
        self._advance(now)
        request = self._state.requests.get(request_id)
        if request is None:
            return False
        count = request.num_output_tokens if num_output_tokens is None else num_output_tokens
        self._end(request, State.CANCELLED, count, now)
        self._verify()
        return True

    def plan(self, now: int) -> Step:
        """Ask the policy what runs next, and enact it.

        Raises PolicyStalled the second time in a row that it plans nothing although it could.
        """
        self._advance(now)
        state = self._state
        plan = self.stack.scheduler.plan(state, now)
        if not isinstance(plan, Plan):
            raise TypeError(f"{type(self.stack.scheduler).__name__}.plan answered {plan!r}; it must return a Plan")
        enactment = Enactment(state, plan, self._next_index, now)
        step = enactment.run()
        self._next_index += 1
        for request, reason in step.dropped:
            self._end(request, State.DROPPED, request.num_output_tokens, now, error=reason)
        for request in enactment.back_to_queue:
            self.stack.scheduler.add(request, now)
        times = [until for until in state.pins.values() if until != FOREVER]
        if times:
            step.wake_at = min([*times, *([] if step.wake_at is None else [step.wake_at])])
        if self._recorder is not None:
            self._record_plan(plan, step)
        self._verify()
        self._watch(step)
        return step

    def report(self, report: Report) -> None:
        """Take in what became of a step. Reports come in the order of their steps."""
        self._advance(report.end_ns)
        state, step = self._state, report.step
        state.last_reported = step.index
        firsts = [chunk.request for chunk in step.chunks if chunk.samples]
        for request in (*firsts, *step.joined, *step.decodes):
            if request.first_token_ns is None and not request.state.ended:
                request.first_token_ns = report.end_ns
        for request, depth, block in step.filled:
            held = request._blocks
            if depth < len(held) and held[depth] == block and depth < len(request._keys):
                state.register(request, depth, report.end_ns)
        # Without those that were cancelled while the step was in flight; and in order of arrival, whatever order a
        # panel found them in, since it decides which blocks are idle longest.
        alive = [finished for finished in report.finished if finished[0].id in state.requests]
        report.finished[:] = sorted(alive, key=lambda finished: finished[0].key)
        for request, end, num_output_tokens in report.finished:
            self._end(request, end, num_output_tokens, report.end_ns)
        self.stack.scheduler.on_report(report)
        if self._recorder is not None:
            self._record_step(report)
        self._verify()

    def close(self) -> None:
        """Record the requests that have not ended. Nothing can be submitted afterwards."""
        for request in list(self._state.requests.values()):
            self._record_request(request, request.num_output_tokens)

    # Inside

    def _advance(self, now: int) -> None:
        assert now >= self._last_ns, f"time went back from {self._last_ns} to {now}"
        self._last_ns = now

    def _end(self, request: Request, end: State, num_output_tokens: int, now: int, error: str = "") -> None:
        state = self._state
        waited = request.state is State.WAITING
        queued = waited or request.state is State.PAUSED
        request.state = end
        request.finish_ns = now
        # A plan that drops a request has taken it off the queue; what ends while it runs is in the report.
        if end is State.CANCELLED or (queued and end is not State.DROPPED):
            self.stack.scheduler.remove(request, now)
        if waited:
            state.waiting_tokens -= request.num_pending_tokens
            state.pins.pop(request.id, None)
        else:
            state.stop(request)
            self.stack.admission.on_release(request)
            if request.id in state.pins:
                state.pinned[request.id] = request
            else:
                state.free(request, now)
        del state.requests[request.id]
        self._record_request(request, num_output_tokens, error)
        if self.on_end is not None:
            self.on_end(request)

    def _watch(self, step: Step) -> None:
        """Work conservation: a policy that plans nothing while it could must say when to ask again."""
        state = self._state
        waits_for_a_time = step.wake_at is not None and step.wake_at > step.plan_ns
        idle = not step.runs and state.last_launched == state.last_reported and not waits_for_a_time
        if not idle or not state.requests or step.preempted or step.dropped:
            self._empty_plans = 0
            return
        self._empty_plans += 1
        if self._empty_plans >= 2:
            refusals = "; ".join(sorted({reason for _, reason in step.refused}))
            raise PolicyStalled(
                f"{type(self.stack.scheduler).__name__} planned nothing twice in a row with {len(state.requests)} "
                f"requests alive and did not set wake_at to a time to come"
                + (f" (refused: {refusals})" if refusals else "")
            )

    def _verify(self) -> None:
        if self._check:
            self._state.check()

    # Records

    def _record_request(self, request: Request, num_output_tokens: int, error: str = "") -> None:
        before = self._next_index
        if request.state is not State.REFUSED:  # else the id may be that of another request, a live one
            before = self._before_step.pop(request.id, before)
        if self._recorder is None:
            return
        status = request.state.value if request.state.ended else "unfinished"
        runs = request._decode_runs
        if request._group is not None:  # still decoding when the run was closed
            runs = [*runs, request._group.clock]
        slo = request.slo or Slo()
        self._recorder.request((
            request.id,
            self.replica,
            request.arrival_ns,
            before,
            request.tenant,
            request.session,
            request.program,
            list(request.parents),
            request.priority,
            slo.ttft_ns,
            slo.tpot_ns,
            slo.e2e_ns,
            None if request.slo is None else slo.value,
            slo.droppable,
            list(request.hints.items()),
            request.num_prompt_tokens,
            request.max_tokens,
            num_output_tokens,
            request.num_cached_tokens,
            request.num_preemptions,
            request.first_scheduled_ns,
            request.first_token_ns,
            request.finish_ns,
            self._next_index if request.state is State.CANCELLED else None,
            status,
            error,
            request._token_steps,
            runs,
            request._keys,
        ))  # fmt: skip

    def _record_plan(self, plan: Plan, step: Step) -> None:
        assert self._recorder is not None
        index = step.index

        def emit(request_id: int, kind: str, tokens: int, reason: str) -> None:
            decision((self.replica, index, request_id, kind, tokens, reason))

        decision = self._recorder.decision
        for request, reason in step.dropped:
            emit(request.id, "drop", 0, reason)
        for request, mode in step.preempted:
            emit(request.id, "preempt", request.num_tokens, mode.value)
        for request in step.left:
            emit(request.id, "leave", 0, "")
        for request in step.joined:
            emit(request.id, "join", 0, "")
        if step.decode_all:
            emit(-1, "decode", step.num_decodes, "")
        for request in step.capped:
            emit(request.id, "capped", 0, "")
        for request in step.decodes:
            emit(request.id, "decode", 1, "")
        for request in step.resumed:
            emit(request.id, "resume", 0, "")
        admitted = {request.id for request in step.admitted}
        for chunk in step.chunks:
            if chunk.request.id in admitted:
                emit(chunk.request.id, "admit", chunk.start, "")
            emit(chunk.request.id, "chunk", chunk.num_tokens, "")
        for request, reason in step.refused:
            emit(request.id, "refused", 0, reason)
        blocked = {request.id: reason for request, reason in plan.blocked}
        for request_id, reason in blocked.items():
            if self._blocked.get(request_id) != reason:
                emit(request_id, "blocked", 0, reason)
        self._blocked = blocked
        state = self._state
        self._plan_rows[index] = (
            len(step.admitted),
            len(step.preempted),
            state.pool.num_free - state.pool.num_idle,
            state.pool.num_idle,
            len(state.running),
            state.num_waiting,
            len(state.paused),
            step.wake_at,
        )
        if not step.runs:
            row = self._step_row(step, step.plan_ns, step.plan_ns, 0, 0)
            if state.last_launched == state.last_reported:
                self._recorder.step(row)
            else:
                self._empty_rows.append(row)  # behind the row of the step in flight

    def _record_step(self, report: Report) -> None:
        assert self._recorder is not None
        row = self._step_row(report.step, report.launch_ns, report.end_ns, report.device_ns, len(report.finished))
        if self._empty_rows and self._empty_rows[0][1] < report.step.index:  # type: ignore[operator]
            self._flush_empty_rows()
        self._recorder.step(row)
        if self._state.last_launched == self._state.last_reported:
            self._flush_empty_rows()

    def _flush_empty_rows(self) -> None:
        assert self._recorder is not None
        for row in self._empty_rows:
            self._recorder.step(row)
        self._empty_rows.clear()

    def _step_row(
        self, step: Step, launch_ns: int, end_ns: int, device_ns: int, num_finished: int
    ) -> tuple[object, ...]:
        admitted, preempted, free, idle, running, waiting, paused, wake = self._plan_rows.pop(step.index)
        s = step.shape
        return (
            self.replica,
            step.index,
            step.plan_ns,
            launch_ns,
            end_ns,
            device_ns,
            s.num_decodes,
            s.decode_context,
            s.max_context,
            s.num_chunks,
            s.chunk_tokens,
            s.chunk_pairs,
            s.chunk_context,
            s.num_samples,
            s.padded_tokens,
            s.graph,
            step.decode_clock,
            admitted,
            preempted,
            num_finished,
            free,
            idle,
            running,
            waiting,
            paused,
            wake,
        )  # fmt: skip
