"""Loading a model: weights, shape, tokenizer and chat template, from wherever they are."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from runtime.model_config import ModelConfig, ModelError
from runtime.models.llama import LlamaModel
from runtime.parallel.leader import Leader
from runtime.parallel.ranks import Ranks
from runtime.tokenizer import Tokenizer
from runtime.weights import default_model, dummy, hub, safetensors
from runtime.weights.default_model import DEFAULT_MODEL
from runtime.weights.fill import fill
from runtime.weights.gguf import GGUFFile
from runtime.weights.quantise import QUANTIZATIONS, check_quantisable, quantise_layers_

__all__ = ["DEFAULT_MODEL", "LOAD_FORMATS", "QUANTIZATIONS", "LoadedModel", "load_model", "load_tokenizer"]

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to be attached to a KV cache. `tokenizer` is None where the source has none.

    Of a model that is spread over `ranks`, `model` is this one's part, and `config` its shape.
    """

    model: LlamaModel
    config: ModelConfig
    tokenizer: Tokenizer | None
    chat_template: str | None
    name: str
    source_path: Path | None  # None for a preset
    load_seconds: float = 0.0  # what loading took, quantising included
    ranks: Ranks = field(default_factory=Ranks)

    def close(self) -> None:
        """End the other ranks that have parts of the model, if there are any. Nobody may be serving it."""
        self.ranks.close()


@dataclass(frozen=True, slots=True)
class _Wanted:
    """How a model is to be loaded, wherever it comes from."""

    dtype: torch.dtype
    device: torch.device
    max_model_len: int | None
    quantization: str
    ranks: Ranks
    with_text: bool

    def config(self, config: ModelConfig) -> ModelConfig:
        """The model's shape, shortened as asked. Raises ModelError where it cannot be had, before memory is taken."""
        check_quantisable(self.quantization, config, self.dtype, self.device)
        if self.max_model_len is None:
            return config
        if self.max_model_len > config.max_model_len:
            raise ModelError(
                f"max_model_len={self.max_model_len} is beyond the model's {config.max_model_len}; lower it"
            )
        return dataclasses.replace(config, max_model_len=self.max_model_len)

    def model(self, config: ModelConfig) -> LlamaModel:
        """The model, its weights still to be filled."""
        return LlamaModel(config, dtype=self.dtype, device=self.device, ranks=self.ranks)

    def loaded(
        self, model: LlamaModel, tokenizer: Tokenizer | None, template: str | None, source: str, path: Path | None
    ) -> LoadedModel:
        """What is returned in the end."""
        return LoadedModel(model, model.config, tokenizer, template, _display_name(source), path, ranks=self.ranks)


def load_model(
    source: str,
    *,
    load_format: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    max_model_len: int | None = None,
    quantization: str = "none",
    ranks: Ranks | None = None,
    with_text: bool = True,
) -> LoadedModel:
    """Load `source`: the default model's name, a folder of safetensors, a GGUF file, or a hub id (org/name).

    With load_format "dummy" the weights are random (by `seed`) and `source` is a preset's name or a folder
    with a config.json; the network is not used. `max_model_len` shortens the longest sequence the model is
    made for. With quantization "fp8" the layers' weights are rounded to float8, a scale a row, once they are there.
    With `ranks` only this one's part is loaded; rank 0 has the others load theirs. `with_text`: the tokenizer too.
    Raises ModelError, in one line that says what to do, when the model cannot be loaded.
    """
    start = time.perf_counter()
    ranks = ranks or Ranks()
    wanted = _Wanted(dtype, torch.device(device), max_model_len, quantization, ranks, with_text)
    ordered = None
    if isinstance(ranks, Leader):
        path = source if load_format == "dummy" else str(_locate(source))  # fetched once
        how = {"load_format": load_format, "dtype": dtype, "seed": seed}
        ordered = ranks.order("load", path, **how, max_model_len=max_model_len, quantization=quantization)
    loaded = _load(source, load_format, wanted, seed)
    try:
        ranks.prepare(loaded.config.hidden_size, dtype, wanted.device)
    except Exception as error:
        raise ranks.explain(error) from error
    if isinstance(ranks, Leader) and ordered is not None:
        ranks.wait(ordered)
    if quantization != "none":
        quantise_layers_(loaded.model)
    if wanted.device.type == "cuda":
        torch.cuda.synchronize(wanted.device)
    return dataclasses.replace(loaded, load_seconds=time.perf_counter() - start)


