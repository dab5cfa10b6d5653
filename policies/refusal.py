"""Requests that could never be served, told when they come; and a policy that serves nobody."""

from __future__ import annotations

from policies.replica_state import Limits
from policies.request import Request


class RequestRefused(ValueError):
    """This request can never be served here; the message says why, with both numbers."""


class PolicyStalled(RuntimeError):
    """The policy plans nothing although requests wait, nothing is in flight, and it did not ask to be woken."""


def refusal(request: Request, limits: Limits) -> str | None:
    """Why a replica of its own could not serve it; None where it could."""
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
