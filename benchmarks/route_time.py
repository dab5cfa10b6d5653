"""How long a router takes to route a request: `python -m benchmarks.route_time [--json PATH] [--quick]`.

8, 64 and 1,000 replicas have 16 requests each, and 500 more are in flight. Every request has a session and a prompt of
1,024 tokens (64 blocks), half of which is one of 1,000 prefixes that one replica each has cached. What is timed is
`route` and the `on_end` of the oldest request, on this thread's processor time, with replicas that answer from plain
attributes: the panels' own figures cost what they cost (docs/contract.md).
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.saving import save
from policies import registry
from policies.contract import CostModel, PoolRole, Router
from policies.prefix import chain_key, root_key
from policies.request import Request
from simulator.costs.constant import ConstantCost
from simulator.links import LinkSpeed

REPLICAS = (8, 64, 1_000)
RUNNING = 16
IN_FLIGHT = 500
PREFIXES = 1_000
BLOCKS = 64
BLOCK_SIZE = 16
NUM_BLOCKS = 8_192
GAP_NS = 100_000
COST = ConstantCost(1_000_000)
LINK = LinkSpeed(5e10, 2**21)


@dataclass(slots=True)
class Replica:
    """A replica with as many figures as a router may ask for."""

    id: int
    cached: dict[bytes, None]
    num_waiting: int = 0
    num_running: int = RUNNING
    num_prefill_tokens: int = 0
    num_outstanding_tokens: int = 0
    num_blocks: int = NUM_BLOCKS
    num_free_blocks: int = NUM_BLOCKS
    pool: str = ""
    role: PoolRole = "both"
    cost: CostModel | None = COST
    max_num_seqs: int = 256

    def match(self, keys: Sequence[bytes]) -> int:
        for count, key in enumerate(keys):
            if key not in self.cached:
                return count
        return len(keys)


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds a request: `route` and `on_end`."""

    router: str
    replicas: int
    requests: int
    route_us: float
    end_us: float


def chain(parent: bytes, seed: int, length: int) -> list[bytes]:
    keys = []
    for k in range(length):
        parent = chain_key(parent, [seed, k])
        keys.append(parent)
    return keys


def measure(router: Router, name: str, num_replicas: int, requests: int) -> Row:
    """Route until enough are in flight, then so many more."""
    prefixes = [chain(root_key(), i, BLOCKS // 2) for i in range(PREFIXES)]
    replicas = [Replica(i, {}) for i in range(num_replicas)]
    for i, keys in enumerate(prefixes):
        replicas[i % num_replicas].cached.update(dict.fromkeys(keys))
    live: deque[tuple[Request, Replica]] = deque()
    route_ns = end_ns = 0
    gc.collect()
    for i in range(IN_FLIGHT + requests):
        now = i * GAP_NS
        request = Request(i, now, BLOCKS * BLOCK_SIZE, 256, session=i * 7_919 % 4_001, tenant=str(i % 16))
        prefix = prefixes[i * 7_919 % PREFIXES]
        keys = prefix + chain(prefix[-1], PREFIXES + i, BLOCKS // 2)
        start = time.thread_time_ns()
        route = router.route(request, keys, replicas, now)
        routed = time.thread_time_ns()
        assert route is not None
        replica = replicas[route.replica]
        replica.num_running += 1
        replica.num_outstanding_tokens += 1
        live.append((request, replica))
        if i >= IN_FLIGHT:
            ended, old = live.popleft()
            old.num_running -= 1
            old.num_outstanding_tokens -= 1
            route_ns += routed - start
            start = time.thread_time_ns()
            router.on_end(ended, old.id, now)
            end_ns += time.thread_time_ns() - start
    return Row(name, num_replicas, requests, route_ns / requests / 1_000, end_ns / requests / 1_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="save the figures here")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    options = parser.parse_args()
    console, rows = Console(), []
    table = Table("router", *(f"{n:,} replicas" for n in REPLICAS), title="µs a request: route + on_end")
    for name in registry.names("router"):
        of_name = []
        for n in REPLICAS:
            router = registry.make("router", name, seed=0, block_size=BLOCK_SIZE, cost=COST, transfer=LINK)
            of_name.append(measure(router, name, n, 200 if options.quick else 1_000))
        table.add_row(name, *(f"{row.route_us:,.1f} + {row.end_us:,.1f}" for row in of_name))
        rows += of_name
    console.print(table)
    if options.json is not None:
        settings = {
            "running": RUNNING,
            "in_flight": IN_FLIGHT,
            "prefixes": PREFIXES,
            "blocks": BLOCKS,
            "num_blocks": NUM_BLOCKS,
        }
        save(options.json, "route_time", settings, rows)
        console.print(f"saved to {options.json}")


if __name__ == "__main__":
    main()
