"""Attention backends by name, or by what the device can do.

A backend is registered with a function that says why it cannot run on a device (None when it can). `auto`
takes the first usable one in the order of registration; the reference `sdpa` runs anywhere and is asked last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.attention.base import AttentionBackend

__all__ = ["AttentionBackend", "backend_names", "get_backend", "register_backend"]

_REFERENCE = "sdpa"


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


def get_backend(name: str, device: torch.device | str) -> AttentionBackend:
    """The backend called `name`, or the first usable one for "auto".

    Raises ValueError for an unknown name (naming the known ones) and for one that cannot run on `device`.
    """
    device = torch.device(device)
    if name == "auto":
        name = next(known for known in backend_names() if _entries[known].why_unusable(device) is None)
    if name not in _entries:
        raise ValueError(f"unknown attention backend {name!r}; known: auto, {', '.join(backend_names())}")
    reason = _entries[name].why_unusable(device)
    if reason is not None:
        raise ValueError(f"attention backend {name!r} cannot run on {device}: {reason}")
    return _entries[name].make()


def _make_sdpa() -> AttentionBackend:
    from runtime.attention.sdpa import SdpaBackend

    return SdpaBackend()


register_backend(_REFERENCE, _make_sdpa, lambda device: None)
