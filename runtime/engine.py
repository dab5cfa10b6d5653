"""The engine: takes requests in, drives the control plane, runs its steps on the device, streams tokens out."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from policies.contract import CostModel, Recorder
from policies.control_plane import ControlPlane, RequestRefused
from policies.loop import Collect, Deliver, Idle, Launch, step_loop
from policies.plan import Report, Step
from policies.replica_state import Limits
from policies.request import Request, Slo, State
from policies.stack import PolicyStack
from runtime.detokenizer import IncrementalDetokenizer
from runtime.model_runner import Launched, ModelRunner, StepResult
from runtime.sampling.batch import sampling_key
from runtime.sampling.params import SamplingParams
from runtime.sampling.stop import StopReason, check_stop, text_token_ids
from runtime.sequence import FinishReason, Output, Sequence, TokenLogprobs
from runtime.weights import LoadedModel

_FINISH: dict[State, FinishReason] = {
    State.CANCELLED: "cancelled",
    State.DROPPED: "dropped",
    State.REFUSED: "error",
}


class EngineDead(RuntimeError):
    """The engine has stopped on an error and serves nothing any more; its cause is attached."""


@dataclass(frozen=True, slots=True)
class Details:
    """What a request carries beside its prompt and its sampling parameters.

    `forced_length`: end after exactly so many output tokens, whatever they are. Policies do not see it; it replays
    a trace's lengths. `continuation` numbers the requests of one call with n > 1.
    """

    tenant: str = ""
    session: int | None = None
    priority: int = 0
    slo: Slo | None = None
    hints: dict[str, float] = field(default_factory=dict)
    forced_length: int | None = None
    continuation: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished continuation. `error` says why there is none."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    error: str | None = None


class Engine:
    """Serves one model on one device. Use as a context manager, or `close()` it.

    Args:
        loaded: the model, from `runtime.weights.load_model`.
        limits: what the replica holds and runs; `max_model_len` within the model's.
        stack: the policies.
        recorder: takes the rows of the run.
        cost: for policies that plan by predicted cost.
        attention: backend name, or "auto".
        seed: of the random draws of requests without a seed of their own.
        check: verify the control plane's invariants after every step (slow).
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
        seed: int = 0,
        check: bool = False,
    ) -> None:
        if limits.max_model_len > loaded.config.max_model_len:
            raise ValueError(
                f"max_model_len={limits.max_model_len} is beyond the model's {loaded.config.max_model_len}; lower it"
            )
        self.loaded = loaded
        self.limits = limits
        self.tokenizer = loaded.tokenizer
        self._eos = frozenset(loaded.config.eos_token_ids)
        self._seed = seed
        self._start = time.monotonic_ns()
        self._plane = ControlPlane(limits, stack, cost=cost, recorder=recorder, on_end=self._on_end, check=check)
        self._runner = ModelRunner(loaded, self._plane, attention=attention)
        self._sequences: dict[int, Sequence] = {}
        self._ids = itertools.count()
        self._error: BaseException | None = None
        # The inbox: the only thing that other threads touch.
        self._inbox = threading.Condition()
        self._submitted: list[Sequence] = []
        self._cancelled: list[int] = []
        self._closing = False
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
    ) -> int:
        """Hand in a request; returns its id. `on_output` is called on the engine's thread and must be quick.

        The last output has a `finish_reason`; a request that can never be served gets one with an `error`. Raises
        ValueError for a prompt that cannot be encoded and EngineDead when the engine has stopped.
        """
        details = details or Details()
        token_ids = self._encode(prompt)
        params.check_vocab(self.loaded.config.vocab_size)
        cap = self.limits.max_model_len if params.max_tokens is None else params.max_tokens
        with self._inbox:
            self.raise_if_dead()
            request = Request(
                next(self._ids),
                self.now(),
                len(token_ids),
                cap,
                tenant=details.tenant,
                session=details.session,
                priority=details.priority,
                slo=details.slo,
                hints=details.hints,
            )
            sequence = Sequence(
                request,
                token_ids,
                params,
                sampling_key(self._seed, request.id - details.continuation, params, details.continuation),
                on_output,
                self._detokenizer(params),
                details.forced_length,
            )
            self._submitted.append(sequence)
            self._inbox.notify()
        return request.id

    def cancel(self, request_id: int) -> None:
        """End a request in whatever state it is. Its blocks are free before the next step; unknown ids do nothing."""
        with self._inbox:
            self._cancelled.append(request_id)
            self._inbox.notify()

    def generate(
        self,
        prompts: SequenceOf[str] | SequenceOf[SequenceOf[int]],
        params: SamplingParams | SequenceOf[SamplingParams],
        details: SequenceOf[Details] | None = None,
    ) -> list[list[Completion]]:
        """Serve all prompts and wait: for each prompt its `params.n` completions, in order.

        A prompt that can never be served gives completions with an `error`; the others are not affected.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(each)} sampling parameters")
        pending = []
        for i, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
            base = details[i] if details else Details()
            pending.append([self._complete(prompt, one, replace(base, continuation=k)) for k in range(one.n)])
        try:
            return [[future.result() for _, future in group] for group in pending]
        except BaseException:
            for request_id, _ in itertools.chain.from_iterable(pending):
                self.cancel(request_id)
            raise

    def _complete(
        self, prompt: str | SequenceOf[int], params: SamplingParams, details: Details
    ) -> tuple[int, Future[Completion]]:
        future: Future[Completion] = Future()
        outputs: list[Output] = []
        token_ids = self._encode(prompt)

        def on_output(output: Output) -> None:
            outputs.append(output)
            if output.finish_reason is not None:
                future.set_result(_join(outputs, len(token_ids)))

        return self.submit(token_ids, params, on_output, details), future

    async def stream(
        self, prompt: str | SequenceOf[int], params: SamplingParams, details: Details | None = None
    ) -> AsyncIterator[Output]:
        """The outputs of one continuation as they come. Leaving the iteration early cancels the request.

        Raises RequestRefused if it can never be served.
        """
        queue: asyncio.Queue[Output] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        request_id = self.submit(
            prompt, params, lambda output: _call_soon(loop, queue.put_nowait, output), details
        )
        finished = False
        try:
            while not finished:
                output = await queue.get()
                finished = output.finish_reason is not None
                if output.error is not None:
                    raise (RequestRefused if self._error is None else EngineDead)(output.error)
                yield output
        finally:
            if not finished:
                self.cancel(request_id)

    def close(self) -> None:
        """Stop after the step in flight. Requests that have not ended get a last output that says so."""
        with self._inbox:
            self._closing = True
            self._inbox.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, prompt: str | SequenceOf[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{self.loaded.name} has no tokenizer; give token ids instead of text")
            return self.tokenizer.encode(prompt)
        token_ids = list(prompt)
        vocab = self.loaded.config.vocab_size
        bad = next((t for t in token_ids if not 0 <= t < vocab), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is outside the vocabulary of {vocab}")
        return token_ids

    def _detokenizer(self, params: SamplingParams) -> IncrementalDetokenizer | None:
        tokenizer = self.tokenizer
        if tokenizer is None:
            if params.stop:
                raise ValueError(f"{self.loaded.name} has no tokenizer, so it cannot look for stop strings")
            return None
        return IncrementalDetokenizer(tokenizer.id_to_bytes, tokenizer.special_ids, params)

    def raise_if_dead(self) -> None:
        """Raise EngineDead, with its cause, where the engine serves nothing any more."""
        if self._error is not None:
            raise EngineDead(f"the engine has stopped: {self._error}") from self._error
        if self._closing:
            raise EngineDead("the engine is closed")

    # On the engine's thread

    def _main(self) -> None:
        try:
            self._drive()
        except BaseException as error:
            self._error = error
        finally:
            self._runner.close()
            self._end_everybody()

    def _drive(self) -> None:
        loop = step_loop(self._plane, self.limits.lag)
        launched: dict[int, tuple[Launched, int]] = {}
        action = next(loop)
        while True:
            answer: int | Report | None = None
            if isinstance(action, Deliver):
                if self._closing:
                    return
                answer = self._deliver()
            elif isinstance(action, Launch):
                started = self._runner.launch(action.step, self._sequences.__getitem__)
                if started is not None:
                    launched[action.step.index] = (started, self.now())
            elif isinstance(action, Collect):
                answer = self._collect(action.step, *launched.pop(action.step.index))
            elif isinstance(action, Idle):
                self._sleep(action.wake_at)
            action = loop.send(answer)

    def _deliver(self) -> int:
        """Submissions in the order of their stamps, then cancellations: the simulator's order too."""
        with self._inbox:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
        now = self.now()
        for sequence in submitted:
            keys = sequence.new_keys(self.limits.block_size) if self.limits.prefix_caching else ()
            self._sequences[sequence.request.id] = sequence
            try:
                self._plane.submit(sequence.request, now, keys)
            except RequestRefused as refusal:
                self._finish(sequence, Output(sequence.request.id, "", (), finish_reason="error", error=str(refusal)))
        for request_id in cancelled:
            sequence_or_none = self._sequences.get(request_id)
            if sequence_or_none is not None:
                self._plane.cancel(request_id, now, sequence_or_none.num_output_tokens)
        return now

    def _sleep(self, wake_at: int | None) -> None:
        timeout = None if wake_at is None else max(0, wake_at - self.now()) / 1e9
        with self._inbox:
            self._inbox.wait_for(lambda: self._submitted or self._cancelled or self._closing, timeout)

    def _collect(self, step: Step, launched: Launched, launch_ns: int) -> Report:
        result = self._runner.collect(launched)
        report = Report(step, launch_ns, self.now(), result.device_ns)
        outputs = [self._take(i, request, result, report) for i, request in enumerate(result.requests)]
        for sequence, output in filter(None, outputs):
            if output.finish_reason is None:
                sequence.on_output(output)
            else:
                self._finish(sequence, output)
        return report

    def _take(
        self, row: int, request: Request, result: StepResult, report: Report
    ) -> tuple[Sequence, Output] | None:
        """One sampled token: into the sequence, past the stop rules, and out as text."""
        sequence = self._sequences.get(request.id)
        if sequence is None:
            return None  # it ended while this step was in flight
        token_id = result.token_ids[row]
        sequence.token_ids.append(token_id)
        if self.limits.prefix_caching and len(sequence.token_ids) % self.limits.block_size == 0:
            self._plane.extend_keys(request, sequence.new_keys(self.limits.block_size))
        reason = self._stop_reason(sequence, token_id)
        text, reason = self._text(sequence, token_id, reason)
        if reason is not None:
            end = State.LENGTH if reason.kind == "length" else State.STOPPED
            report.finished.append((request, end, sequence.num_output_tokens))
        output = Output(
            request.id,
            text,
            (token_id,),
            self._logprobs(row, result),
            None if reason is None else reason.kind,
            None if reason is None else reason.detail,
            num_cached_tokens=request.num_cached_tokens,
        )
        return sequence, output

    def _stop_reason(self, sequence: Sequence, token_id: int) -> StopReason | None:
        count = sequence.num_output_tokens
        cap = sequence.request.max_tokens
        if sequence.forced_length is not None:
            if count < min(sequence.forced_length, cap):
                return None
            return StopReason("length" if count == cap else "stop")
        params = sequence.params
        if count >= cap and params.max_tokens is None:
            params = replace(params, max_tokens=cap)
        return check_stop(
            token_id, count, sequence.request.num_prompt_tokens, params, self._eos, self.limits.max_model_len
        )

    def _text(
        self, sequence: Sequence, token_id: int, reason: StopReason | None
    ) -> tuple[str, StopReason | None]:
        detokenizer = sequence.detokenizer
        if detokenizer is None:
            return "", reason
        if sequence.forced_length is None:
            shown = text_token_ids([token_id], reason, sequence.params)
        else:
            shown = [token_id]
        text = detokenizer.push(shown)
        if detokenizer.finished_by is not None and sequence.forced_length is None:
            return text, StopReason("stop", detokenizer.finished_by)
        if reason is not None:
            text += detokenizer.flush()
        return text, reason

    def _logprobs(self, row: int, result: StepResult) -> tuple[TokenLogprobs, ...]:
        found = result.logprobs
        if found is None or row not in found.row_numbers:
            return ()
        i = found.row_numbers.index(row)
        top = zip(found.top_ids[i].tolist(), found.top[i].tolist(), strict=True)
        return (TokenLogprobs(float(found.sampled[i]), tuple(top)),)

    def _finish(self, sequence: Sequence, output: Output) -> None:
        """The request's last output. Its slot is free as soon as the step in flight is done with it."""
        del self._sequences[sequence.request.id]
        sequence.on_output(output)

    def _on_end(self, request: Request) -> None:
        """The control plane has ended a request: by itself if its sequence is still here."""
        self._runner.release(request)
        sequence = self._sequences.get(request.id)
        reason = _FINISH.get(request.state)
        if sequence is not None and reason in ("cancelled", "dropped"):
            self._finish(sequence, Output(request.id, "", (), finish_reason=reason))

    def _end_everybody(self) -> None:
        message = "the engine is closed" if self._error is None else f"the engine has stopped: {self._error}"
        self._plane.close()
        with self._inbox:
            self._closing = True
            waiting = self._submitted
            self._submitted = []
        for sequence in [*self._sequences.values(), *waiting]:
            sequence.on_output(Output(sequence.request.id, "", (), finish_reason="error", error=message))
        self._sequences = {}


def _join(outputs: list[Output], num_prompt_tokens: int) -> Completion:
    last = outputs[-1]
    assert last.finish_reason is not None
    return Completion(
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=max(output.num_cached_tokens for output in outputs),
        error=last.error,
    )


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[Output], None], output: Output) -> None:
    if not loop.is_closed():  # the client's loop may be gone; nobody listens then
        loop.call_soon_threadsafe(call, output)
