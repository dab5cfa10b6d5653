"""The engine under measurement: made once for each scheduler, on one loaded model, and fed with random prompts."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from policies.replica_state import Limits
from policies.shapes import default_capture_sizes, default_mixed_capture_sizes
from policies.stack import StackSpec
from runtime.engine import GPU_PLAN_LEAD_NS, Engine
from runtime.memory import profile_num_blocks
from runtime.parallel.ranks import Ranks
from runtime.sampling.params import SamplingParams
from runtime.sequence import Output
from runtime.startup import timed
from runtime.weights import LoadedModel, load_model

STEADY, MIXED = "prefill_first", "mixed"
"""Schedulers: prompts before decodes, where all requests are there at once; and together, where they keep coming."""
MAX_NUM_BATCHED_TOKENS = 8192
MAX_NUM_SEQS = 256
MAX_MODEL_LEN = 4096
CPU_BLOCKS = 1024


def greedy(max_tokens: int) -> SamplingParams:
    """Exactly so many tokens, the most probable ones."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def make_engine(loaded: LoadedModel, scheduler: str, block_size: int) -> Engine:
    """The engine as all works measure it: no prefix caching, one step ahead, graphs where there is a card."""
    cuda = loaded.model.device.type == "cuda"
    seconds: dict[str, float] = {}
    sizes: dict[str, Any] = {
        "block_size": block_size,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
        "max_model_len": min(MAX_MODEL_LEN, loaded.config.max_model_len),
    }
    with timed(seconds, "memory_profile"):
        num_blocks = profile_num_blocks(loaded, **sizes) if cuda else CPU_BLOCKS
    limits = Limits(
        num_blocks,
        **sizes,
        prefix_caching=False,
        capture_sizes=default_capture_sizes(MAX_NUM_SEQS) if cuda else (),
        mixed_capture_sizes=default_mixed_capture_sizes(sizes["max_num_batched_tokens"]) if cuda else (),
        lag=1,
        plan_lead_ns=GPU_PLAN_LEAD_NS if cuda else None,
    )
    engine = Engine(loaded, limits, StackSpec(scheduler).build(block_size=block_size))
    engine.startup_seconds.update(seconds)
    return engine


class Bench:
    """One model, and the engine that serves it at the moment: a model serves one engine at a time."""

    def __init__(self, preset: str, device: str, block_size: int, ranks: Ranks | None = None) -> None:
        self.loaded = load_model(preset, load_format="dummy", dtype=torch.bfloat16, device=device, ranks=ranks)
        self.device = self.loaded.model.device
        self._block_size = block_size
        self._engine: Engine | None = None
        self._scheduler = ""
        self._random = np.random.default_rng(0)
        self.synchronize()

    def engine(self, scheduler: str = STEADY, *, warm: bool = True) -> Engine:
        """The engine with this scheduler: the one there is if it has it, else a new one, which `warm` warms up."""
        if self._engine is not None and self._scheduler == scheduler:
            return self._engine
        self.close_engine()
        self._engine = make_engine(self.loaded, scheduler, self._block_size)
        self._scheduler = scheduler
        if warm:
            self.warm_up()
        return self._engine

    def warm_up(self) -> None:
        """Steps of every kind, so that no work pays for first-time compilation: full, mixed, and of each width."""
        assert self._engine is not None
        length = min(1024, self._engine.limits.max_model_len // 2)
        for count in (1, 9):
            self.generate(self.prompts([length] * count), [4] * count)
        gc.collect()
        gc.freeze()  # what lives as long as the engine is not looked at again

    def prompts(self, lengths: list[int]) -> list[list[int]]:
        """Random token ids, new ones with every call."""
        vocab = self.loaded.config.vocab_size
        return [self._random.integers(0, vocab, length).tolist() for length in lengths]

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> float:
        """Seconds of one generate call. Raises RuntimeError where a request did not get all its tokens."""
        assert self._engine is not None
        params = [greedy(most) for most in max_tokens]
        started = time.perf_counter()
        completions = self._engine.generate(prompts, params)
        seconds = time.perf_counter() - started
        for (completion,), wanted in zip(completions, max_tokens, strict=True):
            if len(completion.token_ids) != wanted:
                raise RuntimeError(f"{len(completion.token_ids)} tokens instead of {wanted}: {completion.error}")
        return seconds

    def submit(self, prompt: list[int], max_tokens: int, on_output: Callable[[Output], None]) -> int:
        """Hand in one request; returns its id."""
        assert self._engine is not None
        return self._engine.submit(prompt, greedy(max_tokens), on_output)

    def close_engine(self) -> None:
        """Give the KV cache back."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.close()
            del engine
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
