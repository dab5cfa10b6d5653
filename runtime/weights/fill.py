"""Put named tensors into a model, checking that none is missing, unknown or of the wrong shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from runtime.model_config import ModelError
from runtime.models.llama import LlamaModel
from runtime.parallel.shard import Slice

# Found in some files, not needed: rope is computed, and a tied output layer is the embedding.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "lm_head.weight")


class StoredTensor(Protocol):
    """A tensor in a file, of which nothing has been read yet."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, dim: int, kept: range) -> Tensor:
        """These entries of this dimension, on the CPU."""
        ...


def fill(model: LlamaModel, tensors: Iterable[tuple[str, StoredTensor]], origin: str) -> None:
    """Copy each (Hugging Face name, tensor) to its place, converting type and device: the part that the model has.

    Raises ModelError, naming `origin`, for a missing or unknown tensor and for a wrong shape.
    """
    slots = dict(model.weight_slots())
    missing = set(slots)
    for name, tensor in tensors:
        slot = slots.get(name)
        if slot is None:
            if name.endswith(_IGNORED_SUFFIXES):
                continue
            raise ModelError(
                f"{origin}: tensor {name} has no place in this model; its config does not match its weights"
            )
        part = model.layout.slice_of(name) or Slice(0, range(slot.shape[0]), slot.shape[0])
        wanted = list(slot.shape)
        wanted[part.dim] = part.full
        if wanted != list(tensor.shape):
            raise ModelError(f"{origin}: tensor {name} has shape {list(tensor.shape)}, the config asks for {wanted}")
        slot.copy_(tensor.read(part.dim, part.kept))
        missing.discard(name)
    if missing:
        raise ModelError(f"{origin}: {len(missing)} tensors are missing, {min(missing)} first; fetch the model again")
