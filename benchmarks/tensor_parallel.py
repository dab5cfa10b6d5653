"""What tensor parallelism costs and gains: `python -m benchmarks.tensor_parallel [--size N] [--small]`.

broadcast    bytes and time to tell the other ranks of a step of 1, 32 and 256 decodes; needs no GPU
tokens       greedy tokens of random models in float32 against one rank's: over gloo, and with GPUs over NCCL
all_reduce   time of one sum over the ranks inside a CUDA graph, by message size
steps        a decode step at batches of 1, 32 and 256, a prefill of 2,048 tokens and 256 requests at once, on one card
             and on N: the shape of Llama-3.1-8B, and that of Llama-3.1-70B cut to as many layers as fit one card

Random weights, bfloat16. With fewer than N GPUs the parts that need them say "not run". Every part is a process of its
own; the result is written after each, into DIPTYCH_BENCH_OUT (else benchmarks/results), and what the time limit does
not allow is left out. NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
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
from policies.replica_state import Limits
from policies.stack import StackSpec
from runtime.device_state import StepRows
from runtime.engine import Engine
from runtime.parallel import ranks as parallel
from runtime.parallel.leader import Leader
from runtime.parallel.ranks import Ranks
from runtime.parallel.shard import Shard
from runtime.parallel.wire import StepWork, pack, unpack
from runtime.weights import load_model

SIZES = replace(works.FULL, decode_batches=(1, 32, 256), decode_steps=64, prefills=(2048,), prefill_many=(8, 2048))
LAYERS_70B = 24
"""41 of 70B's 140 GB and room for 256 sequences' KV: the same model fits one card of 80 GB, and two."""
BLOCK_SIZE = 16


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
    names = ("tiny", "tiny-moe") if device == "cpu" else ("tiny", "tiny-moe", "qwen2.5-0.5b", "qwen3-0.6b")
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
    """Microseconds of a sum of [tokens, 8192] in bfloat16, 40 of them in one graph."""
    with tempfile.TemporaryDirectory() as folder:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        all_of_them = [
            spawn.Process(target=_reduce, args=(rank, size, Path(folder) / "store", theirs)) for rank in range(size)
        ]
        for one in all_of_them:
            one.start()
        theirs.close()
        found: dict[str, Any] = ours.recv()
        for one in all_of_them:
            one.join()
    print(f"  {found}", flush=True)
    return found


def _reduce(rank: int, size: int, store: Path, result: Connection) -> None:
    device, count = torch.device("cuda", rank), 40
    parallel.join(rank, size, device, store)
    ranks, found = Ranks(Shard(rank, size)), {}
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for rows in (1, 8, 32, 128, 256, 1024, 2048):
            x = torch.zeros(rows, 8192, dtype=torch.bfloat16, device=device)
            ranks.all_reduce(x)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(count):
                    ranks.all_reduce(x)
            times = []
            for _ in range(20):
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                began.record()
                graph.replay()
                ended.record()
                ended.synchronize()
                times.append(1e3 * began.elapsed_time(ended) / count)
            found[f"{x.nbytes // 1024} KiB"] = round(median(times), 1)
            del graph
    if rank == 0:
        result.send(found)
    parallel.leave()


def steps(source: str, size: int, device: str, small: bool) -> dict[str, Any]:
    """The works of `benchmarks.gpu.serving` that say how long steps take."""
    found: works.Figures = {}
    ranks = Ranks() if size == 1 else Leader(size, device)
    started = time.perf_counter()
    bench = Bench(source, device, BLOCK_SIZE, ranks)
    try:
        found["load_s"] = time.perf_counter() - started
        for work in (works.decode, works.prefill, works.offline):
            work(bench, works.SMALL if small else SIZES, found)
            found["num_blocks"] = bench.engine().limits.num_blocks
            print(f"PART {json.dumps(found)}", flush=True)
    finally:
        bench.close_engine()
        ranks.close()
    return dict(found)


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


def part(name: str, arguments: list[str], until: float) -> Any:
    """One part in a process of its own: what it found, or why it did not."""
    left = until - time.monotonic()
    if left < 20:
        return "not run: no time left"
    print(f"{name} {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "benchmarks.tensor_parallel", "--part", name, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    found: Any = None
    timer = _kill_after(process, left)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("PART "):
            found = json.loads(line.removeprefix("PART "))  # the last one has it all
        else:
            print(line, end="", flush=True)
    code = process.wait()
    timer.cancel()
    if code == 0:
        return found
    return {"found": found, "failed": f"the process ended with status {code}"}


def _kill_after(process: subprocess.Popen[str], seconds: float) -> Any:
    import threading

    timer = threading.Timer(seconds, process.kill)
    timer.start()
    return timer


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
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--source", default="tiny", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        small = options.small
        found = {
            "broadcast": lambda: broadcast(options.size),
            "tokens": lambda: tokens(options.size, options.device),
            "all_reduce": lambda: all_reduce(options.size),
            "steps": lambda: steps(options.source, options.size, options.device, small),
        }[options.part]()
        print(f"PART {json.dumps(found)}", flush=True)
        return
    measure(options)


def measure(options: argparse.Namespace) -> None:
    until, size = time.monotonic() + options.limit_s, str(options.size)
    path = out_folder() / f"tensor-parallel{'-small' if options.small else ''}.json"
    cards = torch.cuda.device_count()
    result: dict[str, Any] = {
        "benchmark": "tensor_parallel",
        "device": f"{cards} x {torch.cuda.get_device_name()}" if cards else "cpu",
        "torch": torch.__version__,
        "revision": revision(),
        "size": options.size,
    }

    def enter(key: str, name: str, *arguments: str) -> None:
        result[key] = part(name, ["--size", size, *arguments], until)
        save(result, path)

    enter("broadcast", "broadcast")
    result["broadcast_8"] = part("broadcast", ["--size", "8"], until)
    enter("tokens_gloo", "tokens")
    if options.small:
        result["steps"] = {"tiny": {n: part("steps", ["--size", n, "--small"], until) for n in ("1", size)}}
    if cards < options.size:
        result["gpu"] = f"not run: {options.size} CUDA devices are needed, and there are {cards}"
        print(result["gpu"], flush=True)
        save(result, path)
        return
    enter("tokens_nccl", "tokens", "--device", "cuda")
    enter("all_reduce_us", "all_reduce")
    measured: dict[str, Any] = {}
    result["steps"] = measured
    with tempfile.TemporaryDirectory() as folder:
        deepest = min(80, int(0.55 * cards_bytes(options.size) / 1.72e9))
        sources = {
            "llama-3.1-8b": ("llama-3.1-8b", ("1", size)),
            f"llama-3.1-70b, {LAYERS_70B} layers": (config_70b(Path(folder), LAYERS_70B), ("1", size)),
            f"llama-3.1-70b, {deepest} layers": (config_70b(Path(folder), deepest), (size,)),
        }
        for name, (source, counts) in sources.items():
            for count in counts:
                arguments = ["--size", count, "--source", source, "--device", "cuda"]
                measured.setdefault(name, {})[count] = part("steps", arguments, until)
                result["times_faster"] = scaling(measured)
                save(result, path)
    print(json.dumps(result["times_faster"], indent=1), flush=True)


def cards_bytes(size: int) -> int:
    """Memory of so many cards."""
    return sum(torch.cuda.get_device_properties(card).total_memory for card in range(size))


if __name__ == "__main__":
    main()
