"""Greedy tokens of the engine, under every way of scheduling them, against the transformers package."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from policies.contract import View
from policies.plan import Mode, Plan, Report
from policies.request import Request, State
from runtime.engine import Details
from runtime.weights import LoadedModel
from tests.runtime.engines import Rows, greedy, serve, submit_together, tiny, tokens_of, transformers_model

TOKENS, FEWER = 24, 12
"""How many of each prompt: in the batch held against transformers, and in the other ways of scheduling."""
SCHEDULERS = ("mixed", "sarathi,chunk_size=40", "prefill_first", "static,max_batch_size=8")
PREAMBLE = (
    "You are a careful assistant. You answer in one short paragraph, in plain words, without lists or headings, and "
    "you say so when you do not know something.\n\n"
)

Tokens = tuple[int, ...]


@pytest.fixture(scope="module")
def token_prompts(smollm2: LoadedModel, prompts: list[str]) -> list[list[int]]:
    """Twenty prompts; eight of them begin alike."""
    assert smollm2.tokenizer is not None
    return [smollm2.tokenizer.encode(PREAMBLE * (i >= 12) + text) for i, text in enumerate(prompts)]


@pytest.fixture(scope="module")
def together(smollm2: LoadedModel, token_prompts: list[list[int]]) -> list[Tokens]:
    """The engine's tokens in one batch of all prompts, lag 0."""
    with serve(smollm2) as engine:
        return tokens_of(engine.generate(token_prompts, greedy(TOKENS)))


@pytest.fixture(scope="module")
def reference(smollm2: LoadedModel, token_prompts: list[list[int]], together: list[Tokens]) -> list[Tokens]:
    """Tokens that are transformers' own greedy ones.

    If each token is transformers' choice after the ones before it, then by induction all are what it would generate.
    One forward pass shows that for a whole prompt, where generating takes one a token.
    """
    model = transformers_model(smollm2)
    sequences = [[*prompt, *output] for prompt, output in zip(token_prompts, together, strict=True)]
    for group in (range(start, start + 5) for start in range(0, 20, 5)):
        length = max(len(sequences[i]) for i in group)
        padded = torch.tensor([sequences[i] + [0] * (length - len(sequences[i])) for i in group])
        with torch.inference_mode():
            hidden = model.model(padded).last_hidden_state  # causal: what follows a sequence does not touch it
            for row, i in enumerate(group):
                before = len(token_prompts[i]) - 1
                chosen = model.lm_head(hidden[row, before : before + TOKENS]).argmax(-1)
                assert tuple(chosen.tolist()) == together[i]
    return together


@pytest.fixture(scope="module")
def few_prompts(token_prompts: list[list[int]]) -> list[list[int]]:
    """Every other prompt: ten, of which four begin alike."""
    return token_prompts[::2]


@pytest.fixture(scope="module")
def few(reference: list[Tokens]) -> list[Tokens]:
    """Their first tokens, which are transformers' own."""
    return [tokens[:FEWER] for tokens in reference[::2]]


def test_tokens_of_a_batch_equal_those_of_transformers(reference: list[Tokens]) -> None:
    assert [len(output) for output in reference] == [TOKENS] * 20


@pytest.mark.slow
def test_tokens_of_a_prompt_alone_equal_those_in_a_batch(
    smollm2: LoadedModel, few_prompts: list[list[int]], few: list[Tokens]
) -> None:
    with serve(smollm2, lag=1) as engine:
        alone = [tokens_of(engine.generate([prompt], greedy(FEWER)))[0] for prompt in few_prompts[::3]]
    assert alone == few[::3]


