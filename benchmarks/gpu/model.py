"""Measures one model in a process of its own, so that its start is a start. Begun by `benchmarks.gpu.serving`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu.engines import MAX_MODEL_LEN, MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, MIXED, STEADY, Bench
from benchmarks.gpu.lengths import read_lengths
from benchmarks.gpu.online import online
from benchmarks.gpu.profiling import idle
from benchmarks.gpu.results import Result, result_path, revision, save
from benchmarks.gpu.works import FULL, SMALL, Details, Figures, Sizes, azure, decode, offline, prefill
from policies.collecting import few_collections

LIMITS_S = {"startup": 240, "decode": 120, "prefill": 60, "idle": 120, "offline": 120, "azure": 180, "online": 400}
CLOSE_S = 30
SLOW = 10  # a CPU gets so many times longer


class Run:
    """The parts of one model's measurement, each on its own: one that fails is noted, and the next one runs."""

    def __init__(self, options: argparse.Namespace, started_ns: int, imported_ns: int) -> None:
        self.options = options
        self.started_ns = started_ns
        self.sizes: Sizes = SMALL if options.small else FULL
        if options.repeats is not None:
            self.sizes = dataclasses.replace(self.sizes, decode_repeats=options.repeats)
        self.path = result_path(options.out, options.model, options.small)
        self.import_s = (imported_ns - started_ns) / 1e9
        self.bench: Bench | None = None
        self.lengths: list[tuple[int, int]] = []
        self.result: Result = {
            "benchmark": "gpu_serving",
            "model": options.model,
            "small": options.small,
            "device": device_name(options.device),
            "software": software(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": options.command,
            "revision": revision(),
            "settings": {
                "dtype": "bfloat16",
                "weights": "random",
                "block_size": options.block_size,
                "max_num_seqs": MAX_NUM_SEQS,
                "max_model_len": MAX_MODEL_LEN,
                "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
                "scheduler": {"decode, prefill, offline256": STEADY, "azure, online": MIXED},
                "prefix_caching": False,
            },
            "metrics": {},
            "parts": {},
            "errors": {},
            "finished": False,
        }

    def all(self, parts: list[str]) -> bool:
        """Run the parts in order. Returns whether all went well."""
        self.part("startup", self.startup)
        if self.bench is not None:
            bench, sizes = self.bench, self.sizes
            todo: dict[str, Callable[[Figures], Details]] = {  # by engine: each is made once
                "online": lambda found: online(bench, sizes, found, self.azure_lengths()),
                "azure": lambda found: azure(bench, sizes, found, self.azure_lengths()),
                "decode": lambda found: decode(bench, sizes, found),
                "prefill": lambda found: prefill(bench, sizes, found),
                "offline": lambda found: offline(bench, sizes, found),
                "idle": lambda found: idle(bench, sizes, found),
            }
            for name, work in todo.items():
                if name in parts:
                    self.part(name, work)
            self.close()
        self.result["finished"] = True
        save(self.result, self.path)
        return not self.result["errors"]

    def part(self, name: str, work: Callable[[Figures], Details]) -> None:
        """One part: its metrics and details into the result, and the result into its file."""
        print(f"{self.options.model}: {name}", flush=True)
        began = time.monotonic()
        try:
            with limited(LIMITS_S[name] * (1 if self.options.device.startswith("cuda") else SLOW)):
                details = work(self.result["metrics"])
            self.result["parts"][name] = {"seconds": round(time.monotonic() - began, 2), **details}
        except Exception:
            self.result["errors"][name] = traceback.format_exc()
            print(f"  {name} FAILED\n{traceback.format_exc()}", flush=True)
            self.close()  # what it left running is nothing for the next part
        save(self.result, self.path)

    def close(self) -> None:
        """Close the engine; one that does not let itself be closed ends the run."""
        if self.bench is None:
            return
        try:
            with limited(CLOSE_S):
                self.bench.close_engine()
        except TimeoutError:
            self.result["errors"]["close"] = "the engine did not stop"
            save(self.result, self.path)
            print("  the engine does not stop", flush=True)
            os._exit(1)

    def startup(self, found: Figures) -> Details:
        """From the start of the process to the first output token."""
        seconds_of = {"import": self.import_s}
        began = time.monotonic()
        self.bench = Bench(self.options.model, self.options.device, self.options.block_size)
        loaded = time.monotonic()
        engine = self.bench.engine(MIXED, warm=False)
        ready = time.monotonic()
        self.bench.generate(self.bench.prompts([16]), [1])
        total = found["start_s"] = (time.monotonic_ns() - self.started_ns) / 1e9
        seconds_of |= {"load": loaded - began, "engine": ready - loaded, "first token": time.monotonic() - ready}
        inside: dict[str, float] = dict(getattr(engine, "startup_seconds", {}))
        seconds_of |= {f"engine: {name}": seconds for name, seconds in inside.items()}
        print("  " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in seconds_of.items()), flush=True)
        self.result["settings"]["num_blocks"] = engine.limits.num_blocks
        self.bench.warm_up()
        warm = (time.monotonic_ns() - self.started_ns) / 1e9 - total
        return {"seconds_of": seconds_of, "warm_up_s": warm}

    def azure_lengths(self) -> list[tuple[int, int]]:
        """Read once; where they are from goes into the result."""
        if not self.lengths:
            self.lengths, self.result["lengths"] = read_lengths(self.options.azure, *self.sizes.azure_cut)
        return self.lengths


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises TimeoutError inside where it takes longer. On the main thread only."""

    def on_alarm(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def device_name(device: str) -> str:
    """The card's name, or the processor's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"CPU ({platform.processor() or platform.machine()})"


def software() -> dict[str, str | None]:
    """Versions of what the speed depends on."""
    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "triton": triton,
        "python": platform.python_version(),
    }


@few_collections()
def main() -> None:
    imported_ns = time.monotonic_ns()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("parts", help="names, with commas")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--azure", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--started-ns", type=int, required=True, help="monotonic clock at the start of this process")
    parser.add_argument("--command", required=True, help="what the user typed, for the record")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device; use --device cpu")
    well = Run(options, options.started_ns, imported_ns).all(options.parts.split(","))
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
