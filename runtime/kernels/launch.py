"""Launching kernels: with little work for the host, and compiling many of them at once before the first launch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

_state = threading.local()


@functools.cache
def use_pdl(device: torch.device) -> bool:
    """Whether kernels may start before the one in front has ended (programmatic dependent launch, Hopper and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors; on a CPU, where the interpreter runs the kernels, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class Kernel:
    """A Triton kernel that finds its compiled form by one look-up; Triton's own launch works it out anew each time.

    Launched as Triton's: `kernel[grid](*args, **constants)`. What selects the compiled form is the type and alignment
    of tensors, and the value of everything else but what is named in `do_not_specialize`.
    """

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted
        self._names = list(jitted.arg_names)
        self._free = {i for i, param in enumerate(jitted.params) if param.do_not_specialize}
        self._known: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if is_compiling():
            self.jitted.run(*args, grid=grid, warmup=True, **constants)
            return
        parts: list[Any] = [torch.cuda.current_device(), *constants.values()]
        for i, arg in enumerate(args):
            if isinstance(arg, Tensor):
                parts.append(arg.dtype)
                if arg.data_ptr() & 15:
                    parts.append(i)
            elif i not in self._free:
                parts.append(arg)
        key = tuple(parts)
        known = self._known.get(key)
        if known is not None:
            compiled, rest = known
            compiled[grid + (1,) * (3 - len(grid))](*args, *rest)
            return
        compiled = self.jitted[grid](*args, **constants)
        names = self._names[len(args) :]
        if compiled is not None and all(name in constants for name in names):
            self._known[key] = compiled, tuple(constants[name] for name in names)


def kernel(jitted: Any) -> Any:
    """Decorates a kernel that the host launches, over `triton.jit`. In Triton's interpreter it stays as it is."""
    return jitted if isinstance(jitted, InterpretedFunction) else Kernel(jitted)


def is_compiling() -> bool:
    """Whether launches compile only, and so leave their outputs unwritten."""
    return getattr(_state, "compiling", False)


@contextmanager
def compiling(threads: int = 16) -> Iterator[None]:
    """Inside, this thread's launches compile their kernels, in `threads`, and launch nothing; at the end all of them
    are compiled.
    """
    with ThreadPoolExecutor(threads) as executor, triton.AsyncCompileMode(executor):
        _state.compiling = True
        try:
            yield
        finally:
            _state.compiling = False
