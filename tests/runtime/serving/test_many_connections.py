"""Ten thousand clients at once, as a test of what happens to those that there is no room for."""

from __future__ import annotations

import asyncio
import collections
import json
import resource
from pathlib import Path

import psutil
import pytest

from tests.runtime.serving.running import PATIENCE, running

CONNECTIONS = 10_000
SPARE_FILES = 300
BODY = json.dumps({"prompt": [5] * 10, "max_tokens": 4, "ignore_eos": True}).encode()
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


@pytest.mark.slow
def test_ten_thousand_connections_are_each_answered_or_refused_in_bounded_memory(model_folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(CONNECTIONS, hard - SPARE_FILES)
    if count < 1000:
        pytest.skip(f"a process may open {hard} files here; raise ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with running(
            model_folder, "--max-queue", "1000", num_blocks=512, max_num_seqs=32, max_model_len=1024
        ) as server:
            front = psutil.Process(server.process.pid)
            before = front.memory_info().rss
            port = int(server.url.rsplit(":", 1)[1])
            statuses = collections.Counter(asyncio.run(_all(port, count)))
            grown = front.memory_info().rss - before
            assert sum(statuses.values()) == count
            assert set(statuses) == {200, 503}, statuses
            assert statuses[200] >= 1000
            assert grown < 40_000 * count, f"{grown / 2**20:.0f} MiB more"
            assert server.info()["live"] == server.info()["queued"] == 0
            assert server.metric("vllm:request_success_total", finished_reason="length") == statuses[200]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _all(port: int, count: int) -> list[int]:
    """All connections are open before the first request is sent."""
    connected = asyncio.Barrier(count)

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await connected.wait()
        writer.write(REQUEST)
        answer = await reader.read()
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        answered = json.loads(body)
        assert answered["usage"]["completion_tokens"] == 4 if status == 200 else answered["error"]["message"]
        assert status == 200 or b"retry-after" in head.lower()
        return status

    return await asyncio.wait_for(asyncio.gather(*(one() for _ in range(count))), 4 * PATIENCE)
