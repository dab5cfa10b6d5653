"""The counter-based noise: its definition in plain integers, its distribution, and its independence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from runtime.sampling.noise import gumbel, row_bits, vocab_hash

CPU = torch.device("cpu")


def reference_mix32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def reference_splitmix64(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def reference_uniform(key: int, position: int, token: int) -> float:
    bits = reference_splitmix64((key + (position + 1) * 0x9E3779B97F4A7C15) % 2**64)
    x = (reference_mix32(token) + bits) % 2**32 * (bits >> 32 | 1) % 2**32
    return (reference_mix32(x) % 2**31 + 0.5) / 2**31


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20), st.integers(0, 300_000))
def test_the_noise_is_the_documented_function_of_key_position_and_token(key, position, token):
    keys = torch.tensor([key - 2**64 if key >= 2**63 else key])
    hashed = vocab_hash(token + 1, CPU)[-1:]
    noise = gumbel(row_bits(keys, torch.tensor([position])), hashed).item()
    # Taken back to the uniform number it came from: float32 resolves u evenly, its Gumbel value for u near 1 not.
    expected = min(reference_uniform(key, position, token), 1 - 2**-24)
    assert -math.expm1(-math.exp(-noise)) == pytest.approx(expected, rel=3e-5)


def test_the_noise_of_one_step_follows_the_gumbel_distribution():
    bits = row_bits(torch.tensor([12345]), torch.tensor([0]))
    noise = gumbel(bits, vocab_hash(50_000, CPU))[0]
    assert torch.isfinite(noise).all()
    assert stats.kstest(noise.numpy(), stats.gumbel_r.cdf).pvalue > 1e-3


def test_the_noise_of_one_token_over_steps_and_over_neighbouring_keys_is_gumbel_too():
    many = torch.arange(50_000)
    hashed = vocab_hash(1000, CPU)[-1:]
    for bits in (row_bits(torch.full_like(many, 77), many), row_bits(many, torch.zeros_like(many))):
        assert stats.kstest(gumbel(bits, hashed)[:, 0].numpy(), stats.gumbel_r.cdf).pvalue > 1e-3


def test_the_noise_of_neighbouring_steps_and_tokens_is_uncorrelated():
    noise = gumbel(row_bits(torch.full((300,), 5), torch.arange(300)), vocab_hash(400, CPU)).double()
    flat = (noise - noise.mean()) / noise.std()
    for a, b in ((flat[1:], flat[:-1]), (flat[:, 1:], flat[:, :-1]), (flat[1:, 1:], flat[:-1, :-1])):
        assert abs((a * b).mean().item()) < 4 / math.sqrt(a.numel())


def test_the_extreme_draws_stay_finite():
    # Over 2**20 entries the hash comes within 64 of its largest values many times.
    noise = gumbel(row_bits(torch.arange(64), torch.zeros(64, dtype=torch.int64)), vocab_hash(2**20, CPU))
    assert torch.isfinite(noise).all()
    assert noise.max().item() <= -math.log(-math.log1p(-(2.0**-32))) + 1e-4
