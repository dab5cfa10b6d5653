"""What tensor parallelism costs and gains: `python -m benchmarks.tensor_parallel [--size N] [--small]`.

broadcast    bytes and time to tell the other ranks of a step of 1, 32 and 256 decodes; needs no GPU
tokens       greedy tokens of random models in float32 against one rank's: over gloo, and with GPUs over NCCL
all_reduce   time of one sum over the ranks inside a CUDA graph, by message size: ours, NCCL's and PyTorch's
steps        a decode step at batches of 1, 32 and 256, a prefill of 2,048 tokens and 256 requests at once, on one card
             and on N: the shape of Llama-3.1-8B, and that of Llama-3.1-70B cut to a few layers
fidelity     the 8B shape on N cards in both panels: what `diptych profile` measures, capacity, and 70% of it

Random weights, bfloat16. With fewer than N GPUs the parts that need them say "not run". Every part is a process of its
own; the result is written after each, into DIPTYCH_BENCH_OUT (else benchmarks/results), and what the time limit does
not allow is left out. Our sums are used as far as they are found to be faster. NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import works
from benchmarks.gpu.engines import Bench, greedy
from benchmarks.gpu.results import out_folder, revision, save
from experiments.fidelity.archive import pack as pack_folder
from experiments.fidelity.matrix import QUICK_SIZES, Cell, Sizes
from experiments.fidelity.sim_half import evaluate
from experiments.fidelity.tables import markdown
from experiments.fidelity.validation import full, quick
from experiments.fidelity.validation import measure as measure_cells
from policies.replica_state import Limits
from policies.stack import StackSpec
from runtime.device_state import StepRows
from runtime.engine import Engine
from runtime.parallel.exchange import LIMIT_VARIABLE
from runtime.parallel.leader import Leader
from runtime.parallel.ranks import Ranks
from runtime.parallel.wire import StepWork, pack, unpack
from runtime.weights import load_model

SIZES = replace(works.FULL, decode_batches=(1, 32, 256), decode_steps=64, prefills=(2048,), prefill_many=(8, 2048))
LAYERS_70B = 16
"""31 of 70B's 140 GB and room for 256 sequences' KV: the same model fits one card of 80 GB, and two."""
BLOCK_SIZE = 16
MODEL_8B = "llama-3.1-8b"


def decodes(count: int) -> StepWork:
    """A step of so many decodes, one in sixteen of which has a new block."""
    slots, one = np.arange(count), np.ones(count, np.int64)
    blocks = np.stack([slots[::16], slots[::16], slots[::16]], axis=1)
    rows = StepRows(blocks, slots, 500 * one, one, slots, one, count)
    return StepWork([], [], rows, np.zeros(count, np.float32), one, True, None)


def _follow(orders: Connection, answers: Connection) -> None:
    while message := orders.recv_bytes():
        received = time.monotonic_ns()
        unpack(message)
        answers.send((received, time.monotonic_ns()))


def broadcast(size: int) -> dict[str, Any]:
    """Microseconds, medians of 300: to pack, to hand to all sockets, until the last has it, and has unpacked it."""
    found: dict[str, Any] = {"ranks": size, "decodes": {}}
    fork = multiprocessing.get_context("fork")
    orders, answers = zip(*((fork.Pipe(), fork.Pipe()) for _ in range(size - 1)), strict=True)
    others = [
        fork.Process(target=_follow, args=(o[1], a[1]), daemon=True) for o, a in zip(orders, answers, strict=True)
    ]
    for other in others:
        other.start()
    for count in (1, 32, 256):
        work, times = decodes(count), []
        for _ in range(300):
            start = time.monotonic_ns()
            message = pack(work)
            packed = time.monotonic_ns()
            for ours, _ in orders:
                ours.send_bytes(message.data.cast("B"))
            sent = time.monotonic_ns()
            heard = [ours.recv() for ours, _ in answers]
            times.append(
                (packed - start, sent - packed, max(h[0] for h in heard) - start, max(h[1] for h in heard) - start)
            )
        names = ("pack", "send", "received", "unpacked")
        figures = {
            name: round(median(column) / 1e3, 1) for name, column in zip(names, zip(*times, strict=True), strict=True)
        }
        found["decodes"][count] = {"bytes": pack(work).nbytes, "us": figures}
        print(f"  {count} decodes: {found['decodes'][count]}", flush=True)
    for (ours, _), other in zip(orders, others, strict=True):
        ours.send_bytes(b"")
        other.join()
    return found


def tokens(size: int, device: str) -> dict[str, Any]:
    """Whether 24 greedy tokens of 8 prompts are one rank's, of random models in float32."""
    found: dict[str, Any] = {}
    names = ("tiny", "tiny-moe") if device == "cpu" else ("tiny-moe", "qwen2.5-0.5b")
    with Leader(size, device) as leader:
        for name in names:
            each = []
            for ranks in (Ranks(), leader):
                loaded = load_model(name, load_format="dummy", device=device, ranks=ranks)
                sizes = (1, 2, 4, 8) if loaded.model.device.type == "cuda" else ()
                limits = Limits(256, BLOCK_SIZE, 8, 256, 512, capture_sizes=sizes, lag=1)
                with Engine(loaded, limits, StackSpec().build(block_size=BLOCK_SIZE)) as engine:
                    prompts = [[(7 * i + 3 * j) % 500 + 1 for j in range(40 + i)] for i in range(8)]
                    each.append([c.token_ids for (c,) in engine.generate(prompts, greedy(24))])
            found[name] = "equal" if each[0] == each[1] else f"differ: {each}"
            print(f"  {name}: {found[name]}", flush=True)
    return found


