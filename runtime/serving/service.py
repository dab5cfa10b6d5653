"""What the handlers share: the engine, the text, the limits of the edge, and how a prompt becomes a generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.requests import Request

from runtime.sampling.params import InvalidSamplingParams, SamplingParams
from runtime.serving.engine_client import EngineClient, Prompt
from runtime.serving.errors import ApiError, bad_request
from runtime.serving.generation import Generation
from runtime.serving.metrics import ServerMetrics
from runtime.serving.protocol import ForPolicies
from runtime.serving.text import TextCodec


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """What the front lets in.

    Attributes:
        max_queued_requests, max_queued_tokens: of requests that wait for their first token, and of their prompts; more
            are refused with 503. Who finds nobody waiting may bring any number of tokens.
        max_body_bytes: of a request's body.
        request_timeout_s: seconds that an answer may take once its prompt is in tokens; 0: any.
        max_prompts: prompts of one completions request.
    """

    max_queued_requests: int = 1024
    max_queued_tokens: int = 1_000_000
    max_body_bytes: int = 16 * 2**20
    request_timeout_s: float = 600.0
    max_prompts: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_queued_requests", "max_queued_tokens", "max_body_bytes", "max_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.request_timeout_s < 0:
            raise ValueError(f"request_timeout_s must be 0 or more, not {self.request_timeout_s}")


@dataclass(frozen=True, slots=True)
class Origin:
    """Who sent a request, and when (seconds of `time.monotonic`)."""

    tenant: str
    arrived: float

    @classmethod
    def of(cls, request: Request) -> Origin:
        """From what the middleware has found out."""
        return cls(request.state.tenant, request.state.arrived)


class Service:
    """One model, served. `draining`: no new requests are taken."""

    def __init__(self, client: EngineClient, codec: TextCodec, model: str, limits: EdgeLimits) -> None:
        self.client = client
        self.codec = codec
        self.model = model
        self.limits = limits
        self.metrics = ServerMetrics(client, model)
        self.draining = False
        self.created = int(time.time())

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for another model than the one that is served; None is this one."""
        if name is not None and name != self.model:
            raise ApiError(404, f"The model `{name}` does not exist. This server has `{self.model}`.", "model")

    def check_length(self, num_prompt_tokens: int, max_tokens: int | None, field: str) -> None:
        """Raises ApiError, with both numbers, for a sequence longer than can be served."""
        longest = self.client.info.limits.max_total_tokens
        if num_prompt_tokens < 1:
            raise ApiError(400, f"{field}: the prompt is empty; give at least one token", field)
        if num_prompt_tokens >= longest:
            raise ApiError(
                400,
                f"the prompt has {num_prompt_tokens} tokens; the limit of {longest} for prompt and output leaves room "
                f"for {longest - 1} at most",
                field,
            )
        if max_tokens is not None and num_prompt_tokens + max_tokens > longest:
            raise ApiError(
                400,
                f"the prompt's {num_prompt_tokens} tokens and max_tokens={max_tokens} make "
                f"{num_prompt_tokens + max_tokens}; the limit is {longest} tokens for both: lower max_tokens to "
                f"{longest - num_prompt_tokens}, or shorten the prompt",
                "max_tokens",
            )

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        origin: Origin,
        body: ForPolicies,
        field: str = "prompt",
    ) -> Generation:
        """Hand in prompts, each with `params.n` continuations. Raises ApiError where they are not to be served."""
        try:
            params.check_vocab(self.client.info.vocab_size)
            details = body.details(origin.tenant)
        except (InvalidSamplingParams, ValueError) as error:
            raise bad_request(error) from None
        for token_ids in prompts:
            self.check_length(len(token_ids), params.max_tokens, field)
        self._check_room(len(prompts) * params.n, sum(map(len, prompts)) * params.n)
        handed_in = [Prompt(token_ids, params, details) for token_ids in prompts]
        generation = Generation.start(self.client, self.codec, handed_in, self.metrics)
        self.metrics.arrived(generation.call.request_ids, handed_in, origin.arrived)
        return generation

    def _check_room(self, num_requests: int, num_tokens: int) -> None:
        if self.client.error is not None:
            raise ApiError(503, self.client.error)
        if self.draining:
            self.metrics.rejected("draining")
            raise ApiError(503, "the server takes no new requests: it is being drained", retry_after=5)
        queued, queued_tokens = self.client.num_queued
        limits = self.limits
        if num_requests > limits.max_queued_requests:
            raise ApiError(
                400,
                f"{num_requests} continuations at once; the queue holds {limits.max_queued_requests}: ask for fewer",
            )
        if queued + num_requests > limits.max_queued_requests:
            self.metrics.rejected("requests")
            raise ApiError(
                503, f"{queued} requests wait already; the queue holds {limits.max_queued_requests}", retry_after=1
            )
        if queued and queued_tokens + num_tokens > limits.max_queued_tokens:
            self.metrics.rejected("tokens")
            raise ApiError(
                503,
                f"{queued_tokens} prompt tokens wait already, and this request has {num_tokens}; the queue holds "
                f"{limits.max_queued_tokens}",
                retry_after=1,
            )


def sampling(build: Callable[[], SamplingParams]) -> SamplingParams:
    """Call something that makes `SamplingParams`; what they refuse is a 400 that names the field."""
    try:
        return build()
    except InvalidSamplingParams as error:
        raise bad_request(error) from None
