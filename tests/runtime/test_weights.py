"""Loading models: every source gives the same weights back, and every broken one a clear line."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.model_config import ModelError
from runtime.models.llama import LlamaModel
from runtime.parallel.ranks import Ranks
from runtime.parallel.shard import Shard
from runtime.weights import gguf as gguf_weights
from runtime.weights import load_model

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A random Llama as transformers saves it."""
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights(model: LlamaModel) -> dict[str, Tensor]:
    return dict(model.weight_slots())


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def llama_cpp_order(weight: Tensor, heads: int) -> Tensor:
    """The order of q and k rows in GGUF: the two halves of each head interleaved."""
    first, second = weight.view(heads, 2, -1, weight.shape[1]).unbind(1)
    return torch.stack((first, second), dim=2).reshape(weight.shape)


def write_gguf(path: Path, tensors: dict[str, Tensor], *, pre: str = "smollm", extra: str = "") -> None:
    """A GGUF file the way llama.cpp's converter writes one, matrices in Q8_0, with the smallest BPE vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(96)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<|end|>", *(chr(i) for i in range(ord("!"), ord("!") + 94)), "ab"])
    writer.add_token_types([3] + [1] * 95)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for hf_name, tensor in tensors.items():
        if "q_proj" in hf_name or "k_proj" in hf_name:
            tensor = llama_cpp_order(tensor, 4 if "q_proj" in hf_name else 2)
        name = names.get_name(hf_name, try_suffixes=(".weight",))
        array = tensor.numpy()
        if tensor.dim() == 1:
            writer.add_tensor(name, array)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    if extra:
        writer.add_tensor(extra, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(hf_folder: Path, tmp_path: Path) -> Path:
    write_gguf(tmp_path / "model.gguf", weights(load_model(str(hf_folder)).model))
    return tmp_path / "model.gguf"


def test_a_folder_gives_back_every_weight(hf_folder: Path) -> None:
    loaded = load_model(str(hf_folder))
    stored = load_file(hf_folder / "model.safetensors")
    ours = weights(loaded.model)
    assert ours.keys() == stored.keys()
    assert all(torch.equal(ours[name], stored[name]) for name in stored)
    assert (loaded.name, loaded.source_path, loaded.tokenizer) == ("model", hf_folder, None)


def test_a_sharded_folder_equals_a_whole_one(hf_folder: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(hf_folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole, sharded = load_model(str(hf_folder)), load_model(str(tmp_path / "sharded"))
    assert all(torch.equal(weights(whole.model)[name], w) for name, w in weights(sharded.model).items())
    next((tmp_path / "sharded").glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"is named in model\.safetensors\.index\.json but missing"):
        load_model(str(tmp_path / "sharded"))


def test_weights_are_converted_to_the_dtype_asked_for(hf_folder: Path) -> None:
    loaded = load_model(str(hf_folder), dtype=torch.bfloat16)
    stored = load_file(hf_folder / "model.safetensors")
    for name, weight in weights(loaded.model).items():
        assert torch.equal(weight, stored[name].bfloat16())


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_read_what_is_split_of_a_gguf_file_once(
    gguf_file: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of matrices that are split by columns, too: of each row the blocks that a rank has. Of four, each has 16 columns
    of attention output, half a block, so that two ranks read each block of it."""
    read: list[int] = []
    original = gguf_weights.dequantize

    def counted(data: Any, kind: Any) -> Any:
        read.append(data.nbytes)
        return original(data, kind)

    monkeypatch.setattr(gguf_weights, "dequantize", counted)
    whole = load_model(str(gguf_file))
    alone, matrices = sum(read), weights(whole.model)
    read.clear()
    for rank in range(size):
        part = load_model(str(gguf_file), ranks=Ranks(Shard(rank, size))).model
        for name, slot in part.weight_slots():
            kept = part.layout.slice_of(name)
            wanted = (
                matrices[name] if kept is None else matrices[name].narrow(kept.dim, kept.kept.start, len(kept.kept))
            )
            assert torch.equal(slot, wanted), name
    blocks = 64 * 64 // 32 * 34  # of one attention output in Q8_0: 34 bytes for 32 numbers
    kv_heads = 2 * 32 * 64 // 32 * 34  # both K and V of a layer, which two of four ranks have each
    norms = sum(4 * weight.numel() for name, weight in matrices.items() if name.endswith("norm.weight"))
    assert sum(read) == alone + (size - 1) * norms + (0 if size == 2 else 2 * (blocks + kv_heads))


def test_a_gguf_file_gives_back_every_weight_within_its_quantisation(hf_folder: Path, gguf_file: Path) -> None:
    expected = weights(load_model(str(hf_folder)).model)
    loaded = load_model(str(gguf_file))
    for name, weight in weights(loaded.model).items():
        torch.testing.assert_close(weight, expected[name], atol=float(expected[name].abs().max()) / 200, rtol=0)
    assert loaded.config == load_model(str(gguf_file), load_format="gguf").config
    assert loaded.name == "model"
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("abc") == [95, 67]


