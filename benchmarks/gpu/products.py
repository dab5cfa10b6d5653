"""Matrix products of few rows on a card: `python -m benchmarks.gpu.products [--rows 1 2 ...]`.

Two figures, for the products of two models, in bfloat16, against cuBLAS:

product  each product alone, in a CUDA graph of many launches over so many copies of the weights that the L2 cache holds
         none of them when its turn comes; every candidate tiling is checked against float32 and timed
stack    all products of a decode step in one CUDA graph, each reading what the one before wrote, all weights distinct:
         the figure that counts, since a kernel may ask for its weights while the one before it ends

cuBLAS does the gated product without its activation, so that the stack holds nothing but products on either side.
The candidates are compiled first, by several processes, into Triton's cache on disk.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from benchmarks.gpu.results import header, out_folder, save
from runtime.kernels import skinny
from runtime.kernels.skinny import Tiling

ROWS = (1, 2, 4, 8, 16, 32, 64)
PEAK = 3.35  # TB/s of an H100's data sheet
L2_ROUND = 200e6  # bytes of weights between two uses of the same
ERROR = 5e-3  # relative, in norm; one rounding to bfloat16 is 1.7e-3
SHARED_BYTES = 227 * 1024
WORKERS = 12


@dataclass(frozen=True)
class Product:
    """`n` outputs of `k` inputs; gated, twice the weights."""

    name: str
    n: int
    k: int
    gated: bool = False

    @property
    def total(self) -> int:
        return 2 * self.n if self.gated else self.n

    @property
    def bytes(self) -> int:
        return 2 * self.total * self.k


@dataclass(frozen=True)
class Model:
    """`layers` times the first four products, each feeding the next, and a head."""

    name: str
    layers: int
    products: tuple[Product, ...]

    @property
    def bytes(self) -> int:
        return self.layers * sum(p.bytes for p in self.products[:-1]) + self.products[-1].bytes


def model(name: str, layers: int, hidden: int, queries: int, qkv: int, inner: int, vocabulary: int) -> Model:
    products = (
        Product("qkv", qkv, hidden),
        Product("output", hidden, queries),
        Product("gate_up", inner, hidden, gated=True),
        Product("down", hidden, inner),
        Product("head", vocabulary, hidden),
    )
    return Model(name, layers, products)


MODELS = (
    model("Llama-3.1-8B", 32, hidden=4096, queries=4096, qkv=6144, inner=14336, vocabulary=128256),
    model("Llama-3.1-8B, half", 32, hidden=4096, queries=2048, qkv=3072, inner=7168, vocabulary=64128),
    model("Qwen3-0.6B", 28, hidden=1024, queries=2048, qkv=4096, inner=3072, vocabulary=151936),
)


def vector_candidates(product: Product, m: int) -> list[Tiling]:
    """Tilings by (warps, weights on their way, blocks of rows a program)."""
    shapes = [(4, 32768, 1), (4, 16384, 1), (8, 32768, 1), (2, 16384, 1), (4, 16384, 2), (4, 16384, 4), (4, 32768, 2)]
    if m > 1:
        shapes = [(4, 16384, 1), (8, 32768, 1), (4, 16384, 2), (4, 8192, 1)]
    found = []
    for warps, weights, blocks in shapes:
        block_k = 256 * warps
        tiles = math.ceil(product.k / block_k)
        block_n = min(32, 2 ** int(math.log2(max(1, weights // (tiles * block_k)))))
        while block_n > 2 and product.total // (block_n * blocks) < 128:
            block_n //= 2
        depth = max(1, min(tiles, weights // (block_n * block_k)))
        found.append(Tiling(block_n, block_k, warps, depth, blocks=blocks))
    return found


def matrix_candidates(product: Product, m: int) -> list[Tiling]:
    """Tilings that leave programs for half the card at least and fit its shared memory."""
    block_m = max(8, 2 ** math.ceil(math.log2(m)))
    shapes = [  # block_n, block_k, warps, depth, prefetch
        (16, 256, 4, 6, 1024),
        (16, 512, 4, 5, 2048),
        (32, 256, 4, 4, 1024),
        (32, 256, 4, 5, 0),
        (32, 128, 4, 8, 1024),
        (64, 128, 4, 5, 512),
        (64, 256, 4, 4, 512),
        (128, 128, 8, 4, 256),
    ]
    return [
        Tiling(block_n, block_k, warps, depth, dot=True, prefetch=prefetch)
        for block_n, block_k, warps, depth, prefetch in shapes
        if (block_n + block_m) * block_k * depth * 2 <= SHARED_BYTES
        and product.total // block_n >= 60
        and product.total // block_n <= 2400
        and 2 * block_n >= block_m
    ]


def candidates(product: Product, m: int) -> list[Tiling]:
    """What to time, the fixed rule's choice first."""
    found = [skinny._config(m, product.total, product.k)]
    if m <= skinny.VECTOR_ROWS:
        found += vector_candidates(product, m)
    if m > 1:
        found += matrix_candidates(product, m)
    return list(dict.fromkeys(found))


