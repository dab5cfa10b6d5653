"""Whether a sampled token ends its request, decided on the host.

The order is vLLM's: end-of-sequence token, then the request's stop tokens, then the length limits.
`min_tokens` has no part in it: below it the stop tokens are masked in the logits
(`masked_below_min_tokens`), and the length limits hold all the same. Stop strings need text, so they are
the detokeniser's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.sampling.params import SamplingParams


@dataclass(frozen=True, slots=True)
class StopReason:
    """Why a request ended: the `finish_reason` and `stop_reason` of the OpenAI and vLLM responses.

    `detail` is the stop token's id or the stop string; None for an end-of-sequence token and for a length
    limit.
    """

    kind: Literal["stop", "length"]
    detail: int | str | None = None


def check_stop(
    token_id: int,
    num_output_tokens: int,
    num_prompt_tokens: int,
    params: SamplingParams,
    eos_token_ids: Collection[int],
    max_model_len: int,
) -> StopReason | None:
    """Whether a request ends with the token it was just given.

    Args:
        token_id: the newest output token.
        num_output_tokens: the output's length, that token included.
        eos_token_ids: the model's end-of-sequence tokens.
        max_model_len: the most tokens a sequence may have, prompt and output together.
    """
    if token_id in eos_token_ids and not params.ignore_eos:
        return StopReason("stop")
    if token_id in params.stop_token_ids:
        return StopReason("stop", token_id)
    if num_prompt_tokens + num_output_tokens >= max_model_len:
        return StopReason("length")
    if params.max_tokens is not None and num_output_tokens >= params.max_tokens:
        return StopReason("length")
    return None


def text_token_ids(new_token_ids: Sequence[int], reason: StopReason | None, params: SamplingParams) -> Sequence[int]:
    """The tokens whose text is shown: a stop token that ends the output is not, unless it was asked for.

    Args:
        new_token_ids: tokens of the output, ending with the one that gave `reason`.
    """
    if reason is not None and reason.kind == "stop" and not params.include_stop_str_in_output:
        return new_token_ids[:-1]
    return new_token_ids


def masked_below_min_tokens(params: SamplingParams, eos_token_ids: Collection[int]) -> tuple[int, ...]:
    """The tokens that may not be sampled before `min_tokens`: those that would end the request, sorted."""
    if params.min_tokens == 0:
        return ()
    eos = () if params.ignore_eos else eos_token_ids
    return tuple(sorted({*params.stop_token_ids, *eos}))
