"""How many requests a second `diptych bench` sends on one core: `python -m benchmarks.load_generator [--json PATH]`.

A server in a process of its own answers each request with 8 chunks, 10 ms or 200 ms apart, so that few or hundreds are
in flight; it does nothing else, and knows when each answer must end. What the generator's records have beyond that is
its own: lateness of submissions, and time added to TTFT and E2E. Process time over the run is what a request costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.saving import cpu_name, save
from experiments.bench import run_bench
from experiments.bench.running import prepare
from experiments.bench.spec import check_bench
from experiments.records import read_run
from experiments.workloads import make_workload

CHUNKS = 8
PROMPT_TOKENS = 100
RATES = (100, 300, 500, 700)
GAPS_MS = (10, 200)
SECONDS = 10


@dataclass(frozen=True)
class Measured:
    """One rate. Times in milliseconds.

    Attributes:
        gap: between two chunks of an answer.
        rate: requests a second that were due; sent_per_s: that were sent.
        in_flight: requests, on average.
        late_p50, late_max: lateness of submissions.
        ttft_added_p50, e2e_added_p50, e2e_added_p99: measured beyond what the server took.
        cpu: process time of the generator, a request.
    """

    gap: int
    rate: int
    sent_per_s: float
    in_flight: int
    late_p50: float
    late_max: float
    ttft_added_p50: float
    e2e_added_p50: float
    e2e_added_p99: float
    cpu: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="save the figures here")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of sending, at each rate")
    options = parser.parse_args(argv)
    found = [measure(gap, rate, options.seconds) for gap in GAPS_MS for rate in RATES]
    headings = [name.replace("_", "\n") for name in asdict(found[0])]
    table = Table(*headings, title=f"diptych bench, one process, {cpu_name()}")
    for one in found:
        table.add_row(*(f"{value:,.1f}" if isinstance(value, float) else str(value) for value in asdict(one).values()))
    Console().print(table)
    if options.json is not None:
        save(options.json, "load_generator", {"prompt_tokens": PROMPT_TOKENS, "output_tokens": CHUNKS}, found)


def measure(gap_ms: int, rate: int, seconds: float) -> Measured:
    """Send for so many seconds at a rate."""
    workload = {"name": "fixed", "n": round(rate * seconds), "rate": rate}
    workload |= {"prompt_tokens": PROMPT_TOKENS, "output_tokens": CHUNKS}
    receive, send = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.Process(target=_serve, args=(send, gap_ms / 1000), daemon=True)
    server.start()
    spec = check_bench(base_url=f"http://127.0.0.1:{receive.recv()}", model="m", workload=workload, vocab_size=1000)
    target = prepare(spec, make_workload(spec.workload))
    with tempfile.TemporaryDirectory() as folder:
        before = time.process_time()
        outcome = run_bench(target, Path(folder))
        cpu = time.process_time() - before
        run = read_run(folder)
        requests = run.requests.merge(run.client, on="request_id")
    server.terminate()
    server.join()
    late, sent = requests["arrival_ns"] - requests["due_ns"], requests["arrival_ns"]
    ttft = (requests["first_token_ns"] - sent).to_numpy(np.float64) / 1e6 - gap_ms
    e2e = (requests["finish_ns"] - sent).to_numpy(np.float64) / 1e6 - CHUNKS * gap_ms
    assert outcome.counts.failed == 0
    return Measured(
        gap=gap_ms,
        rate=rate,
        sent_per_s=(len(sent) - 1) / ((sent.max() - sent.min()) / 1e9),
        in_flight=round(rate * (CHUNKS * gap_ms + float(np.median(e2e))) / 1000),
        late_p50=float(np.median(late)) / 1e6,
        late_max=float(late.max()) / 1e6,
        ttft_added_p50=float(np.median(ttft)),
        e2e_added_p50=float(np.median(e2e)),
        e2e_added_p99=float(np.percentile(e2e, 99)),
        cpu=1000 * cpu / len(sent),
    )


# The server: the least that answers, so that it is not what is measured


def _serve(port: Connection, gap_s: float) -> None:
    async def main() -> None:
        listening = await asyncio.start_server(lambda r, w: _answer(r, w, gap_s), "127.0.0.1", 0, backlog=4096)
        port.send(listening.sockets[0].getsockname()[1])
        await listening.serve_forever()

    asyncio.run(main())


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gap_s: float) -> None:
    loop = asyncio.get_running_loop()
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            start = loop.time()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for number in range(1, CHUNKS + 1):
                await asyncio.sleep(start + number * gap_s - loop.time())
                writer.write(_MIDDLE if number < CHUNKS else _END)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def _framed(*events: str) -> bytes:
    content = "".join(f"data: {event}\n\n" for event in events).encode()
    return b"%x\r\n%s\r\n" % (len(content), content)


def _chunk(finish_reason: str | None) -> str:
    choice = {"index": 0, "text": " a", "logprobs": None, "finish_reason": finish_reason}
    return json.dumps({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]})


_USAGE = json.dumps({"choices": [], "usage": {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": CHUNKS}})
_MIDDLE = _framed(_chunk(None))
_END = _framed(_chunk("length"), _USAGE, "[DONE]") + b"0\r\n\r\n"

if __name__ == "__main__":
    main()
