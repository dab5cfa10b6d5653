"""The sizes of known models against figures that are known independently."""

from dataclasses import replace

import pytest

from policies.model_shape import PRESETS, ModelShape


def test_llama_8b_reads_fifteen_gigabytes_of_weights_a_decode_step() -> None:
    assert ModelShape.preset("llama-3.1-8b").weight_bytes_per_step / 1e9 == pytest.approx(15.0, abs=0.05)


def test_llama_8b_takes_131072_bytes_of_kv_a_token() -> None:
    assert ModelShape.preset("llama-3.1-8b").kv_bytes_per_token == 131_072


def test_qwen3_reads_1190_megabytes_of_weights_and_takes_114688_bytes_of_kv_a_token() -> None:
    shape = ModelShape.preset("qwen3-0.6b")
    assert shape.weight_bytes_per_step / 1e9 == pytest.approx(1.19, abs=0.005)
    assert shape.kv_bytes_per_token == 114_688


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134.5e6),
        ("qwen3-0.6b", 596e6),
        ("llama-3.1-8b", 8.03e9),
        ("llama-3.1-70b", 70.6e9),
        ("qwen3-30b-a3b", 30.5e9),
    ],
)
def test_a_preset_has_as_many_weights_as_its_model_is_published_with(name: str, parameters: float) -> None:
    assert ModelShape.preset(name).weight_bytes / 2 == pytest.approx(parameters, rel=0.002)


def test_an_embedding_table_of_its_own_takes_memory_and_is_not_read_whole_by_a_step() -> None:
    tied = ModelShape.preset("smollm2-135m")
    own = replace(tied, tied_embeddings=False)
    assert own.weight_bytes - tied.weight_bytes == tied.head_bytes == 49152 * 576 * 2
    assert own.weight_bytes_per_step == tied.weight_bytes_per_step


def test_float32_doubles_bytes_and_leaves_operations_alone() -> None:
    half = ModelShape.preset("smollm2-135m")
    single = half.in_dtype("float32")
    assert single.weight_bytes == 2 * half.weight_bytes
    assert single.kv_bytes_per_token == 2 * half.kv_bytes_per_token
    assert single.linear_flops_per_token == half.linear_flops_per_token


def test_four_bit_weights_take_a_quarter_of_bfloat16() -> None:
    shape = ModelShape.preset("llama-3.1-70b")
    assert replace(shape, bytes_per_weight=0.5).weight_bytes * 4 == shape.weight_bytes


def test_operations_are_two_a_weight_and_four_a_head_dimension_and_pair() -> None:
    shape = ModelShape("tiny", 2, 8, 16, 2, 1, 4, 100)
    # A layer: q 8x8, k and v 8x4 each, o 8x8, and three of 8x16.
    assert shape.linear_flops_per_token == 2 * 2 * (64 + 32 + 32 + 64 + 3 * 128)
    assert shape.head_flops_per_sample == 2 * 100 * 8
    assert shape.attention_flops_per_pair == 2 * 4 * 2 * 4  # layers, 2 products of 2 operations, heads, head_dim


def test_a_token_of_qwen3_30b_a3b_works_with_three_billion_weights() -> None:
    shape = ModelShape.preset("qwen3-30b-a3b")
    # Published: 3.3 billion activated, of which the embedding table and the LM head are 0.62.
    assert shape.active_linear_weights + 2 * shape.head_weights == pytest.approx(3.3e9, rel=0.02)
    assert shape.linear_flops_per_token == 2 * shape.active_linear_weights


def test_a_layer_of_experts_has_a_router_and_all_of_them() -> None:
    dense = ModelShape("dense", 2, 8, 16, 2, 1, 4, 100)
    experts = replace(dense, num_experts=5, num_experts_per_tok=2)
    mlp = 3 * 8 * 16
    assert experts.linear_weights - dense.linear_weights == 2 * (5 * 8 + 4 * mlp)
    assert experts.active_linear_weights - dense.active_linear_weights == 2 * (5 * 8 + mlp)


@pytest.mark.parametrize(("num_tokens", "hit"), [(0, 0), (1, 8), (2, 8 + 8 * 120 / 128), (10_000, 128)])
def test_the_more_tokens_the_more_experts_are_hit_and_some_twice(num_tokens: int, hit: float) -> None:
    assert ModelShape.preset("qwen3-30b-a3b").experts_hit(num_tokens) == pytest.approx(hit)


def test_one_token_reads_the_weights_it_works_with_and_many_read_all() -> None:
    shape = ModelShape.preset("qwen3-30b-a3b")
    assert shape.linear_bytes_read(1) == 2 * shape.active_linear_weights
    assert shape.linear_bytes_read(1) < shape.linear_bytes_read(16) < shape.linear_bytes_read(64)
    assert shape.linear_bytes_read(100_000) == shape.linear_bytes


def test_a_dense_step_reads_all_weights_whatever_its_size() -> None:
    shape = ModelShape.preset("llama-3.1-8b")
    assert shape.linear_bytes_read(0) == shape.linear_bytes_read(1000) == shape.linear_bytes
    assert shape.active_linear_weights == shape.linear_weights
    assert shape.experts_hit(7) == 1


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_shape_survives_its_dictionary(name: str) -> None:
    assert ModelShape.from_dict(PRESETS[name].to_dict()) == PRESETS[name]


def test_an_unknown_preset_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"no model shape 'gpt-9'; there are: tiny, .*llama-3.1-8b"):
        ModelShape.preset("gpt-9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a positive integer, not 0"),
        ({"num_layers": True}, "num_layers must be a positive integer, not True"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, not 'many'"),
        ({"num_kv_heads": 2}, "num_heads=9 must be a multiple of num_kv_heads=2"),
        ({"num_experts": -1}, "num_experts must be a positive integer, not -1"),
        ({"num_experts": False}, "num_experts must be a positive integer, not False"),
        ({"num_experts": 8}, "num_experts_per_tok=0 must be from 1 to num_experts=8"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok=2 must be from 1 to num_experts=0"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok=3 must be from 1 to num_experts=2"),
        ({"bytes_per_weight": 0}, "bytes_per_weight must be a positive number"),
        ({"experts": 8}, "has no 'experts'; it has name, num_layers"),
    ],
)
def test_sizes_that_are_no_models_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelShape.from_dict({**PRESETS["smollm2-135m"].to_dict(), **change})


def test_a_missing_size_is_named() -> None:
    sizes = PRESETS["smollm2-135m"].to_dict()
    del sizes["head_dim"]
    with pytest.raises(ValueError, match="needs head_dim"):
        ModelShape.from_dict(sizes)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="no dtype 'int3'; there are: bfloat16"):
        ModelShape.preset("qwen3-0.6b").in_dtype("int3")