def all_reduce(size: int) -> dict[str, Any]:
    """See `benchmarks.sums`."""
    from benchmarks import sums  # needs Triton

    found: dict[str, Any] = {}
    for found in sums.measure(size):
        print(f"PART {json.dumps(found)}", flush=True)
    print(f"  {found}", flush=True)
    return found


def crossover_kib(found: Any) -> int:
    """The largest message, in KiB, up to which our sums beat NCCL's, as measured; 0 where nothing is known."""
    found = found.get("found", found) if isinstance(found, dict) else None
    if found is None or not found.get("equal_on_all_ranks"):
        return 0
    ours, theirs = found["us"].get("ours"), found["us"]["nccl and norm"]
    if not isinstance(ours, dict):
        return 0
    largest = 0
    for size in sorted(map(int, ours)):
        if ours[str(size)] > theirs[str(size)]:
            break
        largest = size
    return largest


def steps(source: str, size: int, device: str, small: bool) -> dict[str, Any]:
    """The works of `benchmarks.gpu.serving` that say how long steps take; of a cut model only those of single steps."""
    found: works.Figures = {}
    ranks = Ranks() if size == 1 else Leader(size, device)
    started = time.perf_counter()
    bench = Bench(source, device, BLOCK_SIZE, ranks)
    sizes = works.SMALL if small else SIZES
    cut = os.path.isdir(source)
    try:
        found["load_s"] = time.perf_counter() - started
        for work in (works.decode, works.prefill) if cut else (works.decode, works.prefill, works.offline):
            work(bench, sizes, found)
            found["num_blocks"] = bench.engine().limits.num_blocks
            found["total_s"] = time.perf_counter() - started
            print(f"PART {json.dumps(found)}", flush=True)
    finally:
        bench.close_engine()
        ranks.close()
    return dict(found)