@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "lag"), [("sarathi,chunk_size=40", 1), ("mixed", 0)])
def test_tokens_survive_small_chunks(
    smollm2: LoadedModel, few_prompts: list[list[int]], few: list[Tokens], scheduler: str, lag: int
) -> None:
    rows = Rows()
    with serve(smollm2, scheduler, recorder=rows, lag=lag, max_num_batched_tokens=64, prefix_caching=False) as engine:
        assert tokens_of(engine.generate(few_prompts, greedy(FEWER))) == few
    assert sum(row["kind"] == "chunk" for row in rows.decisions) > len(few_prompts)
    assert any(step["num_decodes"] and step["num_chunks"] for step in rows.steps)


@pytest.mark.slow
def test_tokens_survive_static_batching(smollm2: LoadedModel, few_prompts: list[list[int]], few: list[Tokens]) -> None:
    with serve(smollm2, "static,max_batch_size=4", lag=1) as engine:
        assert tokens_of(engine.generate(few_prompts, greedy(FEWER))) == few


def _too_few_blocks(prompts: list[list[int]], block_size: int = 16) -> int:
    """Enough for every prompt to start and for each to end alone, not for all to end together."""
    at_start = [len(prompt) // block_size + 1 for prompt in prompts]
    at_end = [(len(prompt) + FEWER) // block_size + 1 for prompt in prompts]
    return max(sum(at_start) + 1, *at_end)


@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "lag"), [("mixed", 1), ("prefill_first", 0)])
def test_tokens_survive_preemption(
    smollm2: LoadedModel, few_prompts: list[list[int]], few: list[Tokens], scheduler: str, lag: int
) -> None:
    rows = Rows()
    num_blocks = _too_few_blocks(few_prompts)
    with serve(smollm2, scheduler, recorder=rows, num_blocks=num_blocks, lag=lag, prefix_caching=False) as engine:
        assert tokens_of(engine.generate(few_prompts, greedy(FEWER))) == few
    assert rows.num_preemptions > 0


@pytest.mark.slow
def test_tokens_survive_prefix_hits(smollm2: LoadedModel, few_prompts: list[list[int]], few: list[Tokens]) -> None:
    with serve(smollm2, lag=1, max_num_batched_tokens=48) as engine:
        first = engine.generate(few_prompts, greedy(FEWER))
        again = engine.generate(few_prompts, greedy(FEWER))
    assert tokens_of(first) == tokens_of(again) == few
    # Those that begin alike found what the first of them had computed, and the second time round all did.
    assert sum(c.num_cached_tokens > 0 for (c,) in first) >= 3
    assert all(c.num_cached_tokens >= (c.num_prompt_tokens - 1) // 16 * 16 for (c,) in again)


@pytest.mark.slow
def test_preempted_requests_find_their_own_blocks_again(
    smollm2: LoadedModel, few_prompts: list[list[int]], few: list[Tokens]
) -> None:
    rows, asked = Rows(), few_prompts[:6]  # no two begin alike: what one finds is its own
    limits: dict[str, Any] = {"num_blocks": _too_few_blocks(asked), "max_num_batched_tokens": 256, "lag": 1}
    with serve(smollm2, recorder=rows, **limits) as engine:
        listeners = submit_together(engine, asked, greedy(FEWER))  # so that every plan is the same in every run
        for listener in listeners:
            listener.last()
    assert [listener.token_ids for listener in listeners] == few[:6]
    hits: dict[int, list[int]] = {number: [] for number, row in rows.requests.items() if row["preemptions"]}
    for row in rows.decisions:
        if row["kind"] == "admit" and row["request_id"] in hits:
            hits[row["request_id"]].append(row["tokens"])
    assert any(tokens > 0 for admitted in hits.values() for tokens in admitted[1:])


# The same on a small random model, where the whole matrix takes seconds.


def _random_prompts(seed: int, count: int = 16) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(512) for _ in range(20)]
    return [
        shared[: rng.choice((0, 9, 20))] + [rng.randrange(512) for _ in range(rng.randint(1, 30))] for _ in range(count)
    ]


