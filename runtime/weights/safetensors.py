"""Weights from a local folder in the Hugging Face layout, one safetensors file or several. Never pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.model_config import ModelError


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model: those its index names, else model.safetensors, else all there
    are.

    Raises ModelError when there is none or one that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index; fetch it again") from error
        files = [folder / name for name in names]
        for file in files:
            if not file.is_file():
                raise ModelError(f"{file} is named in {index.name} but missing; fetch the model again")
        return files
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no *.safetensors file (pickled weights are not read); convert the model first")
    return files


class SafeTensor:
    """One tensor of an open file; what is not asked for is not read."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored
        self.shape = tuple(stored.get_shape())

    def read(self, dim: int, kept: range) -> Tensor:
        """See `runtime.weights.fill.StoredTensor`."""
        return self._stored[(slice(None),) * dim + (slice(kept.start, kept.stop),)]


def read_tensors(folder: Path) -> Iterator[tuple[str, SafeTensor]]:
    """(name, tensor) of every weight in `folder`. Raises ModelError, also for a file cut short."""
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device="cpu") as content:
                for name in content.keys():  # noqa: SIM118 (not a dict)
                    yield name, SafeTensor(content.get_slice(name))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read ({error}); it may be cut short, fetch it again") from error
