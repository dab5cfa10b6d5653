"""Sampling, stopping and text in the engine: a request's output is its own, whoever is served beside it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from runtime.engine import Details, Engine
from runtime.sampling.params import SamplingParams
from runtime.sequence import Completion, Output
from runtime.tokenizer import Tokenizer
from runtime.weights import LoadedModel
from tests.runtime.engines import Rows, greedy, serve, tiny, tokens_of, transformers_model

EACH = [
    SamplingParams(seed=1, max_tokens=40, ignore_eos=True),
    SamplingParams(seed=2, max_tokens=33, ignore_eos=True, top_k=7),
    SamplingParams(seed=3, max_tokens=37, ignore_eos=True, top_p=0.8, temperature=1.5),
    SamplingParams(seed=4, max_tokens=40, ignore_eos=True, min_p=0.1, repetition_penalty=1.6),
    SamplingParams(seed=5, max_tokens=29, ignore_eos=True, frequency_penalty=1.5, presence_penalty=-0.5),
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, repetition_penalty=2.0),
    SamplingParams(seed=6, max_tokens=40, top_k=50, top_p=0.9, temperature=0.7, presence_penalty=1.0, logprobs=2),
    SamplingParams(seed=7, max_tokens=40, min_tokens=25, stop_token_ids=tuple(range(0, 512, 9))),
]


def _prompts(count: int = 8, seed: int = 5) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(512) for _ in range(rng.randint(2, 40))] for _ in range(count)]


@pytest.fixture(scope="module")
def alone() -> list[Completion]:
    with serve(tiny(), prefix_caching=False) as engine:
        return [engine.generate([p], one)[0][0] for p, one in zip(_prompts(), EACH, strict=True)]


def test_the_parameters_under_test_change_what_is_sampled(alone: list[Completion]) -> None:
    with serve(tiny()) as engine:
        plain = engine.generate(_prompts(), [replace(greedy(40), max_tokens=one.max_tokens) for one in EACH])
    assert all(one.token_ids != other.token_ids for one, (other,) in zip(alone, plain, strict=True))


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    "limits",
    [
        {"num_blocks": 512},
        {"num_blocks": 30, "block_size": 8},
        {"max_num_seqs": 2, "max_num_batched_tokens": 11},
        {"max_num_seqs": 1},
    ],
    ids=["together", "preempted", "in chunks, two slots", "one slot"],
)
def test_sampled_tokens_do_not_depend_on_who_shares_the_batch(
    alone: list[Completion], lag: int, limits: dict[str, Any]
) -> None:
    rows = Rows()
    with serve(tiny(), recorder=rows, lag=lag, **limits) as engine:
        together = [completion for (completion,) in engine.generate(_prompts(), EACH)]
        again = [completion for (completion,) in engine.generate(_prompts()[::-1], EACH[::-1])][::-1]
    for mine, expected in zip(together + again, alone * 2, strict=True):
        assert mine.token_ids == expected.token_ids
        assert mine.finish_reason == expected.finish_reason
        assert mine.stop_reason == expected.stop_reason
        for one, other in zip(mine.logprobs, expected.logprobs, strict=True):
            assert one.sampled == pytest.approx(other.sampled, abs=1e-3)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert (rows.num_preemptions > 0) == (limits.get("num_blocks") == 30)


def test_without_a_seed_the_draws_follow_the_engines_seed_and_the_request_id() -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    prompts = _prompts(3)
    with serve(tiny(), seed=1) as engine:
        few = tokens_of(engine.generate(prompts, params))
    with serve(tiny(), seed=1, lag=1) as engine:
        many = tokens_of(engine.generate(prompts + _prompts(5, seed=9), params))
    with serve(tiny(), seed=2) as engine:
        other = tokens_of(engine.generate(prompts, params))
    assert few == many[:3]
    assert all(one != two for one, two in zip(few, other, strict=True))


@pytest.mark.parametrize("caching", [False, True], ids=["uncached", "cached"])
def test_several_completions_differ_from_each_other_and_come_out_the_same_again(caching: bool) -> None:
    params = SamplingParams(n=4, seed=11, max_tokens=20, ignore_eos=True)
    prompt = _prompts(1)[0] * 3
    with serve(tiny(), prefix_caching=caching, lag=1, block_size=4, max_num_batched_tokens=16) as engine:
        (first,), (again, one) = engine.generate([prompt], params), engine.generate([prompt, prompt], params)
        alone = engine.generate([prompt], replace(params, n=1))[0][0]
    assert len({completion.token_ids for completion in first}) == 4
    tokens = [completion.token_ids for completion in first]
    assert tokens == [completion.token_ids for completion in again] == [completion.token_ids for completion in one]
    assert alone.token_ids == tokens[0]
    assert (max(completion.num_cached_tokens for completion in first) > 0) == caching


def test_logprobs_are_the_models_own_log_softmax() -> None:
    loaded = tiny()
    theirs = transformers_model(loaded)
    wanted = [0, 3, None, 12, -1]
    sampled = SamplingParams(seed=3, max_tokens=12, ignore_eos=True, temperature=0.6, top_k=9, frequency_penalty=1.0)
    prompts = _prompts(5)
    with serve(loaded, lag=1) as engine:
        results = engine.generate(prompts, [replace(sampled, logprobs=k) for k in wanted])
    for prompt, (completion,), k in zip(prompts, results, wanted, strict=True):
        if k is None:
            assert completion.logprobs == ()
            continue
        with torch.inference_mode():
            logits = theirs(torch.tensor([[*prompt, *completion.token_ids]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        assert len(completion.logprobs) == 12
        for entry, row, token in zip(completion.logprobs, expected, completion.token_ids, strict=True):
            assert entry.sampled == pytest.approx(float(row[token]), abs=2e-3)
            assert len(entry.top) == (512 if k == -1 else k)
            best = row.topk(len(entry.top))
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=2e-3)
            assert all(float(row[token]) == pytest.approx(value, abs=2e-3) for token, value in entry.top)


# Where an output ends


def _with_eos(loaded: LoadedModel, *eos: int) -> LoadedModel:
    return replace(loaded, config=replace(loaded.config, eos_token_ids=eos))


@pytest.fixture(scope="module")
def free_run() -> tuple[int, ...]:
    """Forty greedy tokens of a prompt, to end earlier in all kinds of ways."""
    with serve(tiny()) as engine:
        return tokens_of(engine.generate([_prompts()[0]], greedy(40)))[0]


def _run(loaded: LoadedModel, params: SamplingParams, lag: int = 0, **limits: Any) -> Completion:
    with serve(loaded, lag=lag, **limits) as engine:
        return engine.generate([_prompts()[0]], params)[0][0]


@pytest.mark.parametrize("lag", [0, 1])
def test_an_end_of_sequence_token_ends_the_output_with_it(free_run: tuple[int, ...], lag: int) -> None:
    eos = free_run[10]
    done = _run(_with_eos(tiny(), eos), SamplingParams(temperature=0, max_tokens=40), lag)
    assert done.token_ids == free_run[: free_run.index(eos) + 1]
    assert (done.finish_reason, done.stop_reason) == ("stop", None)


def test_ignore_eos_goes_on_past_it(free_run: tuple[int, ...]) -> None:
    assert _run(_with_eos(tiny(), free_run[10]), greedy(40)).token_ids == free_run


@pytest.mark.parametrize("lag", [0, 1])
def test_a_stop_token_ends_the_output_and_is_named(free_run: tuple[int, ...], lag: int) -> None:
    done = _run(tiny(), greedy(40, stop_token_ids=(free_run[17],)), lag)
    assert done.token_ids == free_run[: free_run.index(free_run[17]) + 1]
    assert (done.finish_reason, done.stop_reason) == ("stop", free_run[17])


def test_no_stop_token_is_sampled_before_min_tokens(free_run: tuple[int, ...]) -> None:
    eos = free_run[2]
    done = _run(_with_eos(tiny(), eos), SamplingParams(temperature=0, max_tokens=40, min_tokens=20))
    assert eos not in done.token_ids[:20]
    assert done.token_ids[:2] == free_run[:2]
    assert len(done.token_ids) > 20


def test_barring_every_token_does_not_stop_the_engine() -> None:
    everything = SamplingParams(max_tokens=5, min_tokens=5, stop_token_ids=tuple(range(512)))
    with serve(tiny()) as engine:
        done = engine.generate(_prompts(2), [everything, replace(everything, temperature=0)])
        assert all(completion.finish_reason == "stop" for (completion,) in done)  # there was no other choice
        assert len(tokens_of(engine.generate(_prompts(1), greedy(5)))[0]) == 5


@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize("lag", [0, 1])
def test_max_tokens_is_exact(free_run: tuple[int, ...], count: int, lag: int) -> None:
    done = _run(tiny(), greedy(count), lag)
    assert (done.token_ids, done.finish_reason) == (free_run[:count], "length")


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("max_tokens", [None, 10_000])
def test_the_models_limit_ends_an_output_without_a_cap_of_its_own(max_tokens: int | None, lag: int) -> None:
    done = _run(tiny(), greedy(max_tokens), lag, max_model_len=60)
    assert done.num_prompt_tokens + len(done.token_ids) == 60
    assert done.finish_reason == "length"


@pytest.mark.parametrize("lag", [0, 1])
def test_without_max_tokens_the_output_may_fill_the_whole_cache_and_no_more(lag: int) -> None:
    done = _run(tiny(), greedy(None, min_tokens=5_000), lag, num_blocks=6)
    assert done.error is None
    assert done.num_prompt_tokens + len(done.token_ids) == 6 * 16


def test_a_tiny_choice_is_greedy(free_run: tuple[int, ...]) -> None:
    narrow: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}]
    with serve(tiny()) as engine:
        for choice in narrow:
            params = SamplingParams(seed=1, max_tokens=40, ignore_eos=True, **choice)
            assert tokens_of(engine.generate([_prompts()[0]], params)) == [free_run]


# Text


@pytest.fixture(scope="module")
def talker(smollm2: LoadedModel) -> LoadedModel:
    """The small model with a tokenizer whose first 512 tokens are special ones, bytes and short syllables."""
    return tiny(smollm2.tokenizer)


@pytest.fixture(scope="module")
def tokenizer(talker: LoadedModel) -> Tokenizer:
    assert talker.tokenizer is not None
    return talker.tokenizer


@pytest.mark.parametrize("lag", [0, 1])
def test_streamed_text_is_the_decoding_of_the_tokens(talker: LoadedModel, tokenizer: Tokenizer, lag: int) -> None:
    params = SamplingParams(seed=8, max_tokens=60, ignore_eos=True)

    async def listen(engine: Engine, prompt: list[int]) -> list[Output]:
        return [output async for output in engine.stream(prompt, params)]

    async def everybody(engine: Engine) -> list[list[Output]]:
        return await asyncio.gather(*(listen(engine, prompt) for prompt in _prompts()))

    with serve(talker, lag=lag) as engine:
        streamed = asyncio.run(everybody(engine))
        whole = engine.generate(_prompts(), params)
    for outputs, (completion,) in zip(streamed, whole, strict=True):
        tokens = tuple(token for output in outputs for token in output.token_ids)
        assert tokens == completion.token_ids
        assert "".join(output.text for output in outputs) == completion.text
        assert completion.text == tokenizer.decode(tokens)
        assert [output.finish_reason for output in outputs] == [None] * 59 + ["length"]
    assert any("\ufffd" in completion.text for (completion,) in whole)  # bytes that are no character came up too


def _texts(talker: LoadedModel, params: list[SamplingParams]) -> list[Completion]:
    with serve(talker, lag=1) as engine:
        return [completion for (completion,) in engine.generate([_prompts()[1]] * len(params), params)]


def test_a_stop_string_ends_the_text_before_it_and_the_tokens_with_it(
    talker: LoadedModel, tokenizer: Tokenizer
) -> None:
    (free,) = _texts(talker, [greedy(60)])
    windows = (free.text[i : i + 4] for i in range(20, 200))
    stop = next(window for window in windows if window.isascii())  # wherever tokens begin and end
    end = free.text.index(stop)
    without, with_it = _texts(
        talker, [greedy(60, stop=("never", stop)), greedy(60, stop=(stop,), include_stop_str_in_output=True)]
    )
    assert without.text == free.text[:end]
    assert with_it.text == free.text[: end + len(stop)]
    for done in (without, with_it):
        assert (done.finish_reason, done.stop_reason) == ("stop", stop)
        assert done.token_ids == free.token_ids[: len(done.token_ids)]
        assert stop in tokenizer.decode(done.token_ids)
        assert stop not in tokenizer.decode(done.token_ids[:-1])


def test_text_held_back_for_a_stop_string_comes_out_when_the_output_ends(talker: LoadedModel) -> None:
    (free,) = _texts(talker, [greedy(20)])
    almost = free.text[-5:] + "!"  # all of the end begins this stop string, and then the output is over
    (done,) = _texts(talker, [greedy(20, stop=(almost,))])
    assert (done.text, done.finish_reason) == (free.text, "length")


def test_a_stop_token_is_left_out_of_the_text_unless_asked_for(talker: LoadedModel, tokenizer: Tokenizer) -> None:
    (free,) = _texts(talker, [greedy(60)])
    stop = next(token for token in free.token_ids[10:] if not tokenizer.is_special(token))
    end = free.token_ids.index(stop)
    without, with_it = _texts(
        talker,
        [greedy(60, stop_token_ids=(stop,)), greedy(60, stop_token_ids=(stop,), include_stop_str_in_output=True)],
    )
    assert without.token_ids == with_it.token_ids == free.token_ids[: end + 1]
    assert without.text == tokenizer.decode(free.token_ids[:end])
    assert with_it.text == tokenizer.decode(free.token_ids[: end + 1])


def test_a_forced_length_goes_on_past_stop_strings_and_stop_tokens(talker: LoadedModel, tokenizer: Tokenizer) -> None:
    (free,) = _texts(talker, [greedy(30)])
    params = greedy(60, stop=(free.text[10:13],), stop_token_ids=(free.token_ids[4],))
    with serve(talker) as engine:
        done = engine.generate([_prompts()[1]], params, [Details(forced_length=30)])[0][0]
    assert (done.token_ids, done.text, done.finish_reason) == (free.token_ids, free.text, "stop")


def test_tokens_beyond_the_tokenizers_add_no_text(smollm2: LoadedModel) -> None:
    """Embeddings are padded to round sizes; a random model samples those rows too."""
    assert smollm2.tokenizer is not None

    class Small(Tokenizer):
        def id_to_bytes(self, token_id: int) -> bytes:
            if token_id >= 300:
                raise ValueError(f"token id {token_id} is outside the vocabulary of 300 tokens")
            return super().id_to_bytes(token_id)

    small = Small(smollm2.tokenizer._backend)
    params = SamplingParams(seed=8, max_tokens=60, ignore_eos=True)
    with serve(tiny(small)) as engine:
        done = engine.generate([_prompts()[2]], params)[0][0]
    assert max(done.token_ids) >= 300
    assert done.text == small.decode([token for token in done.token_ids if token < 300])


def test_penalties_look_at_this_request_alone_when_a_slot_is_used_again(free_run: tuple[int, ...]) -> None:
    """Under lag 1 a request that stopped is still in the next step, which counts a token for it after its end."""
    penalised = greedy(40, repetition_penalty=1.8, frequency_penalty=0.7)
    expected = _run(tiny(), penalised)
    assert expected.token_ids != free_run
    with serve(tiny(), lag=1, max_num_seqs=1) as engine:
        stopped = replace(penalised, stop_token_ids=tuple(expected.token_ids[3:5]))
        results = engine.generate([_prompts()[0]] * 4, [stopped, penalised, stopped, penalised])
    assert [len(completion.token_ids) for (completion,) in results] == [4, 40, 4, 40]
    assert results[1][0].token_ids == results[3][0].token_ids == expected.token_ids
