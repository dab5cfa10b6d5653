"""What the HTTP server adds to an engine: `python -m benchmarks.server_overhead [--json PATH] [--quick]`.

The model is one layer of 16 numbers, so that a step costs next to nothing and what is left is the host's work. The same
requests (16 prompt tokens, 64 output tokens, a fixed number of them at a time) are served three ways:

engine   in one process, by `Engine.submit`: what the engine itself can do
stream   over HTTP, streamed, each event taken apart as it comes
whole    over HTTP, the answer as one JSON

Added latency is the stream's mean time between tokens less the engine's. The front's and the engine process's time on
the processor is read from the system, and the engine says where its thread's time goes. Clients, front and engine share
this machine's cores: with two of them, the figures at many requests at a time are of all three together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.saving import save
from experiments.serving import ServeOptions, serve_spec
from experiments.spec import RunSpec, check_spec
from policies.replica_state import Limits
from policies.stack import StackSpec
from runtime.engine import Engine
from runtime.event_loop import run
from runtime.sampling.params import SamplingParams
from runtime.sequence import Output
from runtime.serving.server import bind
from runtime.weights import load_model

PROMPT_TOKENS = 16
OUTPUT_TOKENS = 64
AT_ONCE = (1, 8, 64, 256)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
LIMITS: dict[str, Any] = {"num_blocks": 4096, "max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 512}


@dataclass(frozen=True)
class Row:
    """Figures of one way at one number of requests at a time. Times are microseconds; CPU times are per token."""

    way: str
    at_once: int
    requests: int
    requests_per_second: float
    tokens_per_second: float
    ttft_us: float | None
    between_tokens_us: float | None
    added_us: float | None = None
    front_cpu_us: float | None = None
    engine_cpu_us: float | None = None
    engine_step_us: dict[str, float] | None = None


def _row(way: str, at_once: int, lives: list[list[float]], took: float, requests: int, **more: Any) -> Row:
    """From the times at which each request was sent and had its tokens."""
    gaps = [(life[-1] - life[1]) / (len(life) - 2) for life in lives if len(life) > 2]
    firsts = [life[1] - life[0] for life in lives]
    return Row(
        way=way,
        at_once=at_once,
        requests=requests,
        requests_per_second=round(requests / took, 1),
        tokens_per_second=round(requests * OUTPUT_TOKENS / took),
        ttft_us=round(1e6 * statistics.mean(firsts)) if firsts else None,
        between_tokens_us=round(1e6 * statistics.mean(gaps), 1) if gaps else None,
        **more,
    )


def _prompt(i: int) -> list[int]:
    return [1 + (i * 7 + k) % 63 for k in range(PROMPT_TOKENS)]


def serve_in_process(engine: Engine, at_once: int, requests: int) -> Row:
    """The engine by itself; whoever has ended is followed by the next."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    lives: list[list[float]] = []
    done, left = threading.Semaphore(0), iter(range(requests))
    lock = threading.Lock()

    def submit() -> None:
        with lock:
            i = next(left, None)
        if i is None:
            return
        life = [time.perf_counter()]
        lives.append(life)

        def listen(output: Output) -> None:
            life.append(time.perf_counter())
            if output.finish_reason is not None:
                done.release()
                submit()

        engine.submit(_prompt(i), params, listen)

    start = time.perf_counter()
    for _ in range(min(at_once, requests)):
        submit()
    for _ in range(requests):
        done.acquire()
    return _row("engine", at_once, lives, time.perf_counter() - start, requests)


async def serve_over_http(port: int, at_once: int, requests: int, stream: bool) -> tuple[list[list[float]], float]:
    """As many connections as requests at a time, each kept; a bare client, to cost little itself."""
    lives: list[list[float]] = []
    left = iter(range(requests))

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for i in left:
            body = json.dumps(
                {
                    "prompt": _prompt(i),
                    "max_tokens": OUTPUT_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": stream,
                }
            )
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            life = [time.perf_counter()]
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            headers = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in headers.partition(b"\r\n")[0]:
                raise RuntimeError(headers.decode())
            if stream:
                while (size := int(await reader.readline(), 16)) > 0:
                    events = (await reader.readexactly(size + 2)).count(b'"choices":[{')
                    life += [time.perf_counter()] * events
                await reader.readline()
                lives.append(life)
            else:
                length = next(h for h in headers.lower().split(b"\r\n") if h.startswith(b"content-length"))
                await reader.readexactly(int(length.split(b":")[1]))
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(at_once)))
    return lives, time.perf_counter() - start


def _specification(folder: Path) -> RunSpec:
    return check_spec(
        {
            "workload": {"name": "fixed", "n": 1},
            "model": {"source": str(folder), "load_format": "dummy"},
            "limits": LIMITS,
        }
    )