def load_tokenizer(source: str, *, load_format: str = "auto") -> Tokenizer | None:
    """The tokenizer, with its chat template, that `load_model` would give, without the weights. Raises ModelError."""
    if load_format == "dummy":
        return None if source in dummy.PRESETS else _folder_tokenizer(Path(source))[0]
    path = _locate(source)
    return _folder_tokenizer(path)[0] if path.is_dir() else Tokenizer.from_gguf(GGUFFile(path).metadata)


def _load(source: str, load_format: str, wanted: _Wanted, seed: int) -> LoadedModel:
    if load_format not in LOAD_FORMATS:
        raise ModelError(f"unknown load format {load_format!r}; known: {', '.join(LOAD_FORMATS)}")
    if load_format == "dummy":
        return _load_dummy(source, wanted, seed)
    path = _locate(source)
    if load_format == "auto":
        load_format = "safetensors" if path.is_dir() else "gguf"
    if load_format == "gguf":
        return _load_gguf(source, path, wanted)
    return _load_folder(source, path, wanted)


def _locate(source: str) -> Path:
    """The local file or folder of `source`, fetched if it must be."""
    if source == DEFAULT_MODEL:
        return default_model.resolve()
    path = Path(source).expanduser()
    if path.exists():
        return path
    if hub.looks_like_hub_id(source):
        return hub.fetch(source)
    if source in dummy.PRESETS:
        raise ModelError(
            f"{source} is a preset, a shape without weights; load_format=dummy gives it random ones "
            "(of a run: add --set model.load_format=dummy)"
        )
    raise ModelError(f"{source} does not exist; give a folder, a GGUF file, org/name on the hub, or {DEFAULT_MODEL}")


def _load_folder(source: str, folder: Path, wanted: _Wanted) -> LoadedModel:
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is not a folder; a GGUF file has load_format=gguf (of a run: --set model.load_format=gguf)"
        )
    config = wanted.config(ModelConfig.from_folder(folder))
    safetensors.weight_files(folder)  # fail before memory is taken
    tokenizer, template = _folder_tokenizer(folder) if wanted.with_text else (None, None)
    model = wanted.model(config)
    fill(model, safetensors.read_tensors(folder), origin=str(folder))
    return wanted.loaded(model, tokenizer, template, source, folder)


def _load_gguf(source: str, path: Path, wanted: _Wanted) -> LoadedModel:
    if not path.is_file():
        raise ModelError(
            f"{path} is not a GGUF file; a folder has load_format=safetensors "
            "(of a run: --set model.load_format=safetensors)"
        )
    file = GGUFFile(path)
    config = wanted.config(file.config)
    tokenizer = Tokenizer.from_gguf(file.metadata) if wanted.with_text else None
    template = None if tokenizer is None else tokenizer.chat_template
    model = wanted.model(config)
    fill(model, file.read_tensors(), origin=str(path))
    return wanted.loaded(model, tokenizer, template, source, path)


def _load_dummy(source: str, wanted: _Wanted, seed: int) -> LoadedModel:
    config = wanted.config(dummy.dummy_config(source))
    folder = None if source in dummy.PRESETS else Path(source)
    tokenizer, template = (None, None) if folder is None or not wanted.with_text else _folder_tokenizer(folder)
    model = wanted.model(config)
    dummy.fill_randomly(model, seed)
    return wanted.loaded(model, tokenizer, template, source, folder)


def _folder_tokenizer(folder: Path) -> tuple[Tokenizer | None, str | None]:
    """The folder's tokenizer and chat template; None where it has weights alone, which serve token ids."""
    if not (folder / "tokenizer.json").is_file():
        return None, None
    tokenizer = Tokenizer.from_folder(folder)
    return tokenizer, tokenizer.chat_template


def _display_name(source: str) -> str:
    """What the model is called in records and answers: a hub id whole, else the last part of the path."""
    if source == DEFAULT_MODEL or (hub.looks_like_hub_id(source) and not Path(source).exists()):
        return source
    path = Path(source)
    return path.stem if path.suffix == ".gguf" else path.resolve().name
