"""POST /v1/completions."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from runtime.serving.answer import Answer, encode_json, event
from runtime.serving.errors import ApiError
from runtime.serving.generation import Delta, Generation
from runtime.serving.logprobs import CompletionLogprobs, joined
from runtime.serving.protocol import CompletionBody
from runtime.serving.service import Origin, Service, sampling


def router(service: Service) -> APIRouter:
    """The endpoint, for this service."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Answer:
        """Continue a prompt, or several: text or token ids."""
        service.check_model(body.model)
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "echo: not together with logprobs, as prompts get none here", "echo")
        params = sampling(lambda: body.sampling_params(body.max_tokens, body.logprobs))
        prompts = await _prompts(service, body.prompt)
        echoes = _echoes(service, body, prompts)
        generation = service.generate(prompts, params, Origin.of(request), body)
        form = _Form(service, generation, body, echoes)
        return Answer(generation, form, stream=body.stream, timeout_s=service.limits.request_timeout_s)

    return routes


async def _prompts(service: Service, prompt: Any) -> list[list[int]]:
    """The prompts of a request, in tokens."""
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    if len(several) > service.limits.max_prompts:
        raise ApiError(400, f"prompt: {len(several)} prompts; at most {service.limits.max_prompts} at once", "prompt")
    codec = service.codec
    return [await codec.encode(p) if isinstance(p, str) else codec.check(p, "prompt") for p in several]


def _echoes(service: Service, body: CompletionBody, prompts: list[list[int]]) -> list[str]:
    """For each choice what stands in front of it."""
    if not body.echo:
        return [""] * (len(prompts) * body.n)
    given = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    texts = [
        text if isinstance(text, str) else service.codec.decode(ids)
        for text, ids in zip(given if len(given) == len(prompts) else prompts, prompts, strict=True)
    ]
    return [text for text in texts for _ in range(body.n)]


class _Form:
    """OpenAI's text_completion."""

    def __init__(self, service: Service, generation: Generation, body: CompletionBody, echoes: list[str]) -> None:
        self._generation = generation
        self._body = body
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(generation.created),
            "model": service.model,
        }
        count = len(generation.choices)
        self._echoes = echoes
        self._logprobs = None if body.logprobs is None else [CompletionLogprobs(service.codec) for _ in range(count)]
        self._taken: list[list[Delta]] = [[] for _ in range(count)]

    def events(self, deltas: Sequence[Delta]) -> bytes:
        return b"".join([event(self._chunk(delta)) for delta in deltas])

    def _chunk(self, delta: Delta) -> dict[str, Any]:
        echo, self._echoes[delta.index] = self._echoes[delta.index], ""
        choice = self._choice(delta, echo + delta.text, self._logprobs_of(delta))
        usage = {"usage": self._generation.usage().as_dict()} if self._body.wants_usage_throughout else {}
        return {**self._head, "choices": [choice], **usage}

    def last_events(self) -> bytes:
        if not self._body.wants_usage:
            return b""
        return event({**self._head, "choices": [], "usage": self._generation.usage().as_dict()})

    def take(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            self._taken[delta.index].append(delta)

    def whole(self) -> bytes:
        choices = []
        for echo, deltas in zip(self._echoes, self._taken, strict=True):
            parts = [part for part in map(self._logprobs_of, deltas) if part is not None]
            text = echo + "".join(delta.text for delta in deltas)
            choices.append(self._choice(deltas[-1], text, joined(parts) if self._logprobs else None))
        return encode_json({**self._head, "choices": choices, "usage": self._generation.usage().as_dict()})

    def _logprobs_of(self, delta: Delta) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        return self._logprobs[delta.index].of(delta.token_ids, delta.logprobs)

    @staticmethod
    def _choice(last: Delta, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "index": last.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
        }
