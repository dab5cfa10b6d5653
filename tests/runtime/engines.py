"""What the engine's tests share: a small model whose tokens depend on all that came before, engines, and listeners."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers

from policies.contract import Scheduler
from policies.records import DECISIONS, REQUESTS, STEPS
from policies.replica_state import Limits
from policies.stack import PolicyStack, StackSpec
from runtime.engine import Engine
from runtime.sampling.params import SamplingParams
from runtime.sequence import Completion, Output
from runtime.tokenizer import Tokenizer
from runtime.weights import LoadedModel, load_model

PATIENCE = 120.0
"""Seconds after which a test says that nothing will come any more."""


@functools.cache
def _sharp_tiny() -> LoadedModel:
    loaded = load_model("tiny", load_format="dummy", seed=3)
    with torch.no_grad():
        for name, weight in loaded.model.weight_slots():
            # As they are born, weights are so small that the model repeats its last token. These look at everything.
            if not name.endswith("norm.weight"):
                weight.mul_(4.0 if "embed" in name else 15.0)
    return loaded


def tiny(tokenizer: Tokenizer | None = None) -> LoadedModel:
    """A random model of 512 tokens with sharp logits; `tokenizer` may be any whose first 512 ids are tokens."""
    return replace(_sharp_tiny(), tokenizer=tokenizer)


def transformers_model(loaded: LoadedModel) -> Any:
    """transformers' own Llama on the weights we run; that we read them right is tested beside the model."""
    config = loaded.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_model_len,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).eval()
    left = theirs.load_state_dict(dict(loaded.model.weight_slots()), strict=False)
    assert not left.unexpected_keys
    assert left.missing_keys == ["lm_head.weight"]  # tied to the embedding
    return theirs


@dataclass
class Rows:
    """A recorder that keeps every row, as a dict by column."""

    requests: dict[int, dict[str, Any]] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)

    def request(self, row: tuple[object, ...]) -> None:
        named: dict[str, Any] = dict(zip(REQUESTS, row, strict=True))
        named = {name: list(value) if isinstance(value, list) else value for name, value in named.items()}
        assert named["request_id"] not in self.requests, "a request has two rows"
        self.requests[named["request_id"]] = named

    def step(self, row: tuple[object, ...]) -> None:
        self.steps.append(dict(zip(STEPS, row, strict=True)))

    def decision(self, row: tuple[object, ...]) -> None:
        self.decisions.append(dict(zip(DECISIONS, row, strict=True)))

    @property
    def num_preemptions(self) -> int:
        return sum(row["preemptions"] for row in self.requests.values())


def serve(
    loaded: LoadedModel,
    scheduler: str | Scheduler = "mixed",
    *,
    recorder: Rows | None = None,
    admission: str = "full_prompt",
    seed: int = 0,
    check: bool = True,
    **limits: Any,
) -> Engine:
    """An engine under these policies; `scheduler` by name, or an object."""
    size = limits.setdefault("block_size", 16)
    limits.setdefault("num_blocks", 512)
    limits.setdefault("max_model_len", min(1024, loaded.config.max_model_len))
    name = scheduler if isinstance(scheduler, str) else "mixed"
    stack: PolicyStack = StackSpec(scheduler=name, admission=admission).build(block_size=size)
    if not isinstance(scheduler, str):
        stack.scheduler = scheduler
    return Engine(loaded, Limits(**limits), stack, recorder=recorder, seed=seed, check=check)


def greedy(max_tokens: int | None, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


def tokens_of(results: list[list[Completion]]) -> list[tuple[int, ...]]:
    """The tokens of each prompt's one completion."""
    assert [c.error for (c,) in results] == [None] * len(results)
    return [completion.token_ids for (completion,) in results]


class Listener:
    """Takes a request's outputs; waits for a number of tokens, or for the end."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self._changed = threading.Condition()

    def __call__(self, output: Output) -> None:
        with self._changed:
            self.outputs.append(output)
            self._changed.notify_all()

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for output in list(self.outputs) for token in output.token_ids)

    @property
    def text(self) -> str:
        return "".join(output.text for output in list(self.outputs))

    @property
    def ended(self) -> bool:
        return bool(self.outputs) and self.outputs[-1].finish_reason is not None

    def wait_for_tokens(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.token_ids) >= count or self.ended, PATIENCE)

    def last(self) -> Output:
        """Waits for the end and returns it."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.ended, PATIENCE), "the request never ended"
        return self.outputs[-1]


def submit_together(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[Listener]:
    """Hand in all prompts before the engine's next plan: what happens then does not hang on the threads' timing."""
    listeners = [Listener() for _ in prompts]
    with engine._inbox:
        for prompt, listener in zip(prompts, listeners, strict=True):
            engine.submit(prompt, params, listener)
    return listeners