@functools.cache
def spare_weights() -> Tensor:
    return torch.empty(max(p.bytes for each in MODELS for p in each.products) // 2, dtype=torch.bfloat16, device="cuda")


def compile_one(case: tuple[Product, int, Tiling]) -> str | None:
    """Launch once, on whatever the memory holds; what went wrong, if anything."""
    product, m, tiling = case
    try:
        weight = spare_weights()[: product.total * product.k].view(product.total, product.k)
        x = torch.empty(m, product.k, dtype=torch.bfloat16, device="cuda")
        skinny.launch(x, weight, None, None, product.gated, tiling)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{product.name} m={m} {tiling}: {type(error).__name__}: {str(error)[:200]}"
    return None


def compile_all(models: list[Model], rows: list[int]) -> None:
    """Fill Triton's cache; kernels of the tensor cores serve all rows of the same padding."""
    cases = {}
    for each in models:
        for product in each.products:
            for m in rows:
                for tiling in candidates(product, m):
                    padded = max(8, 2 ** math.ceil(math.log2(m))) if tiling.dot else m
                    cases[product, padded, tiling] = (product, m, tiling)
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        for problem in pool.map(compile_one, cases.values(), chunksize=4):
            if problem:
                print("not compiled:", problem)
    print(f"{len(cases)} kernels compiled", flush=True)


def graph_us(body: Callable[[], object], replays: int = 7) -> float:
    """Microseconds of one replay of `body` in a CUDA graph: the median."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def random_weight(total: int, k: int) -> Tensor:
    return torch.randn(total, k, dtype=torch.bfloat16, device="cuda").mul_(k**-0.5)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


def time_product(name: str, product: Product, rows: list[int]) -> list[dict[str, Any]]:
    """Every candidate of a product, checked and timed, by rows."""
    copies = math.ceil(L2_ROUND / product.bytes) + 1
    launches = max(copies, min(40, int(4e9 // product.bytes)))
    weights = [random_weight(product.total, product.k) for _ in range(copies)]
    x = torch.randn(max(rows), product.k, dtype=torch.bfloat16, device="cuda")
    expected = linear(x.float(), weights[0].float())
    if product.gated:
        gate, up = expected.chunk(2, dim=-1)
        expected = silu(gate) * up

    def alone(call: Callable[[Tensor], object]) -> float:
        def body() -> None:
            for i in range(launches):
                call(weights[i % copies])

        return graph_us(body) / launches

    found = []
    for m in rows:
        few = x[:m]
        timings = []
        for tiling in candidates(product, m):
            call = functools.partial(launch, few, gated=product.gated, tiling=tiling)
            try:
                error = relative_error(call(weights[0]), expected[:m])
            except Exception as problem:  # too much shared memory, say
                print(f"not run: {product.name} m={m} {tiling}: {type(problem).__name__}")
                continue
            if not error < ERROR:
                print(f"WRONG: {product.name} m={m} {tiling}: error {error:.2e}")
                continue
            timings.append({"tiling": asdict(tiling), "us": round(alone(call), 3), "error": error})
        cublas = alone(functools.partial(linear, few))
        result = {"model": name, "product": product.name, "m": m, "bytes": product.bytes, "cublas_us": round(cublas, 3)}
        found.append(result | {"candidates": timings})
        show(product, m, cublas, timings)
    return found


def launch(x: Tensor, weight: Tensor, gated: bool, tiling: Tiling | None) -> Tensor:
    return skinny.launch(x, weight, None, None, gated, tiling)


def rate(num_bytes: int, us: float) -> str:
    return f"{us:8.2f} us {num_bytes / us / 1e6:5.2f} TB/s"


def short(tiling: dict[str, Any]) -> str:
    kind = "dot" if tiling["dot"] else "vec"
    tail = f" prefetch {tiling['prefetch']}" if tiling["dot"] else f" blocks {tiling['blocks']}"
    return f"{kind} {tiling['block_n']}x{tiling['block_k']} w{tiling['num_warps']} d{tiling['depth']}{tail}"


def show(product: Product, m: int, cublas: float, timings: list[dict[str, Any]]) -> None:
    print(f"{product.name:8} m={m:<3} cublas {rate(product.bytes, cublas)}", end="")
    if timings:
        best = min(timings, key=lambda timing: timing["us"])
        print(f" | rule {rate(product.bytes, timings[0]['us'])} | best {rate(product.bytes, best['us'])}", end="")
        print(f" {short(best['tiling'])}")
        others = (f"{short(timing['tiling'])}: {timing['us']:.2f}" for timing in timings)
        print("          " + "; ".join(others), flush=True)


class Stack:
    """All products of a decode step, with weights of their own."""

    def __init__(self, each: Model) -> None:
        self.model = each
        self.layers = [[random_weight(p.total, p.k) for p in each.products[:-1]] for _ in range(each.layers)]
        self.head = random_weight(each.products[-1].total, each.products[-1].k)

    def ours(self, x: Tensor, tilings: list[Tiling | None], layers: int | None = None) -> Tensor:
        queries = self.model.products[1].k
        for qkv, output, gate_up, down in self.layers[:layers]:
            heads = launch(x, qkv, False, tilings[0])[:, :queries]
            x = launch(heads, output, False, tilings[1])
            x = launch(launch(x, gate_up, True, tilings[2]), down, False, tilings[3])
        return launch(x, self.head, False, tilings[4])

    def cublas(self, x: Tensor) -> Tensor:
        queries, inner = self.model.products[1].k, self.model.products[3].k
        for qkv, output, gate_up, down in self.layers:
            x = linear(linear(x, qkv)[:, :queries], output)
            x = linear(linear(x, gate_up)[:, :inner], down)
        return linear(x, self.head)

    def exact(self, x: Tensor, layers: int) -> Tensor:
        """As `ours`, in float32 but for the roundings between products."""
        queries = self.model.products[1].k
        for weights in self.layers[:layers]:
            qkv, output, gate_up, down = (weight.float() for weight in weights)
            x = linear(x.float(), qkv).bfloat16()[:, :queries]
            gate, up = linear(linear(x.float(), output).bfloat16().float(), gate_up).chunk(2, dim=-1)
            x = linear((silu(gate) * up).bfloat16().float(), down).bfloat16()
        return linear(x.float(), self.head.float())


def time_stack(each: Model, rows: list[int], products: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The whole step: cuBLAS, the fixed rule, and each product's best candidate."""
    stack = Stack(each)
    print(f"\n{each.name}: all {each.layers} layers and head, {each.bytes / 1e9:.2f} GB")
    found = []
    for m in rows:
        x = torch.randn(m, each.products[0].k, dtype=torch.bfloat16, device="cuda") * 4
        best: list[Tiling | None] = []
        for product in each.products:
            timings = next(p for p in products if (p["model"], p["product"], p["m"]) == (each.name, product.name, m))
            fastest = min(timings["candidates"], key=lambda timing: timing["us"], default=None)
            best.append(Tiling(**fastest["tiling"]) if fastest else None)
        rule: list[Tiling | None] = [None] * len(best)
        # Two layers, for the values of more run off: nothing normalises them.
        errors = [relative_error(stack.ours(x, t, layers=2), stack.exact(x, layers=2)) for t in (rule, best)]
        cublas_us = graph_us(functools.partial(stack.cublas, x))
        rule_us, best_us = (graph_us(functools.partial(stack.ours, x, tilings)) for tilings in (rule, best))
        print(
            f"m={m:<3} cublas {rate(each.bytes, cublas_us)} | rule {rate(each.bytes, rule_us)}"
            f" | best {rate(each.bytes, best_us)} ({each.bytes / best_us / 1e6 / PEAK:.0%} of {PEAK})"
            f" | errors after two layers {errors[0]:.1e} {errors[1]:.1e}",
            flush=True,
        )
        result = {"model": each.name, "m": m, "bytes": each.bytes, "cublas_us": cublas_us, "rule_us": rule_us}
        found.append(result | {"best_us": best_us, "errors": errors})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--models", nargs="+", default=[each.name for each in MODELS])
    options = parser.parse_args()
    models = [each for each in MODELS if each.name in options.models]
    device = torch.cuda.get_device_name()
    print(device, "torch", torch.__version__, flush=True)
    compile_all(models, options.rows)
    products: list[dict[str, Any]] = []
    stacks: list[dict[str, Any]] = []
    with torch.inference_mode():
        for each in models:
            print(f"\n{each.name}")
            for product in each.products:
                products += time_product(each.name, product, options.rows)
        for each in models:
            stacks += time_stack(each, options.rows, products)
    save(
        {**header("benchmarks.gpu.products"), "products": products, "stacks": stacks},
        out_folder() / "gpu-products.json",
    )


if __name__ == "__main__":
    main()
