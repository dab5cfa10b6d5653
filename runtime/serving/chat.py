"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from runtime.serving.answer import Answer, encode_json, event
from runtime.serving.generation import Delta, Generation
from runtime.serving.logprobs import chat_logprobs
from runtime.serving.protocol import ChatBody
from runtime.serving.service import Origin, Service, sampling
from runtime.serving.text import TextCodec


def router(service: Service) -> APIRouter:
    """The endpoint, for this service."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatBody, request: Request) -> Answer:
        """Answer a conversation, through the model's chat template."""
        service.check_model(body.model)
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = sampling(lambda: body.sampling_params(limit, logprobs))
        messages = [message.for_template() for message in body.messages]
        token_ids = await service.codec.encode_chat(messages, body.add_generation_prompt)
        generation = service.generate([token_ids], params, Origin.of(request), body, "messages")
        form = _Form(service, generation, body)
        return Answer(generation, form, stream=body.stream, timeout_s=service.limits.request_timeout_s)

    return routes


class _Form:
    """OpenAI's chat.completion and chat.completion.chunk. The role comes with a choice's first piece of text: a piece
    of its own would be taken for the first token by some clients."""

    def __init__(self, service: Service, generation: Generation, body: ChatBody) -> None:
        self._codec: TextCodec = service.codec
        self._generation = generation
        self._body = body
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(generation.created),
            "model": service.model,
        }
        self._taken: list[list[Delta]] = [[] for _ in generation.choices]
        self._begun = [False for _ in generation.choices]

    def events(self, deltas: Sequence[Delta]) -> bytes:
        return b"".join([event(self._chunk(delta)) for delta in deltas])

    def _chunk(self, delta: Delta) -> dict[str, Any]:
        content: dict[str, Any] = {"content": delta.text}
        if not self._begun[delta.index]:
            self._begun[delta.index] = True
            content = {"role": "assistant", **content}
        choice = {"index": delta.index, "delta": content, **self._rest([delta])}
        usage = {"usage": self._generation.usage().as_dict()} if self._body.wants_usage_throughout else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage}

    def last_events(self) -> bytes:
        if not self._body.wants_usage:
            return b""
        usage = self._generation.usage().as_dict()
        return event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage})

    def take(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            self._taken[delta.index].append(delta)

    def whole(self) -> bytes:
        choices = []
        for index, deltas in enumerate(self._taken):
            message = {"role": "assistant", "content": "".join(delta.text for delta in deltas)}
            choices.append({"index": index, "message": message, **self._rest(deltas)})
        usage = self._generation.usage().as_dict()
        return encode_json({**self._head, "object": "chat.completion", "choices": choices, "usage": usage})

    def _rest(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs:
            items = [item for d in deltas for item in chat_logprobs(self._codec, d.token_ids, d.logprobs)]
            logprobs = {"content": items}
        last = deltas[-1]
        return {"logprobs": logprobs, "finish_reason": last.finish_reason, "stop_reason": last.stop_reason}