def test_random_weights_depend_on_the_seed_alone(hf_folder: Path) -> None:
    def draw(source: str, seed: int) -> dict[str, Tensor]:
        return weights(load_model(source, load_format="dummy", seed=seed).model)

    first, again, other = draw("tiny", 0), draw("tiny", 0), draw("tiny", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert draw(str(hf_folder), 0)["model.embed_tokens.weight"].shape == (96, 64)


def test_random_weights_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = load_model("smollm2-135m", load_format="dummy", dtype=torch.bfloat16, max_model_len=64)
    assert loaded.config.max_model_len == 64
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008  # the published size


def test_max_model_len_shortens_and_never_lengthens(hf_folder: Path) -> None:
    assert load_model(str(hf_folder), max_model_len=32).config.max_model_len == 32
    with pytest.raises(ModelError, match=r"max_model_len=129 is beyond the model's 128"):
        load_model(str(hf_folder), max_model_len=129)


def test_a_source_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ModelError, match="/no/such/folder does not exist; give a folder, a GGUF file"):
        load_model("/no/such/folder")


def test_an_unknown_load_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match="unknown load format 'pickle'; known: auto, safetensors, gguf, dummy"):
        load_model("tiny", load_format="pickle")


def test_a_preset_without_weights_says_how_to_get_random_ones() -> None:
    with pytest.raises(ModelError, match="smollm2-135m is a preset, a shape without weights; load_format=dummy"):
        load_model("smollm2-135m")


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ModelError, match="'huge' is neither a folder"):
        load_model("huge", load_format="dummy")


def test_the_wrong_format_for_the_source_is_refused(hf_folder: Path, gguf_file: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a GGUF file; .*--set model\.load_format=safetensors"):
        load_model(str(hf_folder), load_format="gguf")
    with pytest.raises(ModelError, match=r"is not a folder; .*--set model\.load_format=gguf"):
        load_model(str(gguf_file), load_format="safetensors")


def test_pickled_weights_are_not_read(hf_folder: Path) -> None:
    (hf_folder / "model.safetensors").rename(hf_folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no \*\.safetensors file"):
        load_model(str(hf_folder))


def test_a_missing_tensor_is_named(hf_folder: Path) -> None:
    change_weights(hf_folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"1 tensors are missing, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(hf_folder))


def test_a_tensor_with_no_place_is_named(hf_folder: Path) -> None:
    change_weights(hf_folder, lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))
    with pytest.raises(ModelError, match=r"model\.extra\.weight has no place"):
        load_model(str(hf_folder))


def test_a_wrong_shape_is_named(hf_folder: Path) -> None:
    change_config(hf_folder, intermediate_size=100)
    with pytest.raises(ModelError, match=r"mlp\.\w+_proj\.weight has shape .*128.*the config asks for .*100"):
        load_model(str(hf_folder))


def test_an_unsupported_architecture_is_named(hf_folder: Path) -> None:
    change_config(hf_folder, architectures=["FalconForCausalLM"])
    with pytest.raises(ModelError, match="FalconForCausalLM is not supported"):
        load_model(str(hf_folder))


@pytest.mark.parametrize("keep", [0, 5, 1000, 100_000])
def test_a_safetensors_file_cut_short_is_refused(hf_folder: Path, keep: int) -> None:
    file = hf_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match="may be cut short"):
        load_model(str(hf_folder))


@pytest.mark.parametrize("keep", [0, 5, 100, 1000, 50_000])
def test_a_gguf_file_cut_short_is_refused(gguf_file: Path, keep: int) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:keep])
    with pytest.raises(ModelError, match="may be cut short"):
        load_model(str(gguf_file))


def test_a_gguf_file_with_an_unknown_tensor_or_tokenizer_is_refused(hf_folder: Path, tmp_path: Path) -> None:
    tensors = weights(load_model(str(hf_folder)).model)
    write_gguf(tmp_path / "rope.gguf", tensors, extra="rope_freqs.weight")
    with pytest.raises(ModelError, match="scaled rope in GGUF"):
        load_model(str(tmp_path / "rope.gguf"))
    write_gguf(tmp_path / "extra.gguf", tensors, extra="blk.0.attn_sinks.weight")
    with pytest.raises(ModelError, match=r"attn_sinks\.weight is not part of a Llama"):
        load_model(str(tmp_path / "extra.gguf"))
    write_gguf(tmp_path / "pre.gguf", tensors, pre="deepseek-llm")
    with pytest.raises(ModelError, match="pre-tokenizer 'deepseek-llm' is not supported"):
        load_model(str(tmp_path / "pre.gguf"))
