"""What an engine counts while it runs: steps, tokens, preemptions, prefix hits, and where its thread's time goes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from policies.control_plane import ControlPlane
from policies.plan import Report, Step

HOST_PARTS = ("deliver", "plan", "launch", "wait", "take", "report", "send", "idle")
"""Taking in what has arrived; the policy and its enactment; preparing and launching; waiting for the device; stop rules
and texts of what was sampled; the report; telling the listeners; sleeping because there is nothing to do."""


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine started, and gauges as they are now. Times are nanoseconds, prefix figures tokens.

    `host_ns` is the engine thread's time by part; all of it but `wait` and `idle` is the host's own work.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_steps: int = 0
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_queried: int = 0
    num_prefix_hits: int = 0
    device_ns: int = 0
    host_ns: dict[str, int] = field(default_factory=lambda: dict.fromkeys(HOST_PARTS, 0))

    def launched(self, step: Step) -> None:
        """A step is on its way."""
        self.num_steps += step.runs
        self.num_computed_tokens += step.shape.num_decodes + step.shape.chunk_tokens
        self.num_preemptions += len(step.preempted)
        for request in step.admitted:
            if request.num_preemptions == 0:
                self.num_prefix_queried += request.num_prompt_tokens
                self.num_prefix_hits += request.num_cached_tokens

    def collected(self, report: Report) -> None:
        """A step's result is there."""
        self.device_ns += report.device_ns

    def look(self, plane: ControlPlane) -> None:
        """Bring the gauges up to date."""
        self.num_running = plane.num_running
        self.num_waiting = plane.num_waiting
        self.num_free_blocks = plane.num_free_blocks


class LapClock:
    """Adds the time since the last lap to a part of `EngineStats.host_ns`."""

    def __init__(self, ns: dict[str, int]) -> None:
        self._ns = ns
        self._last = time.monotonic_ns()

    def lap(self, part: str) -> None:
        """The time until now went into this part."""
        now = time.monotonic_ns()
        self._ns[part] += now - self._last
        self._last = now
