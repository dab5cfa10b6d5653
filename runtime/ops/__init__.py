"""The arithmetic of a layer besides attention: plain PyTorch as the reference, fused kernels on a card."""

from __future__ import annotations

import importlib.util

import torch

from runtime.ops.base import Ops

__all__ = ["OPS", "Ops", "get_ops"]

OPS = ("auto", "reference", "fused")


def get_ops(name: str, device: torch.device | str) -> Ops:
    """The operations called `name`; "auto" is fused on a CUDA device with Triton, and the reference elsewhere.

    Raises ValueError for an unknown name, and for "fused" where the package Triton is missing.
    """
    if name not in OPS:
        raise ValueError(f"unknown operations {name!r}; known: {', '.join(OPS)}")
    there = importlib.util.find_spec("triton") is not None
    if name == "auto":
        name = "fused" if there and torch.device(device).type == "cuda" else "reference"
    if name == "fused":
        if not there:
            raise ValueError("fused operations need the package triton; pip install 'diptych[gpu]'")
        from runtime.ops.fused import FusedOps

        return FusedOps()
    from runtime.ops.reference import ReferenceOps

    return ReferenceOps()
