"""POST /generate, in SGLang's form: the text of a stream's events is all of it so far."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from runtime.serving.answer import Answer, encode_json, event
from runtime.serving.generation import Delta, Generation
from runtime.serving.logprobs import LOWEST
from runtime.serving.protocol import NativeBody
from runtime.serving.service import Origin, Service, sampling


def router(service: Service) -> APIRouter:
    """The endpoint, for this service."""
    routes = APIRouter(tags=["SGLang"])

    @routes.post("/generate", response_model=None)
    async def generate(body: NativeBody, request: Request) -> Answer:
        """Continue a prompt: `text` or `input_ids`."""
        params = sampling(body.params)
        field = "input_ids" if body.text is None else "text"
        token_ids = (
            service.codec.check(body.input_ids or [], field)
            if body.text is None
            else await service.codec.encode(body.text)
        )
        generation = service.generate([token_ids], params, Origin.of(request), body, field)
        form = _Form(generation, len(token_ids), body)
        return Answer(generation, form, stream=body.stream, timeout_s=service.limits.request_timeout_s)

    return routes


class _Form:
    """SGLang's {"text", "output_ids", "meta_info"}: one, or a list of them where n is above 1."""

    def __init__(self, generation: Generation, num_prompt_tokens: int, body: NativeBody) -> None:
        self._generation = generation
        self._num_prompt_tokens = num_prompt_tokens
        self._body = body
        self._id = uuid.uuid4().hex
        self._texts = ["" for _ in generation.choices]
        self._token_ids: list[list[int]] = [[] for _ in generation.choices]
        self._logprobs: list[list[list[Any]]] = [[] for _ in generation.choices]
        self._top: list[list[list[list[Any]]]] = [[] for _ in generation.choices]
        self._last: list[Delta | None] = [None for _ in generation.choices]

    def events(self, deltas: Sequence[Delta]) -> bytes:
        written = []
        for delta in deltas:
            self.take([delta])
            written.append(event({**self._state(delta.index), "index": delta.index}))
        return b"".join(written)

    def last_events(self) -> bytes:
        return b""

    def take(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            index = delta.index
            self._texts[index] += delta.text
            self._token_ids[index] += delta.token_ids
            self._last[index] = delta
            for token_id, one in zip(delta.token_ids, delta.logprobs, strict=bool(delta.logprobs)):
                self._logprobs[index].append([max(one.sampled, LOWEST), token_id, None])
                self._top[index].append([[max(logprob, LOWEST), other, None] for other, logprob in one.top])

    def whole(self) -> bytes:
        answers = [self._state(index) for index in range(len(self._texts))]
        return encode_json(answers[0] if len(answers) == 1 else answers)

    def _state(self, index: int) -> dict[str, Any]:
        last = self._last[index]
        assert last is not None
        reason = None
        if last.finish_reason == "length":
            reason = {"type": "length", "length": len(self._token_ids[index])}
        elif last.finish_reason is not None:
            reason = {"type": last.finish_reason, "matched": last.stop_reason}
        info: dict[str, Any] = {
            "id": self._id,
            "finish_reason": reason,
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": len(self._token_ids[index]),
            "cached_tokens": self._generation.choices[index].num_cached_tokens,
        }
        if self._body.return_logprob:
            info["output_token_logprobs"] = self._logprobs[index]
            info["output_top_logprobs"] = self._top[index]
        return {"text": self._texts[index], "output_ids": self._token_ids[index], "meta_info": info}
