"""Swapping to host memory on a card: `python -m benchmarks.gpu.swap [--model PRESET] [--small]`.

The rate of the way that steps take, each direction, for the blocks of a model of Llama-3.1-8B's shape beside what the
link gave to plain pinned copies (52 to 53 GB/s); then output tokens a second of one work that wants twice the KV memory
there is, by each way of preempting. Random weights, bfloat16. `--small`: a small model on whatever device there is.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.results import out_folder, revision, save
from policies.model_shape import ModelShape
from policies.plan import BlockCopy
from policies.records import STEPS
from policies.replica_state import Limits
from policies.request import Request
from policies.shapes import default_capture_sizes, default_mixed_capture_sizes
from policies.stack import StackSpec
from runtime.engine import GPU_PLAN_LEAD_NS, Engine
from runtime.host_memory import HostMemory
from runtime.kv_cache import PagedKVCache, bytes_per_block
from runtime.sampling.params import SamplingParams
from runtime.weights import LoadedModel, load_model
from simulator.costs import RooflineCost
from simulator.devices import load_device

LINK_GB_S = (52.0, 53.0)
BLOCK_SIZE = 16
WAYS = ("last_admitted", "last_admitted,mode=swap", "cheapest")


@dataclass
class Counts:
    """A recorder that adds up what was swapped."""

    preemptions: int = 0
    steps: list[tuple[object, ...]] = field(default_factory=list)

    def request(self, row: tuple[object, ...]) -> None:
        """Counted by the engine."""

    def step(self, row: tuple[object, ...]) -> None:
        self.steps.append(row)

    def decision(self, row: tuple[object, ...]) -> None:
        self.preemptions += row[3] == "preempt"


def rates(loaded: LoadedModel, num_blocks: int) -> dict[str, float]:
    """GB/s out and in of one copy of `num_blocks` blocks: the best of 5, waited for."""
    model = loaded.model
    cache = PagedKVCache(loaded.config, num_blocks, BLOCK_SIZE, dtype=model.dtype, device=model.device)
    host = HostMemory(cache, num_blocks)
    ids, request = tuple(range(num_blocks)), Request(0, 0, 1, 1)
    size = num_blocks * bytes_per_block(loaded.config, BLOCK_SIZE, model.dtype)
    found = {}
    for name, out in (("out", True), ("in", False)):
        best = float("inf")
        for _ in range(5):
            wait(model.device)
            start = time.perf_counter()
            host.make([BlockCopy(request, out, ids[::-1], ids)])
            wait(model.device)
            best = min(best, time.perf_counter() - start)
        found[name] = size / best / 1e9
    host.close()
    return found


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def overcommitted(loaded: LoadedModel, cost: RooflineCost, preemption: str, small: bool) -> dict[str, object]:
    """Requests that in the end want twice the blocks there are."""
    count, prompt, output = (8, 40, 40) if small else (64, 512, 1024)
    blocks = count * -(-(prompt + output) // BLOCK_SIZE) // 2
    cuda = loaded.model.device.type == "cuda"
    limits = Limits(
        blocks, BLOCK_SIZE, count, 128 if small else 8192, prompt + output + 1, prefix_caching=False,
        capture_sizes=default_capture_sizes(count) if cuda else (),
        mixed_capture_sizes=default_mixed_capture_sizes(8192) if cuda else (),
        lag=1, plan_lead_ns=GPU_PLAN_LEAD_NS if cuda else None, num_host_blocks=2 * blocks,
    )  # fmt: skip
    counts = Counts()
    stack = StackSpec(preemption=preemption).build(block_size=BLOCK_SIZE)
    with Engine(loaded, limits, stack, recorder=counts, cost=cost) as engine:
        prompts = [[(7 * i + 3 * j) % 500 + 1 for j in range(prompt)] for i in range(count)]
        start = time.perf_counter()
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=output, ignore_eos=True))
        seconds = time.perf_counter() - start
    places = [list(STEPS).index(name) for name in ("swapped_out", "swapped_in")]
    swapped = [sum(int(row[at]) for row in counts.steps) for at in places]  # type: ignore[call-overload]
    return {
        "output_tokens_per_s": count * output / seconds,
        "seconds": seconds,
        "preemptions": counts.preemptions,
        "swapped_out_tokens": swapped[0],
        "swapped_in_tokens": swapped[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b", help="a preset")
    parser.add_argument("--small", action="store_true", help="a trial of the script, on a CPU too")
    options = parser.parse_args()
    name = "tiny" if options.small else options.model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(name, load_format="dummy", dtype=torch.bfloat16, device=device)
    cost = RooflineCost(ModelShape.preset(name).in_dtype("bfloat16"), load_device("h100-sxm"))
    result = {
        "benchmark": "gpu_swap",
        "model": name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "revision": revision(),
        "link_gb_s": LINK_GB_S,
        "gb_s": {f"{n} blocks": rates(loaded, n) for n in (8, 64, 512)},
        "overcommitted": {},
    }
    print(result["gb_s"], flush=True)
    for way in WAYS:
        figures = overcommitted(loaded, cost, way, options.small)
        result["overcommitted"][way] = figures  # type: ignore[index]
        print(way, figures, flush=True)
    save(result, out_folder() / f"gpu-swap{'-small' if options.small else ''}.json")


if __name__ == "__main__":
    main()