def fidelity(size: int, device: str, small: bool, trace: str | None, seconds: float) -> dict[str, Any]:
    """One cell of the matrix of docs/fidelity.md, served on N cards and simulated. Its folder is kept as one file."""
    started = time.monotonic()
    archive = out_folder() / f"tensor-parallel-fidelity{'-small' if small else ''}.tar"
    archive.parent.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        print(f"  [{time.monotonic() - started:5.1f} s] {line}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "fidelity" / ("tiny" if small else MODEL_8B)
        if small:
            base, all_works, _ = quick(tensor_parallel=size)
            sizes = QUICK_SIZES
        else:
            traces = {} if trace is None else {"chat": trace}
            base, all_works, _ = full(MODEL_8B, device, traces, tensor_parallel=size)
            sizes = Sizes(min(30.0, seconds / 4), 10.0, guess=30.0)
        cells = Cell("chat", None, "mixed"), Cell("chat", 0.7, "mixed")
        measure_cells(
            base,
            all_works,
            cells,
            folder,
            sizes,
            limit_s=seconds,
            say=say,
            kept=lambda: pack_folder(folder.parent, archive),
        )
        found = evaluate(folder, say=say)
        pack_folder(folder.parent, archive)
        print(markdown(found), flush=True)
    return {"cells": {name: {"levels": cell} for name, cell in found["cells"].items()}, "failed": found["failed"]}


def config_70b(folder: Path, num_layers: int) -> str:
    """A folder with the shape of Llama-3.1-70B, so many layers deep."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": num_layers, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {**rope, "original_max_position_embeddings": 8192}, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
    }  # fmt: skip
    path = folder / f"llama-3.1-70b-{num_layers}-layers"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def part(name: str, arguments: list[str], until: float, card: int | None = None) -> Any:
    """One part in a process of its own, which sees one card only where that is named: what it found, or why not."""
    left = until - time.monotonic()
    if left < 15:
        return "not run: no time left"
    print(f"{name} {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "benchmarks.tensor_parallel", "--part", name, *arguments]
    command += ["--limit-s", f"{left:.0f}"]
    environment = os.environ if card is None else {**os.environ, "CUDA_VISIBLE_DEVICES": str(card)}
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    found: Any = None
    timer = threading.Timer(left, os.killpg, (process.pid, signal.SIGKILL))  # with the ranks that it has started
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("PART "):
            found = json.loads(line.removeprefix("PART "))  # the last one has it all
        else:
            print(line, end="", flush=True)
    code = process.wait()
    timer.cancel()
    print(f"  {time.monotonic() - started:.1f} s", flush=True)
    if code == 0:
        return found
    return {"found": found, "failed": f"the process ended with status {code}"}


def scaling(result: dict[str, Any]) -> dict[str, Any]:
    """How many times faster N cards are than one, by what is measured."""
    found: dict[str, Any] = {}
    for model, by_size in result.items():
        if not isinstance(by_size, dict) or not all(isinstance(one, dict) for one in by_size.values()):
            continue
        alone = by_size.get("1", {})
        for size, figures in by_size.items():
            both = [name for name in figures if size != "1" and isinstance(alone.get(name), float)]
            if both:
                ratio = {
                    n: figures[n] / alone[n] if "tok_s" in n or "req_s" in n else alone[n] / figures[n] for n in both
                }
                found[f"{model} on {size}"] = {name: round(value, 2) for name, value in ratio.items()}
    return found


def main() -> None:
    for name in ("NCCL_NVLS_ENABLE", "NVSHMEM_DISABLE_NVLS"):
        os.environ[name] = "0" if name.startswith("NCCL") else "1"
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2, help="how many ranks")
    parser.add_argument("--limit-s", type=float, default=540.0, help="seconds for all of it")
    parser.add_argument("--small", action="store_true", help="a trial of the script, on a CPU")
    parser.add_argument("--cards-only", action="store_true", help="nothing where there are fewer cards")
    parser.add_argument("--trace", metavar="FILE", help="Azure's conversations, for the cell of the matrix")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--source", default="tiny", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        small, size, device = options.small, options.size, options.device
        found = {
            "broadcast": lambda: broadcast(size),
            "tokens": lambda: tokens(size, device),
            "all_reduce": lambda: all_reduce(size),
            "steps": lambda: steps(options.source, size, device, small),
            "fidelity": lambda: fidelity(size, device, small, options.trace, options.limit_s - 10),
        }[options.part]()
        print(f"PART {json.dumps(found)}", flush=True)
        return
    measure(options)


def measure(options: argparse.Namespace) -> None:
    until, size = time.monotonic() + options.limit_s, str(options.size)
    cards = torch.cuda.device_count()
    if cards < options.size:
        print(f"not run on cards: {options.size} CUDA devices are needed, and there are {cards}", flush=True)
        if options.cards_only:
            return
    kind = "-small" if options.small else "" if cards >= options.size else "-told"  # what cards gave is kept
    path = out_folder() / f"tensor-parallel{kind}.json"
    result: dict[str, Any] = {
        "benchmark": "tensor_parallel",
        "device": f"{cards} x {torch.cuda.get_device_name()}" if cards else "cpu",
        "torch": torch.__version__,
        "revision": revision(),
        "size": options.size,
    }

    def enter(key: str, name: str, *arguments: str, end: float = until) -> Any:
        result[key] = part(name, ["--size", size, *arguments], end)
        save(result, path)
        return result[key]

    if cards >= options.size and not options.small:
        on_cards(options, result, enter, until, path)
    enter("broadcast", "broadcast")
    result["broadcast_8"] = part("broadcast", ["--size", "8"], until)
    enter("tokens_gloo", "tokens")
    if options.small:
        result["steps"] = {"tiny": {n: part("steps", ["--size", n, "--small"], until) for n in ("1", size)}}
        enter("fidelity", "fidelity", "--small")
    save(result, path)


def on_cards(
    options: argparse.Namespace, result: dict[str, Any], enter: Callable[..., Any], until: float, path: Path
) -> None:
    """What needs N cards, the most telling first."""
    size = str(options.size)
    beat = crossover_kib(enter("all_reduce", "all_reduce", end=min(until, time.monotonic() + 70)))
    os.environ.setdefault(LIMIT_VARIABLE, str(beat * (options.size - 1)))
    result["small_sums_kib"] = int(os.environ[LIMIT_VARIABLE])
    enter("tokens_nccl", "tokens", "--device", "cuda", end=min(until, time.monotonic() + 60))
    measured: dict[str, Any] = {}
    result["steps"] = measured
    with tempfile.TemporaryDirectory() as folder:
        cut_name, cut = f"llama-3.1-70b, {LAYERS_70B} layers", config_70b(Path(folder), LAYERS_70B)

        saving = threading.Lock()

        def measure_steps(name: str, source: str, count: str, card: int | None = None) -> None:
            found = part("steps", ["--size", count, "--source", source, "--device", "cuda"], until, card)
            with saving:
                measured.setdefault(name, {})[count] = found
                result["times_faster"] = scaling(measured)
                save(result, path)

        measure_steps(MODEL_8B, MODEL_8B, size)
        with ThreadPoolExecutor() as side_by_side:  # on a card each
            jobs = [
                side_by_side.submit(measure_steps, MODEL_8B, MODEL_8B, "1", 0),
                side_by_side.submit(measure_steps, cut_name, cut, "1", 1),
            ]
        for job in jobs:
            job.result()
        trace = ["--trace", options.trace] if options.trace else []
        enter("fidelity", "fidelity", "--device", "cuda", *trace)
        measure_steps(cut_name, cut, size)
    print(json.dumps(result.get("times_faster"), indent=1), flush=True)


if __name__ == "__main__":
    main()
