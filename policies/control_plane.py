"""One replica's brain, used whole by both panels: `submit`, `cancel`, `plan(now)`, `report(report)`.

Both panels do nothing but call these four, in the order that `policies.loop` fixes, and carry out what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from policies import live_change
from policies.coasting import Timed, chunks_that_go_on, coast
from policies.contract import CostModel, Recorder, View
from policies.decoding import run_decodes
from policies.enactment import Enactment
from policies.plan import FOREVER, Plan, Report, Step
from policies.recording import Recording
from policies.records import Row
from policies.refusal import PolicyStalled, RequestRefused, refusal
from policies.repeating import Repeating
from policies.replica_state import Limits, ReplicaState
from policies.request import Request, State
from policies.stack import PolicyStack
from policies.transfers import Transfers


class ControlPlane:
    """Holds the requests, the block pool, the prefix index and the policy stack of one replica.

    `cost` is what policies may plan by; where one needs it, None is a ValueError. `recorder` gets the rows of
    `policies.records`; None costs nothing. `on_end` is called with every request that ends, however it ends, inside the
    call that ends it. `check=True` verifies the invariants (blocks, requests and places conserved, clock monotone)
    after every call.
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
        needs_cost = stack.needs_cost()
        if needs_cost and cost is None:
            raise ValueError(f"{needs_cost} plans by what steps cost, and no cost model was given; name one as cost")
        self.limits = limits
        self.stack = stack
        self.replica = replica
        self._state = ReplicaState(limits, stack, cost)
        self.transfers = Transfers(self, self._state)
        self.on_end = on_end
        self._recording = None if recorder is None else Recording(recorder, replica, self._state)
        self._check = check
        self._next_index = 0
        self._empty_plans = 0
        self._held = False
        self._last_ns = 0
        self._num_repeated = 0
        self.repeating = Repeating(self._state)
        self._open_row: Row | None = None

    # What a panel may look at

    @property
    def view(self) -> View:
        """The replica as policies see it."""
        return self._state

    @property
    def num_live(self) -> int:
        """Requests waiting, running, paused or swapped."""
        return len(self._state.requests)

    @property
    def live_ids(self) -> list[int]:
        """Their ids, and those of requests that are leaving for another replica, in order."""
        return sorted([*self._state.requests, *self._state.leaving])

    @property
    def num_running(self) -> int:
        return len(self._state.running)

    @property
    def num_waiting(self) -> int:
        return self._state.num_waiting

    @property
    def num_prefill_tokens(self) -> int:
        return self._state.num_prefill_tokens

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

    @property
    def num_asked(self) -> int:
        """How often the policy was asked for a plan; the other steps repeated one."""
        return self._next_index - self._num_repeated

    @property
    def held(self) -> bool:
        """Whether `hold` is in force: plans run nothing."""
        return self._held

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

    def submit(self, request: Request, now: int, keys: Sequence[bytes] = (), *, hands_off: bool = False) -> None:
        """A request arrives. `keys`: the hash chain of its prompt's full blocks (longer where the future is known).

        Raises RequestRefused, with the refusal recorded, if it could never be served; the others are not affected.
        Its `max_tokens` is cut to what the model's limit leaves. `hands_off`: after its first token it is done here,
        and waits to be taken away (`policies.transfers`).
        """
        self._advance(now)
        self.repeating.stop()
        if self.limits.prefix_caching:
            request._keys = list(keys)
            self._state.num_named += 1
            self._state.named_blocks += request.num_prompt_tokens // self.limits.block_size
        in_use = f"request id {request.id} is in use" if request.id in self._state.requests else None
        reason = in_use or refusal(request, self.limits)
        if reason is not None:
            self.refuse(request, reason)
            raise RequestRefused(reason)
        if self._recording is not None:
            self._recording.submitted(request, self._next_index)
        request.max_tokens = min(request.max_tokens, self.limits.max_model_len - request.num_prompt_tokens)
        if hands_off:  # one token here, the others where its KV is taken then
            request.max_tokens, request._tokens_elsewhere = 1, request.max_tokens - 1
        self._state.requests[request.id] = request
        self._state.waiting_tokens += request.num_pending_tokens
        self.stack.scheduler.add(request, now)
        self._verify()

    def refuse(self, request: Request, reason: str) -> None:
        """Record a request that is turned away: here, or by a router before it got here."""
        request.state = State.REFUSED
        self._record_end(request, 0, reason)
        if self.on_end is not None:
            self.on_end(request)

    def cancel(
        self,
        request_id: int,
        now: int,
        num_output_tokens: int | None = None,
        end: State = State.CANCELLED,
        error: str = "",
    ) -> bool:
        """End a request in whatever state it is; its blocks are free at once. False if it had ended.

        `end`: `State.STOPPED` where its text has come to a stop string, which only those see who make text of tokens.
        """
        self._advance(now)
        request = self._state.requests.get(request_id) or self._state.leaving.get(request_id)
        if request is None:
            return False
        count = request.num_output_tokens if num_output_tokens is None else num_output_tokens
        self._end(request, end, count, now, error=error, from_outside=True)
        self._verify()
        return True

    def plan(self, now: int) -> Step:
        """Ask the policy what runs next, and enact it.

        Raises PolicyStalled the second time in a row that it plans nothing although it could.
        """
        self._advance(now)
        state = self._state
        if state.tier is not None:
            state.tier.begin(now)
        plan = self._ask(now)
        enactment = Enactment(state, plan, self._next_index, now)
        step = enactment.run()
        self._next_index += 1
        if state.disk is not None:
            step.disk = state.disk.take()
        for request, reason in step.dropped:
            self._end(request, State.DROPPED, request.num_output_tokens, now, error=reason)
        for request in enactment.back_to_queue:  # preempted, or refused for want of slots, tokens or blocks
            self.stack.scheduler.add(request, now)
        if not state.requests:
            step.wake_at = None  # there is nobody to be woken for
        if state.pins:
            times = [until for until in state.pins.values() if until != FOREVER]  # memory comes free then: plan again
            if times:
                step.wake_at = min([*times, *([] if step.wake_at is None else [step.wake_at])])
        if self._recording is not None:
            self._recording.planned(plan, step)
        self._verify()
        self._watch(step)
        self.repeating.begin(plan, step)
        return step

    def repeat(self, now: int) -> Step | None:
        """The last plan once more, as if the policy had been asked again; None where it has to be.

        It answers as long as the policy has said that it would (`Plan.repeats`), nothing has come in from outside, and
        there are blocks for everybody. The same calls of `report` go with it as with `plan`.
        """
        state, repeating = self._state, self.repeating
        if not repeating.left or not 0 < state.num_decoding <= self.limits.max_num_batched_tokens:
            return None
        chunk = repeating.next_chunk()
        if chunk is None or not repeating.has_blocks(chunk):
            return None
        self._advance(now)
        step = run_decodes(state, self._next_index, now, *chunk)
        self._next_index += 1
        self._num_repeated += 1
        repeating.left -= 1
        if self._recording is not None:
            self._recording.planned(repeating.plan, step)
        self._verify()
        return step

    @property
    def may_repeat(self) -> bool:
        """Whether `repeat` and `coast` can do anything."""
        return self.repeating.left > 0

    def regrouping(self) -> tuple[list[Request], list[Request], int]:
        """Who has left the decode group since the last step, who joins it with the next one, and its clock."""
        return self._state.left_group[:], list(self._state.loose.values()), self._state.group.clock

    def coast(self, until_clock: int, time: Timed) -> bool:
        """With `lag=0` and no step in flight: what `repeat`, launch and `report` come to, as long as steps change
        nothing but counts, and with the first one the decode group (`regrouping`), the group's clock stays below
        `until_clock`, and `time` has times for their shapes: called with shapes of steps in a row, how many there are
        at most, and whether the last may end later than it is known what else happens, it answers the times (planned,
        launched, ended, the device's) of as many as it can, and whether the last one's end is still to come.
        So does this; `end_coast` is to be called then.
        """
        state, group = self._state, self._state.group
        if state.copies or not 0 < state.num_decoding <= self.limits.max_num_batched_tokens:
            return False
        caps = group.next_cap()  # the clock at which the first of them has all of its tokens
        for request in state.loose.values():  # who joins with the first of these steps
            if request.first_token_ns is None or request.hands_off:  # somebody wants to hear of its first token
                return False
            caps = min(caps, group.clock + request.max_tokens - request.num_output_tokens)
        most = min(self.repeating.left, min(until_clock, caps) - group.clock - 1)
        if most < 1 or not self.stack.ignores_reports():
            return False
        if state.num_waiting and self.limits.prefix_caching:  # a block that is filled may be one of who waits
            return False
        chunk = self.repeating.next_chunk()
        if chunk is None:
            return False
        most = min(most, chunks_that_go_on(state, *chunk))
        taken, self._open_row = coast(state, self._recording, self._next_index, most, time, *chunk)
        if taken:
            self._next_index += taken
            self._num_repeated += taken
            self.repeating.left -= taken
            state.last_launched = self._next_index - 1
            state.last_reported = state.last_launched - (self._open_row is not None)
        self._verify()
        return self._open_row is not None

    def end_coast(self) -> None:
        """The last step of `coast` has come to its end."""
        self._state.last_reported = self._state.last_launched
        if self._recording is not None and self._open_row:
            self._recording.ended_step(self._open_row)
        self._open_row = None

    def _ask(self, now: int) -> Plan:
        if self._held:
            return Plan()
        plan, name = self.stack.scheduler.plan(self._state, now), type(self.stack.scheduler).__name__
        if not isinstance(plan, Plan):
            raise TypeError(f"{name}.plan answered {plan!r}; it must return a Plan")
        for at in (plan.wake_at, *(until for _, until in plan.pin)) if plan.pin else (plan.wake_at,):
            if at is not None and not isinstance(at, int):
                raise TypeError(
                    f"{name}.plan named the time {at!r}; times are nanoseconds as int, not {type(at).__name__}"
                )
        return plan

    def report(self, report: Report) -> None:
        """Take in what became of a step. Reports come in the order of their steps."""
        self._advance(report.end_ns)
        state, step = self._state, report.step
        state.last_reported = step.index
        if report.finished:
            self.repeating.somebody_ended()
        for request, _, _, samples in step.chunks:
            if samples:
                self._got_a_token(request, report.end_ns)
        # Of the decode group only who joined can have had no token before.
        for request in (*step.joined, *step.decodes) if step.decodes else step.joined:
            self._got_a_token(request, report.end_ns)
        for request, depth, block in step.filled:
            held = request._blocks  # it may have lost the block while the step was in flight, and somebody else got it
            if depth < len(held) and held[depth] == block and depth < len(request._keys):
                state.register(request, depth, report.end_ns)
                self.repeating.filled(request._keys[depth], depth)
        # Without those that were cancelled while the step was in flight; and in order of arrival, whatever order a
        # panel found them in, since it decides which blocks are idle longest.
        num_finished = 0
        if report.finished:
            live, leaving = state.requests, state.leaving
            alive = [finished for finished in report.finished if finished[0].id in live or finished[0].id in leaving]
            report.finished[:] = sorted(alive, key=lambda finished: finished[0].key)
            num_finished = sum(request.state is not State.MOVING for request, _, _ in report.finished)
            for request, end, num_output_tokens in report.finished:
                self._end(request, end, num_output_tokens, report.end_ns)
        self.stack.scheduler.on_report(report)
        self.stack.admission.on_report(report)
        if self._recording is not None:
            self._recording.reported(report, num_finished)
        self._verify()

    @staticmethod
    def _got_a_token(request: Request, now: int) -> None:
        if request.first_token_ns is None and not request.state.ended:
            request.first_token_ns = now
        if request._tokens_elsewhere > 0 and request.state in (State.WAITING, State.SWAPPED):  # preempted meanwhile
            request.max_tokens += 1  # so it gets one more here
            request._tokens_elsewhere -= 1

    def disk_done(self, number: int, error: str, now: int) -> None:
        """A block of `Step.disk` has arrived; or has not, and `error` says why in a word or two.

        Comes as what an operator does, and is recorded with it.
        """
        self._advance(now)
        assert self._state.disk is not None, "there is no disk tier"
        self.repeating.stop()
        self._empty_plans = 0
        self._state.disk.done(number, error, now)
        self._record_event("disk", number, error)
        self._verify()

    @property
    def awaits_disk(self) -> bool:
        """Whether blocks are on their way to disk or from it: something will come in."""
        return self._state.num_on_their_way > 0

    # What an operator does to a replica that is running. All of it comes after the submissions and cancellations that
    # precede the next plan, and stands among that plan's decisions, so that a replay does it again.

    def change_policies(self, policies: Mapping[str, Any], names: Mapping[str, str], now: int) -> None:
        """Let other policy objects, by role, decide from the next plan on. No request is lost (`policies.live_change`).

        `names`: role (a scheduler's queue too) -> the policy as text, for the record.
        """
        self._advance(now)
        self.repeating.stop()
        live_change.change(self._state, policies, now)
        self._record_event("swap", 0, "; ".join(f"{role}: {name}" for role, name in names.items()))
        self._empty_plans = 0
        self._verify()

    def hold(self, now: int) -> None:
        """From the next plan on run nothing, until `release`. Requests keep their places and their memory."""
        self._advance(now)
        self.repeating.stop()
        self._held = True
        self._record_event("hold", 0, "")

    def release(self, now: int) -> None:
        """End what `hold` began."""
        self._advance(now)
        self._held = False
        self._record_event("release", 0, "")

    def flush(self, now: int) -> int:
        """Forget all idle cached blocks. Returns how many those were."""
        self._advance(now)
        count = self._state.pool.flush() + self._state.host.flush()
        if self._state.disk is not None:
            count += self._state.disk.pool.flush()
        self._record_event("flush", count, "")
        self._verify()
        return count

    def _record_event(self, kind: str, tokens: int, reason: str, request_id: int = -1) -> None:
        if self._recording is not None:
            self._recording.event(kind, tokens, reason, self._next_index, request_id)

    def close(self) -> None:
        """Record the requests that have not ended. Nothing can be submitted afterwards."""
        for request in [*self._state.requests.values(), *self._state.leaving.values()]:
            self._record_end(request, request.num_output_tokens)

    # Inside

    def _advance(self, now: int) -> None:
        assert now >= self._last_ns, f"time went back from {self._last_ns} to {now}"
        self._last_ns = now

    def _end(
        self,
        request: Request,
        end: State,
        num_output_tokens: int,
        now: int,
        *,
        error: str = "",
        from_outside: bool = False,
    ) -> None:
        if from_outside:
            self.repeating.stop()
        state = self._state
        waited, moving = request.state is State.WAITING, request.state is State.MOVING
        swapped = request.state is State.SWAPPED
        queued = waited or swapped or request.state is State.PAUSED
        request.state = end
        request.finish_ns = now
        # A plan that drops a request has taken it off the queue; what ends while it runs is in the report.
        if (from_outside and not moving) or (queued and end is not State.DROPPED):
            self.stack.scheduler.remove(request, now)
        if waited:
            state.waiting_tokens -= request.num_pending_tokens
            state.pins.pop(request.id, None)
        elif swapped:
            state.stop(request)
            state.forget_swapped(request)
            state.pins.pop(request.id, None)
        else:
            state.stop(request)
            self.stack.admission.on_release(request)
            if request.id in state.pins:  # its blocks stay when it has ended, for the next call of its session
                state.pinned[request.id] = request
            else:
                state.free(request, now)
        del (state.leaving if moving else state.requests)[request.id]
        state.landed.pop(request.id, None)
        self._record_end(request, num_output_tokens, error, from_outside)
        if self.on_end is not None:
            self.on_end(request)

    def _record_end(
        self, request: Request, num_output_tokens: int, error: str = "", from_outside: bool = False
    ) -> None:
        if self._recording is not None:
            self._recording.ended(request, num_output_tokens, self._next_index, error, from_outside)

    def _watch(self, step: Step) -> None:
        """Work conservation: a policy that plans nothing while it could must say when to ask again."""
        state = self._state
        if step.num_decodes or step.chunks:
            self._empty_plans = 0
            return
        waits_for_a_time = step.wake_at is not None and step.wake_at > step.plan_ns
        idle = state.last_launched == state.last_reported and not waits_for_a_time
        moves = step.preempted or step.dropped or self.transfers.underway or state.num_on_their_way
        if not idle or not state.requests or moves or self._held:
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