@contextmanager
def server(folder: Path) -> Iterator[tuple[int, psutil.Process, psutil.Process]]:
    """The server in processes of its own: its port, its front, its engine."""
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    front = psutil.Popen([sys.executable, "-m", "benchmarks.server_overhead", "--serve", str(folder), str(port)])
    try:
        for _ in range(600):
            try:
                _get(port, "/health")
                break
            except OSError:
                time.sleep(0.1)
        (engine,) = [child for child in front.children() if "spawn_main" in " ".join(child.cmdline())]
        yield port, front, engine
    finally:
        front.terminate()
        front.wait(30)


def _get(port: int, path: str) -> bytes:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        data: bytes = answer.read()
    return data


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(folder: Path, at_once: tuple[int, ...], tokens: int) -> list[Row]:
    """All three ways at each number of requests at a time, each about so many tokens in all."""
    rows: dict[tuple[str, int], Row] = {}
    loaded = load_model(str(folder), load_format="dummy")
    with Engine(loaded, Limits(**LIMITS, lag=1), StackSpec().build()) as engine:
        for count in (at_once[-1], *at_once):  # the first to warm up
            rows["engine", count] = serve_in_process(engine, count, max(count, tokens // OUTPUT_TOKENS))
    with server(folder) as (port, front, engine_process):
        asyncio.run(serve_over_http(port, at_once[-1], at_once[-1], True))
        for count in at_once:
            requests = max(count, tokens // OUTPUT_TOKENS)
            for way in ("stream", "whole"):
                before = (
                    json.loads(_get(port, "/server_info"))["engines"][0]["steps"],
                    _cpu(front),
                    _cpu(engine_process),
                )
                lives, took = asyncio.run(serve_over_http(port, count, requests, way == "stream"))
                after = json.loads(_get(port, "/server_info"))["engines"][0]["steps"], _cpu(front), _cpu(engine_process)
                row = _row(way, count, lives, took, requests)
                base = rows["engine", count].between_tokens_us
                each = 1e6 / (requests * OUTPUT_TOKENS)
                rows[way, count] = Row(
                    **{
                        **asdict(row),
                        "added_us": None
                        if row.between_tokens_us is None or base is None
                        else round(row.between_tokens_us - base, 1),
                        "front_cpu_us": round((after[1] - before[1]) * each, 1),
                        "engine_cpu_us": round((after[2] - before[2]) * each, 1),
                        "engine_step_us": _parts(before[0], after[0]),
                    }
                )
    return list(rows.values())


def _parts(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Microseconds a step of the engine's thread between two looks."""
    steps = after["count"] - before["count"]
    parts = {"device": "device_us"}
    found = {name: (after[key] * after["count"] - before[key] * before["count"]) / steps for name, key in parts.items()}
    for part, value in after["host_us_by_part"].items():
        found[part] = (value * after["count"] - before["host_us_by_part"][part] * before["count"]) / steps
    return {name: round(value, 1) for name, value in found.items()}


def show(rows: list[Row], console: Console) -> None:
    """Two tables: what a client sees, and where the time goes."""
    table = Table(title=f"{PROMPT_TOKENS} prompt and {OUTPUT_TOKENS} output tokens a request; times in microseconds")
    for title in ("way", "at once", "requests/s", "tokens/s", "TTFT", "between tokens", "added", "front CPU/token",
                  "engine CPU/token"):  # fmt: skip
        table.add_column(title, justify="left" if title == "way" else "right")
    for row in sorted(rows, key=lambda row: (row.at_once, ("engine", "stream", "whole").index(row.way))):
        cells = (row.ttft_us, row.between_tokens_us, row.added_us, row.front_cpu_us, row.engine_cpu_us)
        table.add_row(
            row.way,
            str(row.at_once),
            f"{row.requests_per_second:,.1f}",
            f"{row.tokens_per_second:,.0f}",
            *("" if cell is None else f"{cell:,.0f}" for cell in cells),
        )
    console.print(table)
    streams = [row for row in rows if row.way == "stream" and row.engine_step_us]
    parts = Table(title="the engine's thread while streaming, microseconds a step")
    parts.add_column("at once", justify="right")
    names = list(streams[0].engine_step_us or {})
    for name in names:
        parts.add_column(name, justify="right")
    for row in streams:
        parts.add_row(str(row.at_once), *(f"{(row.engine_step_us or {})[name]:,.0f}" for name in names))
    console.print(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the figures here")
    parser.add_argument("--quick", action="store_true", help="a tenth of the tokens")
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        folder, port = options.serve
        run(serve_spec(_specification(Path(folder)), ServeOptions(port=int(port), drain_s=0)))
        return
    console = Console(width=None if os.isatty(1) else 120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "nano"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        rows = measure(folder, AT_ONCE, 3_200 if options.quick else 16_000)
    show(rows, console)
    if options.json is not None:
        settings = {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS, **LIMITS}
        save(options.json, "server_overhead", settings, rows)
        console.print(f"saved to {options.json}")


if __name__ == "__main__":
    main()
