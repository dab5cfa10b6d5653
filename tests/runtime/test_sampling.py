"""Sampling against a slow float64 reference, by statistics, and row by row against company."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from runtime.sampling.batch import SamplingState, sampling_key
from runtime.sampling.noise import gumbel, row_bits, vocab_hash
from runtime.sampling.params import InvalidSamplingParams, SamplingParams
from runtime.sampling.sampler import Sampler, SamplerOutput

EOS = (1,)
CPU = torch.device("cpu")
VOCAB = 20


def make_params(**fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=None, **fields)


def sample(
    logits: torch.Tensor,
    params: list[SamplingParams],
    keys: list[int],
    positions: list[int] | None = None,
    prompts: list[list[int]] | None = None,
    outputs: list[list[int]] | None = None,
    device: str = "cpu",
) -> SamplerOutput:
    """One step in which row i is the request in slot i."""
    rows, vocab = logits.shape
    state = SamplingState(rows, vocab, EOS, device)
    for i in range(rows):
        state.add(i, params[i], keys[i], prompts[i] if prompts else [], outputs[i] if outputs else [])
    batch = state.batch(range(rows), positions or [0] * rows)
    return Sampler(vocab, device)(logits.clone().to(device), batch)


# reference: plain loops and float64


def noise_of(key: int, position: int) -> list[float]:
    """The Gumbel noise of one step, which the tests of the noise hold to its definition."""
    signed = torch.tensor([key - 2**64 if key >= 2**63 else key])
    return gumbel(row_bits(signed, torch.tensor([position])), vocab_hash(VOCAB, CPU))[0].tolist()


def reference_scores(
    logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int], position: int
) -> np.ndarray:
    """Penalised logits over temperature, float64 [V], with -inf where min_tokens bars a token."""
    scores = logits.astype(np.float64)
    for token in range(len(scores)):
        count = output.count(token)
        if count or token in prompt:
            factor = params.repetition_penalty
            scores[token] *= factor if scores[token] <= 0 else 1 / factor
        scores[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        eos = token in EOS and not params.ignore_eos
        if position < params.min_tokens and (eos or token in params.stop_token_ids):
            scores[token] = -math.inf
    return scores / (1.0 if params.greedy else params.temperature)


def reference_kept(scores: np.ndarray, params: SamplingParams) -> tuple[set[int], float]:
    """The tokens that pass the filters, and how far the nearest decision was from the other way."""
    order = sorted(range(len(scores)), key=lambda t: -scores[t])
    if 0 < params.top_k < len(order):
        order = order[: params.top_k]
    weights = [math.exp(scores[t] - scores[order[0]]) for t in order]
    total, mass, margin = sum(weights), 0.0, math.inf
    kept = []
    for token, weight in zip(order, weights, strict=True):
        if params.top_p < 1:
            margin = min(margin, abs(mass / total - params.top_p))
            if mass / total >= params.top_p:
                break
        kept.append(token)
        mass += weight
    floor = params.min_p
    if floor:
        margin = min(margin, *(abs(math.exp(scores[t] - scores[order[0]]) - floor) for t in kept))
        kept = [t for t in kept if math.exp(scores[t] - scores[order[0]]) >= floor]
    return set(kept), margin


PARAMS = st.builds(
    make_params,
    temperature=st.one_of(st.just(0.0), st.just(1.0), st.floats(0.1, 2.0)),
    top_k=st.one_of(st.just(0), st.just(-1), st.integers(1, 25)),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 0.5)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2.0)),
    presence_penalty=st.one_of(st.just(0.0), st.floats(-2.0, 2.0)),
    frequency_penalty=st.one_of(st.just(0.0), st.floats(-2.0, 2.0)),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.lists(st.integers(0, 19), max_size=2).map(tuple),
    ignore_eos=st.booleans(),
)
ROW = st.tuples(
    PARAMS,
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, VOCAB - 1), max_size=5),
    st.lists(st.integers(0, VOCAB - 1), max_size=5),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_every_row_of_a_mixed_batch_is_what_the_float64_reference_samples(rows, seed):
    logits = np.random.default_rng(seed).normal(0, 3, (len(rows), VOCAB)).astype(np.float32)
    params, keys, prompts, outputs = (list(x) for x in zip(*rows, strict=True))
    positions = [len(o) for o in outputs]
    result = sample(torch.from_numpy(logits), params, keys, positions, prompts, outputs)
    for i, token in enumerate(result.token_ids.tolist()):
        scores = reference_scores(logits[i], params[i], prompts[i], outputs[i], positions[i])
        if params[i].greedy:
            assert scores[token] >= scores.max() - 1e-5
            continue
        kept, margin = reference_kept(scores, params[i])
        assume(margin > 1e-5)
        noisy = {t: scores[t] + noise_of(keys[i], positions[i])[t] for t in kept}
        assert token in kept
        assert noisy[token] >= max(noisy.values()) - 1e-4


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=2, max_size=6), st.integers(0, 2**32 - 1), st.randoms())
def test_a_rows_token_depends_neither_on_its_company_nor_on_its_place(rows, seed, shuffler):
    generator = np.random.default_rng(seed)
    # Rounded as bfloat16 rounds, so that ties at every boundary are common.
    logits = torch.from_numpy(generator.normal(0, 3, (len(rows), VOCAB))).to(torch.bfloat16).float()
    params, keys, prompts, outputs = (list(x) for x in zip(*rows, strict=True))
    positions = [len(o) for o in outputs]
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    together = sample(
        logits[order],
        [params[i] for i in order],
        [keys[i] for i in order],
        [positions[i] for i in order],
        [prompts[i] for i in order],
        [outputs[i] for i in order],
    ).token_ids.tolist()
    alone = [
        sample(logits[[i]], [params[i]], [keys[i]], [positions[i]], [prompts[i]], [outputs[i]]).token_ids.item()
        for i in order
    ]
    assert together == alone


# statistics of whole draws

LOGITS = np.array([1.5, 0.9, 0.0, -0.4, 2.1, -3.0, 0.3, 1.1], dtype=np.float32)


@pytest.mark.parametrize(
    "params",
    [
        make_params(),
        make_params(temperature=0.6),
        make_params(temperature=1.7),
        make_params(top_k=3),
        make_params(top_p=0.75),
        make_params(min_p=0.2),
        make_params(temperature=1.4, top_k=6, top_p=0.9, min_p=0.15),
    ],
    ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}",
)
@pytest.mark.parametrize("along", ["requests", "positions"])
def test_sampled_frequencies_follow_the_filtered_distribution(params, along):
    rows = 30_000
    state = SamplingState(rows, len(LOGITS), EOS, CPU)
    for slot in range(rows):
        state.add(slot, params, sampling_key(3, slot if along == "requests" else 0, params), [])
    positions = range(rows) if along == "positions" else [0] * rows
    logits = torch.from_numpy(LOGITS).repeat(rows, 1)
    tokens = Sampler(len(LOGITS), CPU)(logits, state.batch(range(rows), list(positions))).token_ids.numpy()
    scores = reference_scores(LOGITS, params, [], [], 0)
    kept, _ = reference_kept(scores, params)
    weights = np.array([math.exp(s) if t in kept else 0.0 for t, s in enumerate(scores)])
    counts = np.bincount(tokens, minlength=len(LOGITS))
    assert counts[weights == 0].sum() == 0
    expected = rows * weights[weights > 0] / weights.sum()
    assert stats.chisquare(counts[weights > 0], expected).pvalue > 1e-3


def test_a_large_flat_vocabulary_is_sampled_evenly_and_steps_are_independent():
    rows, vocab = 4000, 5000
    params = make_params()
    state = SamplingState(rows, vocab, EOS, CPU)
    for slot in range(rows):
        state.add(slot, params, sampling_key(0, slot, params), [])
    sampler, batch = Sampler(vocab, CPU), state.batch(range(rows), [0] * rows)
    first = sampler(torch.zeros(rows, vocab), batch).token_ids.numpy()
    batch = state.batch(range(rows), [1] * rows)
    second = sampler(torch.zeros(rows, vocab), batch).token_ids.numpy()
    assert stats.chisquare(np.bincount(first // 100, minlength=50)).pvalue > 1e-3
    pairs = np.histogram2d(first, second, bins=8, range=[[0, vocab], [0, vocab]])[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


# single behaviours


def test_greedy_and_random_rows_mix_and_greedy_is_the_argmax():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    params = [make_params(temperature=0.0 if i % 2 else 1.5) for i in range(6)]
    tokens = sample(logits, params, list(range(6))).token_ids
    assert tokens[1::2].tolist() == logits[1::2].argmax(-1).tolist()
    assert tokens[::2].tolist() != logits[::2].argmax(-1).tolist()


def test_the_lowest_token_id_wins_a_greedy_tie():
    logits = torch.zeros(1, 9)
    logits[0, [4, 6]] = 5.0
    assert sample(logits, [make_params(temperature=0.0)], [1]).token_ids.item() == 4


def test_tokens_that_tie_with_the_last_one_kept_are_kept_too():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]]).repeat(3000, 1)
    for params in (make_params(top_k=2), make_params(top_p=0.8)):
        tokens = sample(logits, [params] * 3000, list(range(3000))).token_ids
        assert set(tokens.tolist()) == {0, 1, 2, 3}


def test_top_p_is_over_what_the_rows_own_top_k_keeps_whatever_the_others_keep():
    # Of the two tokens that top_k=2 keeps, the first has 88 % of the mass; of all five it has 65 %.
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 1.0, -9.0]]).repeat(1000, 1)
    params = [make_params(top_k=2, top_p=0.85)] * 999 + [make_params(top_k=5)]
    tokens = sample(logits, params, list(range(1000))).token_ids[:-1]
    assert set(tokens.tolist()) == {0}


def test_even_a_tiny_top_p_keeps_the_most_probable_token():
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(1))
    tokens = sample(logits, [make_params(top_p=1e-6)] * 50, list(range(50))).token_ids
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_the_lowest_and_highest_temperatures_give_valid_tokens():
    logits = torch.tensor([[1000.0, -1000.0, 999.0, -torch.inf]]).repeat(2, 1)
    tokens = sample(logits, [make_params(temperature=1e-5), make_params(temperature=2.0)], [1, 2]).token_ids
    assert tokens.tolist() == [0, 0]


def test_a_seed_fixes_the_tokens_whatever_the_request_and_the_engine():
    seeded = make_params(seed=42)
    assert sampling_key(1, "a", seeded) == sampling_key(2, "b", seeded)
    assert sampling_key(1, "a", seeded, index=1) != sampling_key(1, "a", seeded)
    unseeded = make_params()
    keys = {sampling_key(e, r, unseeded, i) for e in (1, 2) for r in ("a", "b") for i in (0, 1)}
    assert len(keys) == 8


def test_stop_tokens_cannot_be_sampled_before_min_tokens_and_can_after():
    logits = torch.zeros(2, 6)
    logits[:, [1, 3]] = 50.0
    params = [
        make_params(temperature=0.0, min_tokens=2, stop_token_ids=(3,)),
        make_params(temperature=0.0, min_tokens=2, ignore_eos=True),
    ]
    state = SamplingState(2, 6, EOS, CPU)
    for slot in range(2):
        state.add(slot, params[slot], 0, [])
    sampler, seen = Sampler(6, CPU), []
    for position in range(3):
        batch = state.batch([0, 1], [position, position])
        seen.append(sampler(logits.clone(), batch).token_ids.tolist())
    assert seen == [[0, 1], [0, 1], [1, 1]]


def test_penalties_count_the_sampled_tokens_on_the_device():
    # Each step's favourite is barred by the counts of the steps before: nothing goes through the host.
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    params = [make_params(temperature=0.0, frequency_penalty=1.5), make_params(temperature=0.0)]
    state = SamplingState(4, 4, EOS, CPU)
    state.add(2, params[0], 0, [3])
    state.add(0, params[1], 0, [3])
    sampler, batch = Sampler(4, CPU), state.batch([2, 0], [0, 0])
    tokens = [sampler(logits.clone(), batch).token_ids.tolist() for _ in range(4)]
    assert tokens == [[0, 0], [1, 0], [0, 0], [2, 0]]
    assert state.penalty_table is not None
    assert state.penalty_table.output_counts[2].tolist() == [2, 1, 1, 0]


def test_a_request_that_comes_back_after_preemption_samples_on_as_if_it_had_stayed():
    params = make_params(repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.4, top_p=0.9)
    logits = torch.randn(10, 1, 30, generator=torch.Generator().manual_seed(3))
    sampler, state = Sampler(30, CPU), SamplingState(2, 30, EOS, CPU)
    state.add(0, params, 99, [1, 2])
    stayed = [sampler(logits[i].clone(), state.batch([0], [i])).token_ids.item() for i in range(10)]
    state.add(1, params, 5, [7])  # what was in the slot before must leave no trace
    sampler(logits[0].clone(), state.batch([1], [0]))
    state.add(1, params, 99, [1, 2], stayed[:4])
    back = [sampler(logits[i].clone(), state.batch([1], [i])).token_ids.item() for i in range(4, 10)]
    assert back == stayed[4:]


def test_no_penalty_table_is_made_until_a_request_needs_one():
    state = SamplingState(2, 10, EOS, CPU)
    state.add(0, make_params(), 0, [1])
    assert state.penalty_table is None
    state.add(1, make_params(presence_penalty=0.1), 0, [1])
    assert state.penalty_table is not None


def test_logprobs_are_those_of_the_raw_logits_for_the_rows_that_asked():
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(4))
    params = [
        make_params(temperature=0.5, top_k=2, logprobs=3, presence_penalty=2.0),
        make_params(),
        make_params(temperature=0.0, logprobs=0),
    ]
    result = sample(logits, params, [1, 2, 3], outputs=[[5], [], []])
    assert result.logprobs is not None
    expected = logits.double().log_softmax(-1)
    assert result.logprobs.row_numbers == (0, 2)
    chosen = expected[[0, 2], result.token_ids[[0, 2]]]
    assert result.logprobs.sampled.tolist() == pytest.approx(chosen.tolist(), abs=1e-6)
    top = expected[[0, 2]].topk(3, dim=-1)
    assert result.logprobs.top_ids.tolist() == top.indices.tolist()
    assert result.logprobs.top.flatten().tolist() == pytest.approx(top.values.flatten().tolist(), abs=1e-6)


def test_logprobs_minus_one_reports_the_whole_vocabulary_and_no_request_none():
    logits = torch.randn(1, 7)
    result = sample(logits, [make_params(logprobs=-1)], [0])
    assert result.logprobs is not None
    assert sorted(result.logprobs.top_ids[0].tolist()) == list(range(7))
    assert sample(logits, [make_params()], [0]).logprobs is None


ALL_FEATURES = [
    make_params(temperature=0.0),
    make_params(temperature=0.7, top_k=5, seed=1),
    make_params(top_p=0.9, logprobs=2),
    make_params(min_p=0.1, top_k=3, top_p=0.5),
    make_params(repetition_penalty=1.2, presence_penalty=1.0, frequency_penalty=0.5),
    make_params(min_tokens=5, stop_token_ids=(3, 4)),
]


def test_sampling_reads_no_value_back_from_the_device():
    # Tensors of the meta device have no values: anything that needed one would raise.
    logits = torch.zeros(6, 40, device="meta")
    result = sample(logits, ALL_FEATURES, list(range(6)), outputs=[[1]] * 6, device="meta")
    assert result.token_ids.shape == (6,)
    assert result.logprobs is not None
    with pytest.raises(RuntimeError):
        result.token_ids.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_samples_what_the_cpu_samples_without_a_synchronisation():
    rows, vocab = 96, 5000
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(5)) * 4
    params = [ALL_FEATURES[i % 6] for i in range(rows)]
    expected = sample(logits, params, list(range(rows))).token_ids
    state = SamplingState(rows, vocab, EOS, "cuda")
    for slot in range(rows):
        state.add(slot, params[slot], slot, [])
    sampler, on_device = Sampler(vocab, "cuda"), logits.cuda()
    sampler(on_device.clone(), state.batch(range(rows), [7] * rows))  # loads the kernels
    for slot in range(rows):
        state.add(slot, params[slot], slot, [])
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = sampler(on_device, state.batch(range(rows), [0] * rows))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.token_ids.tolist() == expected.tolist()


def test_what_exceeds_the_vocabulary_the_slots_or_the_logits_is_refused():
    state = SamplingState(2, 10, EOS, CPU)
    with pytest.raises(InvalidSamplingParams, match=r"stop_token_ids must be below .* 10, got 10"):
        state.add(0, make_params(stop_token_ids=(10,)), 0, [])
    with pytest.raises(InvalidSamplingParams, match=r"logprobs must be at most .* 10, got 11"):
        state.add(0, make_params(logprobs=11), 0, [])
    with pytest.raises(ValueError, match="slot must be in"):
        state.add(2, make_params(), 0, [])
    with pytest.raises(ValueError, match="slots and positions"):
        state.batch([0, 1], [0])
    with pytest.raises(ValueError, match="slots and positions"):
        state.batch([], [])
    state.add(0, make_params(), 0, [])
    for wrong in (torch.zeros(1, 9), torch.zeros(1, 10, dtype=torch.float16), torch.zeros(2, 10)):
        with pytest.raises(ValueError, match="logits must be float32"):
            Sampler(10, CPU)(wrong, state.batch([0], [0]))
