"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from runtime.serving.protocol import DetokenizeBody, TokenizeBody
from runtime.serving.service import Service


def router(service: Service) -> APIRouter:
    """The endpoints, for this service."""
    routes = APIRouter(tags=["Tokenizer"])

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Token ids of a text, or of messages after the chat template."""
        service.check_model(body.model)
        if body.messages is not None:
            messages = [message.for_template() for message in body.messages]
            tokens = await service.codec.encode_chat(messages, body.add_generation_prompt)
        else:
            tokens = await service.codec.encode(body.prompt or "", body.add_special_tokens)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": service.client.info.limits.max_total_tokens}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        """Text of token ids."""
        service.check_model(body.model)
        token_ids = service.codec.check(body.tokens, "tokens")
        return {"prompt": service.codec.decode(token_ids, body.skip_special_tokens)}

    return routes
