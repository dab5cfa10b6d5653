"""One request as a client sees it: when it was sent, when each chunk came, how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from experiments.token_times import COMPLETED
from runtime.client import APIError, APIStatusError, AsyncClient, Usage

_REFUSALS = range(400, 500)


@dataclass(slots=True)
class Measured:
    """What became of one request. Times are nanoseconds since the run began.

    Attributes:
        request_id: its row in the workload.
        due_ns: when it was to be sent. sent_ns: when it was.
        chunk_ns: when each chunk with output came.
        end_ns: when it ended: with its last such chunk, as `vllm bench serve` has it, or with its failure.
        status: `stop` or `length`; `refused` (an HTTP status of 4xx, or 503); `failed`; `unfinished`.
        error: why it failed.
        usage: token counts, if the server gave them.
    """

    request_id: int
    due_ns: int
    sent_ns: int
    chunk_ns: list[int] = field(default_factory=list)
    end_ns: int | None = None
    status: str = "unfinished"
    error: str = ""
    usage: Usage | None = None

    @property
    def completed(self) -> bool:
        """It has its whole answer."""
        return self.status in COMPLETED

    @property
    def output_tokens(self) -> int:
        """As the server counts them; without its usage, or of a request that failed, the chunks that came."""
        return len(self.chunk_ns) if self.usage is None else self.usage.completion_tokens


async def measure(
    client: AsyncClient,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    measured: Measured,
    timeout_s: float,
    now_ns: Callable[[], int],
) -> None:
    """Send a request and follow its answer to the end, into `measured`. A cancelled one stays `unfinished`."""
    reason = None
    chunk_ns = measured.chunk_ns
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in client.stream(path, body, headers):
                if chunk.has_output:
                    chunk_ns.append(now_ns())
                reason = chunk.finish_reason or reason
                measured.usage = chunk.usage or measured.usage
    except APIStatusError as error:
        refused = error.status_code in _REFUSALS or error.status_code == 503
        _fail(measured, str(error), now_ns(), "refused" if refused else "failed")
    except APIError as error:
        _fail(measured, str(error), now_ns())
    except TimeoutError:
        _fail(measured, f"no whole answer within {timeout_s:g} s", now_ns())
    else:
        _end(measured, reason, now_ns())


def _end(measured: Measured, reason: str | None, now_ns: int) -> None:
    if not measured.chunk_ns:
        _fail(measured, "the answer had no chunk with output", now_ns)
    elif reason in ("abort", "error"):
        _fail(measured, f"the server ended the answer with finish_reason {reason!r}", now_ns)
    else:
        measured.status = "length" if reason == "length" else "stop"
        measured.end_ns = measured.chunk_ns[-1]


def _fail(measured: Measured, error: str, now_ns: int, status: str = "failed") -> None:
    measured.status, measured.error, measured.end_ns = status, error, now_ns
