"""Attention backends by name, or by what the device can do.

A backend is registered with a function that says why it cannot run on a device (None when it can). `auto`
takes the first usable one in the order of registration; the reference `sdpa` runs anywhere and is asked last.

"prefill=fa4,decode=triton" gives chunks to one backend and decodes to another; `fastest` tries on the device which.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.attention.base import AttentionBackend
from runtime.attention.fastest import AttentionShape, fastest
from runtime.attention.split import SplitBackend

__all__ = ["AttentionBackend", "AttentionShape", "backend_names", "get_backend", "register_backend"]

_REFERENCE = "sdpa"
_PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class _Entry:
    make: Callable[[], AttentionBackend]
    why_unusable: Callable[[torch.device], str | None]


_entries: dict[str, _Entry] = {}


def register_backend(
    name: str,
    make: Callable[[], AttentionBackend],
    why_unusable: Callable[[torch.device], str | None],
) -> None:
    """Add a backend. `make` may import what it needs. Raises ValueError when the name is taken."""
    if name in _entries:
        raise ValueError(f"an attention backend named {name!r} is already registered; choose another name")
    _entries[name] = _Entry(make, why_unusable)


def backend_names() -> list[str]:
    """Names in the order `auto` tries them."""
    return sorted(_entries, key=lambda name: name == _REFERENCE)


def get_backend(name: str, device: torch.device | str, shape: AttentionShape | None = None) -> AttentionBackend:
    """The backend called `name`; for "auto" the first usable one on a CUDA device, elsewhere the reference; or a pair.

    "prefill=NAME,decode=NAME" is a pair by name, where a phase left out is "auto". "fastest" is the pair that is
    fastest for attention of `shape` on this device; it takes seconds to find out, and minutes where kernels are built
    first. Where there is nothing to choose between it is "auto".

    Raises ValueError for an unknown name or phase (naming the known ones), for a backend that cannot run on `device`,
    and for "fastest" without a shape where several backends can run.
    """
    device = torch.device(device)
    if name == "fastest":
        return _fastest(device, shape)
    if "=" not in name:
        return _by_name(name, device)
    names = dict.fromkeys(_PHASES, "auto")
    for part in name.split(","):
        phase, _, backend = (text.strip() for text in part.partition("="))
        if phase not in names:
            raise ValueError(f"unknown phase {phase!r} in attention {name!r}; known: {', '.join(_PHASES)}")
        names[phase] = backend
    return SplitBackend(*(_by_name(names[phase], device) for phase in _PHASES))


def _by_name(name: str, device: torch.device) -> AttentionBackend:
    if name == "auto":
        name = _usable(device)[0] if device.type == "cuda" else _REFERENCE
    if name not in _entries:
        raise ValueError(f"unknown attention backend {name!r}; known: auto, fastest, {', '.join(backend_names())}")
    reason = _entries[name].why_unusable(device)
    if reason is not None:
        raise ValueError(f"attention backend {name!r} cannot run on {device}: {reason}")
    return _entries[name].make()


def _usable(device: torch.device) -> list[str]:
    return [name for name in backend_names() if _entries[name].why_unusable(device) is None]


def _fastest(device: torch.device, shape: AttentionShape | None) -> AttentionBackend:
    candidates = [name for name in _usable(device) if name != _REFERENCE]
    if device.type != "cuda" or len(candidates) < 2:
        return _by_name("auto", device)
    if shape is None:
        raise ValueError("attention 'fastest' is measured for a model's shape, and there is none; choose 'auto'")
    return fastest(shape, device, (_entries[name].make() for name in candidates))


def _make_sdpa() -> AttentionBackend:
    from runtime.attention.sdpa import SdpaBackend

    return SdpaBackend()


def _make_triton() -> AttentionBackend:
    from runtime.attention.triton import TritonBackend

    return TritonBackend()


def _why_no_triton(device: torch.device) -> str | None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a CUDA device (on a CPU, TRITON_INTERPRET=1 runs it in Triton's interpreter, slowly)"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing; pip install 'diptych[gpu]'"
    return None


def _make_flashinfer() -> AttentionBackend:
    from runtime.attention.flashinfer import FlashInferBackend

    return FlashInferBackend()


def _why_no_flashinfer(device: torch.device) -> str | None:
    if _capability(device) != 9:
        return "its FlashAttention-3 kernels need a Hopper GPU (compute capability 9.0)"
    if not _is_installed("flashinfer"):
        return "the package flashinfer-python is missing; pip install 'diptych[flashinfer]'"
    return None


def _make_fa4() -> AttentionBackend:
    from runtime.attention.fa4 import Fa4Backend

    return Fa4Backend()


def _why_no_fa4(device: torch.device) -> str | None:
    if _capability(device) not in (9, 10, 11):
        return "its paged kernels need a Hopper or data-centre Blackwell GPU (compute capability 9.0 to 11.0)"
    if not _is_installed("flash_attn.cute"):
        return "the package flash-attn-4 is missing; pip install 'diptych[fa4]'"
    return None


def _capability(device: torch.device) -> int:
    """Major compute capability; 0 for what is no CUDA device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_capability(device)[0]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


register_backend("triton", _make_triton, _why_no_triton)
register_backend("flashinfer", _make_flashinfer, _why_no_flashinfer)
register_backend("fa4", _make_fa4, _why_no_fa4)
register_backend(_REFERENCE, _make_sdpa, lambda device: None)