@pytest.fixture(scope="module")
def tiny_alone() -> list[Tokens]:
    """The small model's tokens, one prompt at a time, nothing cached."""
    with serve(tiny(), prefix_caching=False) as engine:
        return [tokens_of(engine.generate([prompt], greedy(40)))[0] for prompt in _random_prompts(1)]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("caching", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize(("block_size", "tokens"), [(1, 256), (4, 9), (16, 64)])
def test_a_small_models_tokens_do_not_depend_on_the_policy(
    tiny_alone: list[Tokens], scheduler: str, lag: int, caching: bool, block_size: int, tokens: int
) -> None:
    rows = Rows()
    limits: dict[str, Any] = {
        "block_size": block_size,
        "num_blocks": 320 // block_size,
        "max_num_batched_tokens": tokens,
    }
    with serve(tiny(), scheduler, recorder=rows, prefix_caching=caching, lag=lag, max_num_seqs=7, **limits) as engine:
        for _ in range(1 + caching):
            assert tokens_of(engine.generate(_random_prompts(1), greedy(40))) == tiny_alone
    if scheduler in ("mixed", "prefill_first"):
        assert rows.num_preemptions > 0


class PauseAndResume:
    """Runs everybody it can, and every few steps pauses those that run and resumes those that were paused.

    `idle_resume`: resumes in steps that give the resumed requests no token.
    """

    def __init__(self, every: int, idle_resume: bool) -> None:
        self.every, self.idle_resume = every, idle_resume
        self.waiting: list[Request] = []
        self.steps = 0

    def add(self, request: Request, now: int) -> None:
        self.waiting.append(request)

    def remove(self, request: Request, now: int) -> None:
        self.waiting = [r for r in self.waiting if r is not request]

    def on_report(self, report: Report) -> None:
        """Nothing is charged."""

    def plan(self, view: View, now: int) -> Plan:
        self.steps += 1
        if self.steps % self.every == 0 and len(view.running) > 1:
            return Plan(preempt=[(r, Mode.KEEP) for r in view.running.values()], wake_at=now + 1_000_000)
        ready = [r for r in self.waiting if view.settled(r)]
        paused = [r for r in ready if r.state is State.PAUSED]
        new = [] if self.idle_resume and paused else [r for r in ready if r.state is State.WAITING]
        taken = {r.id for r in [*paused, *new]}
        self.waiting = [r for r in self.waiting if r.id not in taken]
        if self.idle_resume and paused:
            return Plan(resume=paused, wake_at=now + 1_000_000)
        prefills = [*view.prefilling.values(), *(r for r in paused if r.num_pending_tokens > 1)]
        left = [(r, r.num_pending_tokens) for r in prefills]
        left += [(r, r.num_tokens - view.probe(r).num_tokens) for r in new]
        chunks = [(r, min(5, tokens)) for r, tokens in left]
        return Plan(decode_all=True, chunks=chunks, resume=paused, wake_at=now + 1_000_000)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("idle_resume", [False, True], ids=["resumed to run", "resumed and left idle"])
def test_tokens_survive_being_paused_with_their_blocks_kept(
    tiny_alone: list[Tokens], lag: int, idle_resume: bool
) -> None:
    rows = Rows()
    with serve(tiny(), PauseAndResume(7, idle_resume), recorder=rows, lag=lag, block_size=4) as engine:
        assert tokens_of(engine.generate(_random_prompts(1), greedy(40))) == tiny_alone
    assert rows.num_preemptions > 20
    assert any(row["kind"] == "resume" for row in rows.decisions)


def test_a_forced_length_ends_the_output_there_and_changes_no_token(tiny_alone: list[Tokens]) -> None:
    lengths = [1 + i * 3 for i in range(13)]
    with serve(tiny(), lag=1) as engine:
        results = engine.generate(
            _random_prompts(1)[:13], greedy(35), [Details(forced_length=length) for length in lengths]
        )
    for (completion,), length, expected in zip(results, lengths, tiny_alone, strict=False):
        assert completion.token_ids == expected[: min(length, 35)]
        assert completion.finish_reason == ("length" if length >= 35 else "stop")
