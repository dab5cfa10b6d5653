"""The engine: takes requests in, drives the control plane, runs its steps on the device, streams tokens out."""

from __future__ import annotations

import asyncio
import logging
import operator
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import replace

import torch

from policies.contract import CostModel, Recorder
from policies.control_plane import ControlPlane, RequestRefused
from policies.loop import Action, Collect, Deliver, Idle, Launch, send, step_loop
from policies.plan import Report, Step
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import PolicyStack
from runtime.engine_stats import EngineStats, LapClock
from runtime.inbox import Answer, Call, Inbox
from runtime.intake import Entry, Intake
from runtime.model_runner import Launched, ModelRunner, StepResult
from runtime.sampling.params import SamplingParams
from runtime.sequence import Collector, Completion, Details, FinishReason, Output, Sequence
from runtime.weights import LoadedModel

__all__ = ["Completion", "Details", "Engine", "EngineDead", "Output"]

logger = logging.getLogger(__name__)

GPU_PLAN_LEAD_NS = 3_000_000
"""`Limits.plan_lead_ns` on a card: what waking up, a plan and its launch take there, and some more."""


class EngineDead(RuntimeError):
    """The engine serves nothing any more: it was closed, or stopped on an error, which is attached as the cause."""


class Engine:
    """Serves one model on one device. Use as a context manager, or `close()` it.

    A loaded model serves one engine at a time: its KV cache is the engine's.

    Args:
        loaded: the model, from `runtime.weights.load_model`.
        limits: what the replica holds and runs; `max_model_len` within the model's.
        stack: the policies.
        recorder: takes the rows of the run.
        cost: for policies that plan by predicted cost.
        attention: as `runtime.attention.get_backend` has it: a name, a pair by phase, "auto" or "fastest".
        kv_dtype: of the KV cache; the model's own where None.
        seed: of the random draws of requests without a seed of their own.
        ids_in_any_order: the ids that `submit` is given need not become larger, as those of a workload whose requests
            follow from each other's ends; they must differ.
        check: verify the control plane's invariants after every step (slow).
        runner: one to run the steps with, its KV cache and captured graphs as they are (`ModelRunner.serve`); it is
            still open when the engine is closed. None: a new one, by `attention` and `kv_dtype`.
        on_flush: called on the engine's thread when `on_output` has been called for all that there is to tell for now,
            once a step and before the engine sleeps: so that what belongs together can be sent together.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        limits: Limits,
        stack: PolicyStack,
        *,
        recorder: Recorder | None = None,
        cost: CostModel | None = None,
        attention: str = "auto",
        kv_dtype: torch.dtype | None = None,
        seed: int = 0,
        ids_in_any_order: bool = False,
        check: bool = False,
        runner: ModelRunner | None = None,
        on_flush: Callable[[], None] | None = None,
    ) -> None:
        if limits.max_model_len > loaded.config.max_model_len:
            raise ValueError(
                f"max_model_len={limits.max_model_len} is beyond the model's {loaded.config.max_model_len}; lower it"
            )
        self.loaded = loaded
        self.limits = limits
        self.tokenizer = loaded.tokenizer
        self._intake = Intake(loaded, limits, seed, ids_in_any_order)
        self._eos = frozenset(loaded.config.eos_token_ids)
        self._start = time.monotonic_ns()
        self._plane = ControlPlane(limits, stack, cost=cost, recorder=recorder, on_end=self._on_end, check=check)
        self._lent = runner is not None
        if runner is not None:
            runner.serve(self._plane)
        self._runner = runner or ModelRunner(loaded, self._plane, attention=attention, kv_dtype=kv_dtype)
        self.startup_seconds = self._runner.startup_seconds
        """What the parts of the start took."""
        self._sequences: dict[int, Sequence] = {}
        self._error: BaseException | None = None
        self._on_flush = on_flush or (lambda: None)
        self._stats = EngineStats()
        self._clock = LapClock(self._stats.host_ns)
        self._inbox = Inbox()
        self._runner.watch(self._inbox.alarm)
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    # From any thread

    def now(self) -> int:
        """Nanoseconds since the engine started."""
        return time.monotonic_ns() - self._start

    def submit(
        self,
        prompt: str | SequenceOf[int],
        params: SamplingParams,
        on_output: Callable[[Output], None],
        details: Details | None = None,
        request_id: int | None = None,
    ) -> int:
        """Hand in a request; returns its id. `on_output` is called on the engine's thread and must be quick.

        Ids count up from 0; a caller with ids of its own gives larger and larger ones, or see `ids_in_any_order`.

        The last output has a `finish_reason`; a request that can never be served gets one with an `error`. If
        `on_output` raises, that is logged, the request is cancelled, and it is not called again. Where
        `params.max_tokens` is None, the output is limited by what the model and the whole KV cache can hold.

        Raises ValueError for a prompt that cannot be encoded or parameters that this model cannot serve, and
        EngineDead when the engine has stopped.
        """
        entry = self._intake.check(self._intake.encode(prompt), params, on_output, details or Details())
        (given_id,) = self._hand_in([replace(entry, request_id=request_id)])
        return given_id

    def _hand_in(self, entries: SequenceOf[Entry]) -> list[int]:
        """Stamp requests and put them in the inbox, all between the same two steps. Returns their ids."""
        with self._inbox:
            self.raise_if_dead()
            sequences = [self._intake.sequence(entry, self.now()) for entry in entries]
            self._inbox.submit(sequences)
        return [sequence.request.id for sequence in sequences]

    def cancel(self, request_id: int) -> None:
        """End a request in whatever state it is. Its blocks are free before the next step; unknown ids do nothing."""
        self._inbox.end(request_id)

    def stop(self, request_id: int, num_output_tokens: int) -> None:
        """As `cancel`, for a request whose text has come to a stop string after so many output tokens: it ends as one
        that stopped. For listeners that make the text themselves; they get no output that says so."""
        self._inbox.end(request_id, num_output_tokens)

    def call(self, function: Callable[[ControlPlane, int], Answer]) -> Future[Answer]:
        """Have `function(control plane, now)` called on the engine's thread, before the next plan and after everything
        that was handed in until now. What it raises is the future's; EngineDead where the engine has stopped."""
        call = Call(function)
        with self._inbox:
            if not self.dead:
                self._inbox.call(call)
                return call.future
        call.future.set_exception(EngineDead(self._obituary()))
        return call.future

    def stats(self) -> EngineStats:
        """The engine's counters, and its gauges as of now. For the engine's thread: in `on_flush`, or a `call`."""
        self._stats.look(self._plane)
        return self._stats

    def wait(self) -> None:
        """Return once the engine has stopped, by `close` or an error."""
        self._thread.join()

    def generate(
        self,
        prompts: SequenceOf[str] | SequenceOf[SequenceOf[int]],
        params: SamplingParams | SequenceOf[SamplingParams],
        details: SequenceOf[Details] | None = None,
    ) -> list[list[Completion]]:
        """Serve all prompts and wait: for each prompt its `params.n` completions, in order.

        A prompt that can never be served gives completions with an `error`; the others are not affected. Raises as
        `submit` does, and then none of them is served.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one text; give a list of prompts")
        if threading.current_thread() is self._thread:
            raise RuntimeError("generate() would wait for itself inside on_output; use submit()")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        base = [Details()] * len(prompts) if details is None else list(details)
        if not len(each) == len(base) == len(prompts):
            raise ValueError(f"{len(prompts)} prompts, {len(each)} sampling parameters and {len(base)} details")
        futures: list[list[Future[Completion]]] = []
        texts: list[str | SequenceOf[int]] = list(prompts)
        entries: list[Entry] = []
        for prompt, one, about in zip(texts, each, base, strict=True):
            token_ids = self._intake.encode(prompt)
            futures.append([Future() for _ in range(one.n)])
            for k, future in enumerate(futures[-1]):
                listen = Collector(future, len(token_ids))
                entries.append(self._intake.check(list(token_ids), one, listen, replace(about, continuation=k)))
        handed_in = self._hand_in(entries)
        try:
            return [[future.result() for future in group] for group in futures]
        except BaseException:
            for request_id in handed_in:
                self.cancel(request_id)
            raise

    async def stream(
        self, prompt: str | SequenceOf[int], params: SamplingParams, details: Details | None = None
    ) -> AsyncGenerator[Output, None]:
        """The outputs of one continuation as they come. Leaving the iteration early cancels the request.

        Raises RequestRefused if it can never be served, EngineDead if the engine stops meanwhile, and as `submit`.
        """
        queue: asyncio.Queue[Output] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen(output: Output) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, output)  # raises where the loop is gone, which ends the request

        request_id = self.submit(prompt, params, listen, details)
        finished = False
        try:
            while not finished:
                output = await queue.get()
                finished = output.finish_reason is not None
                if output.finish_reason == "error":
                    raise (EngineDead if self._inbox.closing else RequestRefused)(output.error)
                yield output
        finally:
            if not finished:
                self.cancel(request_id)

    def close(self) -> None:
        """Stop after the step in flight. Requests that have not ended get a last output that says so.

        Waits until the engine's threads are gone, except inside `on_output`, where it only asks them to go.
        """
        self._inbox.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def dead(self) -> bool:
        """Whether the engine serves nothing any more."""
        return self._inbox.closing or self._error is not None

    def raise_if_dead(self) -> None:
        """Raise EngineDead, with its cause, where the engine serves nothing any more."""
        if self.dead:
            raise EngineDead(self._obituary()) from self._error

    def _obituary(self) -> str:
        error = self._error
        return "the engine is closed" if error is None else f"the engine has stopped: {type(error).__name__}: {error}"

    # On the engine's thread

    def _main(self) -> None:
        try:
            self._drive()
        except BaseException as error:
            logger.critical("the engine has stopped", exc_info=error)
            self._error = error
            self._runner.give_up(error)
            traceback.clear_frames(error.__traceback__)  # which hold the KV cache
        try:
            if self._lent:
                self._runner.wait()
            else:
                self._runner.close()
        except Exception:
            logger.exception("the device did not close well")  # after an error on a card, every call fails
        self._end_everybody()

    def _drive(self) -> None:
        loop = step_loop(self._plane, self.limits.lag)
        launched: dict[int, Launched] = {}
        action: Action | None = next(loop)
        lap = self._clock.lap
        lap("idle")
        while action is not None:
            answer: int | Report | None = None
            if isinstance(action, Deliver):
                for step in launched.values():
                    self._hold(step)
                lap("wait")
                answer = None if self._inbox.closing else self._deliver()
                lap("deliver")
            elif isinstance(action, Launch):
                self._launch(action.step, launched)
                lap("launch")
            elif isinstance(action, Collect):
                answer = self._collect(launched.pop(action.step.index))
                lap("take")
                self._on_flush()
                lap("send")
            elif isinstance(action, Idle):
                self._on_flush()
                lap("send")
                self._sleep(action.wake_at)
                lap("idle")
            action, planned = send(loop, answer), isinstance(action, Deliver)
            lap("plan" if planned else "report")

    def _hold(self, launched: Launched) -> None:
        """Wait until a step with chunks is about to end: what arrives meanwhile can be in the next plan.

        Decodes alone are over too soon for that: the clock's own jitter would keep the device waiting.
        """
        lead = self.limits.plan_lead_ns
        if lead is None or not launched.step.chunks:
            return
        end = self._runner.expected_end(launched)
        if end is not None:
            self._inbox.hold(end - lead, launched.pending.done)  # it may be over sooner than the last ones were

    def _deliver(self) -> int:
        """Submissions in the order of their stamps, then ends from outside by id, then calls: the simulator's order
        too."""
        self._runner.check()
        with self._inbox:
            mail, now = self._inbox.take(), self.now()  # what is stamped later comes before a later step
        # All of them first: if anything fails below, whoever is known here is told.
        self._sequences.update((sequence.request.id, sequence) for sequence in mail.submitted)
        for sequence in mail.submitted:
            keys = sequence.new_keys(self.limits.block_size) if self.limits.prefix_caching else ()
            try:
                self._plane.submit(sequence.request, now, keys)
            except RequestRefused as refusal:
                self._finish(sequence, "error", str(refusal))
        for request_id, stopped_after in sorted(mail.ends, key=operator.itemgetter(0)):
            live = self._sequences.get(request_id)
            if live is None:
                continue
            if stopped_after is None:
                self._plane.cancel(request_id, now, live.num_output_tokens)
            else:
                self._plane.cancel(request_id, now, stopped_after, State.STOPPED)
                del self._sequences[request_id]
        for number, error in mail.from_disk:
            self._plane.disk_done(number, error, now)
        for call in mail.calls:
            call.run(self._plane, now)
        return now

    def _launch(self, step: Step, launched: dict[int, Launched]) -> None:
        for request, reason in step.dropped:
            self._finish(self._sequences[request.id], "dropped", reason)
        self._stats.launched(step)
        started = self._runner.launch(step, self._sequences.__getitem__)
        if started is not None:
            launched[step.index] = started
        if step.disk:
            self._runner.use_disk(step.disk, self._inbox.disk_done)

    def _sleep(self, wake_at: int | None) -> None:
        if wake_at is None and self._plane.num_live and not (self._plane.held or self._plane.awaits_disk):
            return  # the policy is asked once more; the control plane does not let it plan nothing twice
        timeout = threading.TIMEOUT_MAX
        if wake_at is not None:
            timeout = min(timeout, max(0, wake_at - self.now()) / 1e9)
        self._inbox.wait(timeout)

    def _collect(self, launched: Launched) -> Report:
        result = self._runner.collect(launched)
        self._clock.lap("wait")
        times = (launched.launched_at - self._start, result.known_at - self._start)
        report = Report(launched.step, *times, result.device_ns, copies=result.copies)
        self._stats.collected(report)
        for row, request in enumerate(result.requests):
            sequence = self._sequences.get(request.id)
            if sequence is not None:  # else it ended while this step was in flight
                self._take(sequence, row, result, report)
        return report

    def _take(self, sequence: Sequence, row: int, result: StepResult, report: Report) -> None:
        """One sampled token: into the sequence, past the stop rules, and out as text."""
        token_id, request = result.token_ids[row], sequence.request
        text, reason = sequence.take(token_id, self._eos, self.limits.max_model_len)
        if self.limits.prefix_caching and len(sequence.token_ids) % self.limits.block_size == 0:
            self._plane.extend_keys(request, sequence.new_keys(self.limits.block_size))
        output = Output(
            request.id,
            text,
            (token_id,),
            result.logprobs_of(row, sequence.params.logprobs),
            None if reason is None else reason.kind,
            None if reason is None else reason.detail,
            num_cached_tokens=request.num_cached_tokens,
        )
        if reason is not None:
            end = State.LENGTH if reason.kind == "length" else State.STOPPED
            report.finished.append((request, end, sequence.num_output_tokens))
            del self._sequences[request.id]
        self._tell(sequence, output)

    def _tell(self, sequence: Sequence, output: Output) -> None:
        try:
            sequence.on_output(output)
        except Exception:
            logger.exception("on_output of request %d raised; the request is cancelled", output.request_id)
            sequence.on_output = _nobody
            self.cancel(output.request_id)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """The last output of a request that no sampled token ended, with the text that was held back."""
        request = sequence.request
        self._sequences.pop(request.id, None)
        cached = request.num_cached_tokens
        rest = sequence.rest_of_text()
        self._tell(sequence, Output(request.id, rest, (), (), reason, None, error, num_cached_tokens=cached))

    def _on_end(self, request: Request) -> None:
        """The control plane has ended a request."""
        self._runner.release(request)
        if request.state is State.CANCELLED:
            self._finish(self._sequences[request.id], "cancelled")

    def _end_everybody(self) -> None:
        with self._inbox:
            self._inbox.close()
            mail = self._inbox.take()
        for sequence in [*self._sequences.values(), *mail.submitted]:
            self._finish(sequence, "error", self._obituary())
        for call in mail.calls:
            call.future.set_exception(EngineDead(self._obituary()))
        self._on_flush()
        try:
            self._plane.close()
        except Exception:
            logger.exception("the requests that had not ended are missing from the record")


def _nobody(output: Output) -> None:
    """Listens to a request whose own listener has failed."""
