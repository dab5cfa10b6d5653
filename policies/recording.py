"""What a control plane does, as the rows of `policies.records`, in an order in which they may be written at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from policies.contract import Recorder
from policies.plan import NO_COPIES, CopyTimes, Plan, Report, Step
from policies.records import DecodeSteps, Row, Times
from policies.replica_state import ReplicaState
from policies.request import Request, Slo, State
from policies.shapes import StepShape


class Recording:
    """Hears of what happens on one replica and gives a recorder its rows.

    A step's row is whole only once the step is reported, and steps are recorded in their order: what was counted when
    a step was planned waits here for its report, and a plan that runs nothing waits for the step in flight before it.
    """

    def __init__(self, recorder: Recorder, replica: int, state: ReplicaState) -> None:
        self._recorder = recorder
        self._replica = replica
        self._state = state
        self._before_step: dict[int, int] = {}  # live request -> the plan before which it came
        self._blocked: dict[int, str] = {}
        self._empty_rows: list[tuple[object, ...]] = []
        self._decode_steps = getattr(recorder, "decode_steps", self._decode_steps_by_rows)
        self._plan_rows: dict[int, tuple[Row, Row, Row]] = {}  # columns of a step's row, but for the report's
        self._num_dropped = 0  # blocks on their way to disk or from it, as far as that is recorded

    def submitted(self, request: Request, next_step: int) -> None:
        """It came before the plan with this index."""
        self._before_step[request.id] = next_step

    def event(self, kind: str, tokens: int, reason: str, next_step: int, request_id: int = -1) -> None:
        """Somebody has acted on the replica itself, or KV has moved, before the plan with this index."""
        self._recorder.decision((self._replica, next_step, request_id, kind, tokens, reason))

    def left(self, request: Request) -> int:
        """It leaves for another replica. Answers the plan before which it came."""
        return self._before_step.pop(request.id)

    def ended(
        self, request: Request, num_output_tokens: int, next_step: int, error: str = "", from_outside: bool = False
    ) -> None:
        """It has ended, or the run has; `next_step`: before the plan with this index. `from_outside`: not by what was
        sampled, but because its client went away or found a stop string in the text."""
        before, left, moves = next_step, next_step if from_outside else None, request._moves
        if request.state is State.REFUSED:
            pass  # the id may be that of another request, a live one
        elif request.id not in self._before_step and moves and moves[-5] == self._replica:  # on its way from here
            before, left, moves = moves[-4], moves[-3], moves[:-5]
        else:
            before = self._before_step.pop(request.id, before)
        status = request.state.value if request.state.ended else "unfinished"
        runs = request._decode_runs
        if request._group is not None:  # still decoding when the run was closed
            runs = [*runs, request._group.clock]
        slo = request.slo or Slo()
        self._recorder.request((
            request.id,
            self._replica,
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
            request.max_tokens_in_all,
            num_output_tokens,
            request.num_cached_tokens,
            request.num_preemptions,
            request.first_scheduled_ns,
            request.first_token_ns,
            request.finish_ns,
            left,
            status,
            error,
            request._token_steps[:],  # it may live on in a step in flight
            runs[:],
            request._keys[:],
            moves[:],
            request.num_fetched_tokens,
            request.num_disk_tokens,
        ))  # fmt: skip

    def planned(self, plan: Plan, step: Step) -> None:
        """The plan is enacted as this step."""
        replica, index, decision = self._replica, step.index, self._recorder.decision
        for request, reason in step.dropped:
            decision((replica, index, request.id, "drop", 0, reason))
        for request, mode in step.preempted:
            decision((replica, index, request.id, "preempt", request.num_tokens, mode.value))
        if step.left or step.joined:
            self.regrouped(step.left, step.joined, index)
        if step.decode_all:
            decision((replica, index, -1, "decode", step.num_decodes, ""))
        for request in step.capped:
            decision((replica, index, request.id, "capped", 0, ""))
        for request in step.decodes:
            decision((replica, index, request.id, "decode", 1, ""))
        for request in step.resumed:
            decision((replica, index, request.id, "resume", 0, ""))
        if step.chunks:
            admitted = {request.id for request in step.admitted}
            for request, start, num_tokens, _ in step.chunks:
                if request.id in admitted:
                    decision((replica, index, request.id, "admit", start, ""))
                decision((replica, index, request.id, "chunk", num_tokens, ""))
        for request, reason in step.refused:
            decision((replica, index, request.id, "refused", 0, reason))
        if plan.blocked or self._blocked:
            self._passed_over({request.id: reason for request, reason in plan.blocked}, index)
        state, shape = self._state, step.shape
        self._plan_rows[index] = (
            (*shape[:11], step.decode_clock, len(step.admitted), len(step.preempted)),  # from num_decodes on
            (
                state.pool.num_unused,
                state.pool.num_idle,
                len(state.running),
                state.num_waiting,
                len(state.paused),
                step.wake_at,
                shape.swapped_out,
                shape.swapped_in,
                len(state.swapped),
                state.host.num_unused,
                *(_of_prefixes(step, state) if step.copies else (0, 0)),
                state.host.num_cached,
            ),
            (*self._of_disk(step), *shape[-3:]),  # the last columns
        )
        if not step.runs:
            row = self._step_row(step, step.plan_ns, step.plan_ns, 0, 0, NO_COPIES)
            if state.last_launched == state.last_reported:
                self._recorder.step(row)
            else:
                self._empty_rows.append(row)  # behind the row of the step in flight

    def regrouped(self, left: Iterable[Request], joined: Iterable[Request], index: int) -> None:
        """With the step with this index, these are no more in the decode group, and these are."""
        for request in left:
            self._recorder.decision((self._replica, index, request.id, "leave", 0, ""))
        for request in joined:
            self._recorder.decision((self._replica, index, request.id, "join", 0, ""))

    def coasted(
        self,
        index: int,
        times: Sequence[Times],
        first: StepShape,
        clock: int,
        unused: Sequence[int],
        longest: int,
        prefill: Request | None,
        is_open: bool,
    ) -> Row:
        """Steps that change nothing but counts (`policies.coasting`), from the one with this index, shape and decode
        clock on: each one's times and the unused blocks after it, the longest decode in the first one, and the
        prefill that goes on.

        `is_open`: the last one has not ended yet. Then its row is answered, for `ended_step`."""
        state = self._state
        after = (len(state.running), state.num_waiting, len(state.paused), None, 0, 0, len(state.swapped))
        row = (
            *(self._replica, index, *times[0], *first[:11], clock, 0, 0, 0, unused[0], state.pool.num_idle),
            *(*after, state.host.num_unused, 0, 0, state.host.num_cached, *NO_COPIES, *self._of_disk(None), 0, 0, 0),
        )
        steps = DecodeSteps(row, times, unused, longest, -1 if prefill is None else prefill.id)
        if not is_open:
            self._decode_steps(steps)
            return row
        if len(times) > 1:
            self._decode_steps(steps._replace(times=times[:-1], unused=unused[:-1]))
            steps = steps.without(len(times) - 1)
        for decision in steps.decision_rows():
            self._recorder.decision(decision)
        return steps.first

    def ended_step(self, row: Row) -> None:
        """The step with this row has come to its end."""
        self._recorder.step(row)

    def _decode_steps_by_rows(self, steps: DecodeSteps) -> None:
        for later, step in enumerate(steps.step_rows()):
            for decision in steps.decision_rows(later):
                self._recorder.decision(decision)
            self._recorder.step(step)

    def _passed_over(self, blocked: dict[int, str], index: int) -> None:
        for request_id, reason in blocked.items():
            if self._blocked.get(request_id) != reason:
                self._recorder.decision((self._replica, index, request_id, "blocked", 0, reason))
        self._blocked = blocked

    def reported(self, report: Report, num_finished: int) -> None:
        """The step's result is known. `num_finished`: of those that had not left before."""
        times = (report.launch_ns, report.end_ns, report.device_ns)
        row = self._step_row(report.step, *times, num_finished, report.copies)
        empty = self._empty_rows
        if empty and empty[0][1] < report.step.index:  # type: ignore[operator]
            self._flush_empty_rows()
        self._recorder.step(row)
        if empty and self._state.last_launched == self._state.last_reported:
            self._flush_empty_rows()

    def _flush_empty_rows(self) -> None:
        for row in self._empty_rows:
            self._recorder.step(row)
        self._empty_rows.clear()

    def _step_row(
        self, step: Step, launch_ns: int, end_ns: int, device_ns: int, num_finished: int, copies: CopyTimes
    ) -> tuple[object, ...]:
        sizes, after, last = self._plan_rows.pop(step.index)
        times = (step.plan_ns, launch_ns, end_ns, device_ns)
        return (self._replica, step.index, *times, *sizes, num_finished, *after, *copies, *last)

    def _of_disk(self, step: Step | None) -> tuple[int, int, int, int]:
        """The columns about the disk."""
        disk, size = self._state.disk, self._state.block_size
        if disk is None:
            return 0, 0, 0, 0
        lost, self._num_dropped = disk.num_dropped - self._num_dropped, disk.num_dropped
        copies = [] if step is None else step.disk
        out = sum(copy.out for copy in copies)
        return out * size, (len(copies) - out) * size, disk.pool.num_cached, lost


def _of_prefixes(step: Step, state: ReplicaState) -> tuple[int, int]:
    """Tokens of cached prefixes that the step's copies keep on the host, and fetch."""
    kept = fetched = 0
    for copy in step.copies:
        if copy.cached and copy.out:
            kept += len(copy.device)
        elif copy.cached:
            fetched += len(copy.device)
    return kept * state.block_size, fetched * state.block_size
