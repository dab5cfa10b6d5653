"""Shared by the runtime's tests: the default model, prompts, and a model driven by hand over the paged cache."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from runtime.attention import get_backend
from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache
from runtime.models.llama import LlamaModel
from runtime.ops import get_ops
from runtime.weights import DEFAULT_MODEL, LoadedModel, load_model

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Question: What is 17 + 25?\nAnswer:",
    "Il était une fois, dans un petit village de montagne,",
    "List three colours, separated by commas:",
    "A lighthouse keeper lived alone on a small island, some two miles from the coast. Every evening he climbed the "
    "hundred and twelve steps to the lamp, cleaned the glass, filled the tank and lit the wick. In winter the boat "
    "that brought his bread and his letters came only once a month, and in a bad year not even that. One night, as "
    "the wind turned to the north, he saw a light on the water where no ship should have been. He took his coat and",
    'import json\n\n\ndef read_lines(path):\n    """Yield one object a line."""\n    with open(path) as file:\n',
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Shopping list:\n- 2 kg of flour\n- 12 eggs\n- 500 g of butter\n- yeast\n- salt\n\nWith these I am going to make",
    "Hello",
    "Translate into French: Where is the railway station?\n",
    "東京は日本の首都です。人口は",
    "SELECT name, COUNT(*) FROM orders JOIN customers ON orders.customer = customers.id WHERE",
    "Write a short poem about glaciers.",
    "Temperature on Monday: 18.5 °C; on Tuesday: 21.0 °C; on Wednesday: 19.7 °C. The mean of the three is",
    "La révolution industrielle commence en Angleterre au XVIIIe siècle, puis gagne le continent. Les premières usines",
    "Ünïcödé: naïve café, Straße, smørrebrød, ☃ ♞ 🚀, ∑ x² ≤ π. In plain ASCII that is",
    "Explain in two sentences why the sky is blue during the day and red in the evening, so that a child of eight who "
    "has never heard of wavelengths can follow.",
    "<html>\n  <head><title>Bees</title></head>\n  <body>\n    <h1>",
    "To be, or not to be, that is the question:\n",
)


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The default model in float32, fetched the way a user's first run fetches it."""
    return load_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Twenty prompts of a few to a hundred tokens."""
    return list(PROMPTS)


@dataclass
class RunningSequence:
    """One sequence of `HandRunner`."""

    tokens: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


class HandRunner:
    """Drives a model step by step with blocks kept by hand, the way the engine will, but with no policy.

    `shuffle` hands out blocks in a random order; otherwise they are contiguous. What block tables hold past a
    sequence's end is junk on purpose. A plan's decodes come first and are declared as such.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        num_blocks: int,
        block_size: int = 16,
        shuffle: int | None = None,
        attention: str = "sdpa",
        ops: str = "reference",
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.device = model.device
        dtype = kv_dtype or model.dtype
        self.cache = PagedKVCache(model.config, num_blocks, block_size, dtype=dtype, device=model.device)
        self.attention, self.ops = get_backend(attention, model.device), get_ops(ops, model.device)
        self.free = list(range(num_blocks))
        if shuffle is not None:
            random.Random(shuffle).shuffle(self.free)
        self.sequences: dict[int, RunningSequence] = {}

    def add(self, key: int, tokens: Sequence[int]) -> None:
        self.sequences[key] = RunningSequence(list(tokens))

    def remove(self, key: int) -> None:
        self.free += self.sequences.pop(key).blocks

    def step(self, plan: Mapping[int, int], pad_rows: int = 0, pad_sequences: int = 0) -> dict[int, Tensor]:
        """Run `plan` ({sequence: tokens}) in one forward pass; logits [tokens, vocab_size] of each sequence."""
        inputs = self._inputs(plan, pad_rows, pad_sequences)
        self.model.attach(self.cache, self.attention, self.ops)
        hidden = self.model.forward(inputs)
        logits, row = {}, 0
        for key, count in plan.items():
            logits[key] = self.model.logits(hidden[row : row + count])
            self.sequences[key].num_computed += count
            row += count
        return logits

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, chunk: int = 64) -> list[list[int]]:
        """Greedy tokens of every prompt. One prompt joins each step, in chunks, while the others decode."""
        waiting = list(enumerate(prompts))
        done: dict[int, list[int]] = {}
        while waiting or self.sequences:
            if waiting:
                self.add(*waiting.pop(0))
            plan = {k: min(chunk, len(s.tokens) - s.num_computed) for k, s in self.sequences.items()}
            for key, logits in self.step(plan).items():
                sequence = self.sequences[key]
                if sequence.num_computed < len(sequence.tokens):
                    continue
                sequence.tokens.append(int(logits[-1].argmax()))
                output = sequence.tokens[len(prompts[key]) :]
                if len(output) == max_tokens:
                    done[key] = output
                    self.remove(key)
        return [done[i] for i in range(len(prompts))]

    def _inputs(self, plan: Mapping[int, int], pad_rows: int, pad_sequences: int) -> ForwardInputs:
        size = self.cache.block_size
        ids, positions, slots, query_lens, seq_lens = [], [], [], [], []
        for key, count in plan.items():
            sequence = self.sequences[key]
            end = sequence.num_computed + count
            while len(sequence.blocks) * size < end:
                sequence.blocks.append(self.free.pop(0))
            for position in range(sequence.num_computed, end):
                ids.append(sequence.tokens[position])
                positions.append(position)
                slots.append(sequence.blocks[position // size] * size + position % size)
            query_lens.append(count)
            seq_lens.append(end)
        pad = pad_rows + pad_sequences  # a padded sequence has one row and no length
        ids, positions, slots = ids + [0] * pad, positions + [0] * pad, slots + [-1] * pad
        query_lens += [1] * pad_sequences
        seq_lens += [0] * pad_sequences
        tables = [self.sequences[key].blocks for key in plan] + [[]] * pad_sequences
        width = max(len(table) for table in tables) + 1
        junk = [[*table, *([10**6] * (width - len(table)))] for table in tables]

        def tensor(values: object, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        return ForwardInputs(
            input_ids=tensor(ids, torch.int64),
            positions=tensor(positions, torch.int64),
            slot_mapping=tensor(slots, torch.int64),
            query_start_loc=tensor([0, *itertools.accumulate(query_lens)], torch.int32),
            seq_lens=tensor(seq_lens, torch.int32),
            block_table=tensor(junk, torch.int32),
            host_query_lens=query_lens,
            host_seq_lens=seq_lens,
            num_decodes=sum(1 for _ in itertools.takewhile(lambda n: n == 1, query_lens)),
        )


@pytest.fixture(scope="session")
def hand_runner() -> type[HandRunner]:
    """The class `HandRunner`, for tests to make their own."""
    return HandRunner


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """After the test no thread of an engine runs."""
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name == "engine" or name.startswith("model-runner")]
