"""Random weights, for speed work and tests: the shape is real, the text is not. Needs no network."""

from __future__ import annotations

from pathlib import Path

import torch

from runtime.model_config import PRESETS, ModelConfig, ModelError
from runtime.models.llama import LlamaModel


def dummy_config(source: str) -> ModelConfig:
    """The shape of a preset, or of a folder's config.json. Raises ModelError when it is neither."""
    if source in PRESETS:
        return PRESETS[source]
    if Path(source).is_dir():
        return ModelConfig.from_folder(Path(source))
    raise ModelError(f"{source!r} is neither a folder with a config.json nor a preset; known: {', '.join(PRESETS)}")


@torch.no_grad()
def fill_randomly(model: LlamaModel, seed: int) -> None:
    """Normal weights (deviation 0.02), norms of one; the same for the same seed, dtype and kind of device, however many
    ranks they are split over."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name, slot in model.weight_slots():
        part = model.layout.slice_of(name)
        if name.endswith("norm.weight"):
            slot.fill_(1.0)
        elif part is None:
            slot.normal_(0.0, 0.02, generator=generator)
        else:  # a rank draws all of the weight, and keeps its part
            shape = list(slot.shape)
            shape[part.dim] = part.full
            whole = torch.empty(shape, dtype=slot.dtype, device=slot.device).normal_(0.0, 0.02, generator=generator)
            slot.copy_(whole.narrow(part.dim, part.kept.start, len(part.kept)))
