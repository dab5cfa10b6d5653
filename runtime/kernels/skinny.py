"""Matrix products with few rows: a decode step reads every weight once, and reading is all its time.

Two kernels. With one row of activations, or a few, a program holds the whole of some weight rows in registers,
multiplies and adds in float32. More rows go through the tensor cores with the weights as the tall operand, so that
padding (to 8 rows and up) is paid by the activations and not by the weights.

Under programmatic dependent launch both ask for weights before they wait for the kernel in front (into registers, and
into the L2 cache): the memory stays busy through the end of one product and the start of the next.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import kernel, use_pdl

MAX_ROWS = 64
"""Most rows of activations that these kernels are chosen for; above, cuBLAS reads the weights as fast."""
VECTOR_ROWS = 4
"""Up to as many rows, the vector kernel; its arithmetic grows with the rows, the matrix kernel's hardly."""
WEIGHTS_AHEAD = 128 * 256
"""Weights that a program of the vector kernel has on their way: 64 KB of bfloat16, in 128 registers of 4 warps."""
MIN_PROGRAMS = 176
"""Programs a product is cut into at least, where its rows allow: four for every three multiprocessors of an H100."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut up.

    `block_n` weight rows a program, read in tiles of `block_k` columns. `depth` tiles are on their way at a time: in
    registers (the vector kernel, `dot` false) or in shared memory (the matrix kernel, `dot` true; Triton's num_stages).
    `prefetch`: with `dot`, how many columns of every weight row are asked into the L2 cache before the program waits
    for the kernel in front. `blocks`: without `dot`, how often a program takes `block_n` rows; the next ones' tiles are
    on their way before the last ones are done.
    """

    block_n: int
    block_k: int
    num_warps: int
    depth: int
    dot: bool = False
    prefetch: int = 0
    blocks: int = 1


@triton.jit
def _rows(block, N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """A block's outputs [BLOCK_N, or half gated], its first weight, and where its rows start from there [BLOCK_N].

    Gated, rows go gate, up, gate, up, ...; rows past the end are the last one again, so that loads need no mask.
    """
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    first = block * OUTPUTS
    row = tl.arange(0, BLOCK_N)
    if GATED:
        offset = tl.minimum(row // 2, N - 1 - first) * K + (row % 2) * (N * K)
    else:
        offset = tl.minimum(row, N - 1 - first) * K
    return first + tl.arange(0, OUTPUTS), first.to(tl.int64) * K, offset


@triton.jit
def _finish(
    y,
    bias_ptr,
    scale_ptr,
    out_ptr,
    outputs,
    row,
    num_rows,
    N: tl.constexpr,
    GATED: tl.constexpr,
):
    """Sums y [weight rows, activation rows] -> scaled, gated or biased -> out [num_rows, N]."""
    inside = outputs < N
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, [y.shape[0] // 2, 2, y.shape[1]]), [0, 2, 1]))
        if scale_ptr is not None:
            gate *= tl.load(scale_ptr + outputs, mask=inside, other=0.0)[:, None]
            up *= tl.load(scale_ptr + N + outputs, mask=inside, other=0.0)[:, None]
        y = gate / (1.0 + tl.exp(-gate)) * up
    else:
        if scale_ptr is not None:
            y *= tl.load(scale_ptr + outputs, mask=inside, other=0.0)[:, None]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + outputs, mask=inside, other=0.0).to(tl.float32)[:, None]
    mask = inside[:, None] & (row < num_rows)[None, :]
    tl.store(out_ptr + row[None, :] * N + outputs[:, None], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_weights(tile, column, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """`tile`: pointers [BLOCK_N, BLOCK_K]; `column`: the first column. Weights pass through: evict them first."""
    if K % BLOCK_K == 0:
        return tl.load(tile + column, eviction_policy="evict_first")
    mask = (tl.arange(0, BLOCK_K) < K - column)[None, :]
    return tl.load(tile + column, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_step(
    weight_ptr,
    STEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The STEP-th tile of this program: all columns of its first block of rows, then the next block's."""
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    _, start, offset = _rows(tl.program_id(0) * BLOCKS + STEP // TILES, N, K, GATED, BLOCK_N)
    tile = weight_ptr + start + offset[:, None] + tl.arange(0, BLOCK_K)[None, :]
    return _load_weights(tile, (STEP % TILES) * BLOCK_K, K, BLOCK_K)


@kernel
@triton.jit
def _vector_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    x_stride,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr,
    VECTOR: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [M, K] times weight [N, K] (gated: [2N, K]) transposed -> out [M, N]; the loops over M are unrolled."""
    if PDL:
        gdc_launch_dependents()
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    column = tl.arange(0, BLOCK_K)
    ahead = ()  # type: tuple
    for i in tl.static_range(min(DEPTH, BLOCKS * TILES)):
        ahead = ahead + (_load_step(weight_ptr, i, BLOCKS, N, K, GATED, BLOCK_N, BLOCK_K),)  # noqa: RUF005
    if PDL:
        gdc_wait()

    for block in tl.static_range(BLOCKS):
        # Sums of VECTOR neighbours stay within a thread; only the last sum, over BLOCK_K / VECTOR, crosses threads.
        sums = ()  # type: tuple
        for _ in tl.static_range(M):
            sums = sums + (tl.zeros([BLOCK_N, BLOCK_K // VECTOR], dtype=tl.float32),)  # noqa: RUF005
        for t in tl.static_range(TILES):
            weights = ahead[block * TILES + t].to(tl.float32)
            now = ()  # type: tuple
            for m in tl.static_range(M):
                x_row = x_ptr + m * x_stride + t * BLOCK_K + column
                x = tl.load(x_row) if K % BLOCK_K == 0 else tl.load(x_row, mask=column < K - t * BLOCK_K, other=0.0)
                products = tl.reshape(weights * x.to(tl.float32)[None, :], [BLOCK_N, BLOCK_K // VECTOR, VECTOR])
                now = now + (sums[m] + tl.sum(products, axis=2),)  # noqa: RUF005
            sums = now
            if block * TILES + t + DEPTH < BLOCKS * TILES:
                following = _load_step(weight_ptr, block * TILES + t + DEPTH, BLOCKS, N, K, GATED, BLOCK_N, BLOCK_K)
                ahead = ahead + (following,)  # noqa: RUF005
        outputs, _, _ = _rows(tl.program_id(0) * BLOCKS + block, N, K, GATED, BLOCK_N)
        for m in tl.static_range(M):
            y = tl.sum(sums[m], axis=1)[:, None]
            _finish(y, bias_ptr, scale_ptr, out_ptr, outputs, m + tl.arange(0, 1), M, N, GATED)


@triton.jit
def _prefetch(start, offset, ROW_BYTES: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr):
    """Asks ROW_BYTES of each of BLOCK_N rows into the L2 cache, in a piece a thread where there are threads enough."""
    PIECES: tl.constexpr = max(THREADS // BLOCK_N, 1)
    BYTES: tl.constexpr = ROW_BYTES // PIECES
    address = (start + offset).to(tl.int64)[:, None] + (tl.arange(0, PIECES) * BYTES)[None, :]
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [address, tl.full([BLOCK_N, PIECES], BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@kernel
@triton.jit(do_not_specialize=["num_rows"])
def _matrix_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    num_rows,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH_BYTES: tl.constexpr,
    THREADS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,  # Triton's interpreter cannot multiply bfloat16
    PDL: tl.constexpr,
):
    """x [num_rows, K] times weight [N, K] (gated: [2N, K]) transposed -> out [num_rows, N]; num_rows <= BLOCK_M."""
    if PDL:
        gdc_launch_dependents()
    outputs, start, offset = _rows(tl.program_id(0), N, K, GATED, BLOCK_N)
    if PDL:
        if PREFETCH_BYTES > 0:
            _prefetch(weight_ptr + start, offset, PREFETCH_BYTES, BLOCK_N, THREADS)
        gdc_wait()

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    tile = weight_ptr + start + offset[:, None] + column[None, :]
    x_tile = x_ptr + row[None, :] * x_stride + column[:, None]
    y = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        weights = _load_weights(tile, k, K, BLOCK_K)
        mask = (row < num_rows)[None, :]
        if K % BLOCK_K != 0:
            mask = mask & (column < K - k)[:, None]
        x = tl.load(x_tile + k, mask=mask, other=0.0)
        if IN_FLOAT32:
            weights, x = weights.to(tl.float32), x.to(tl.float32)
        elif weights.dtype.primitive_bitwidth == 8:
            weights = weights.to(tl.float32).to(x.dtype)  # exact, and in faster instructions than without the detour
        y = tl.dot(weights, x, y, input_precision="ieee")
    _finish(y, bias_ptr, scale_ptr, out_ptr, outputs, row, num_rows, N, GATED)


@functools.cache
def _config(m: int, n: int, k: int) -> Tiling:
    """The tiling for `m` rows of activations and `n` x `k` weights, gate and up counted together: a fixed rule."""
    if m <= VECTOR_ROWS:
        num_warps = 4 if k <= 8192 else 8
        block_k = 256 * num_warps  # 16 bytes a thread: a warp reads 512 at once
        weights = WEIGHTS_AHEAD if m == 1 or num_warps == 8 else WEIGHTS_AHEAD // 2
        block_n = min(32, _power_of_two_below(weights // _round_up(k, block_k)))
        while block_n > 2 and n // block_n < MIN_PROGRAMS:
            block_n //= 2
        depth = max(1, min(weights // (block_n * block_k), -(-k // block_k)))
        if m > 1 and 2048 < k <= 8192 and n <= 8192:
            return Tiling(4, block_k, num_warps, depth, blocks=2)
        return Tiling(block_n, block_k, num_warps, depth)
    many, few = n >= 64 * MIN_PROGRAMS, n < 4096
    if m <= 8:
        if many:
            return Tiling(64, 256, num_warps=4, depth=4, dot=True, prefetch=512)
        if n > 4096:
            return Tiling(16, 256, num_warps=4, depth=6, dot=True, prefetch=1024)
        return Tiling(16, 512, num_warps=4, depth=5, dot=True, prefetch=2048)
    if m <= 16:
        if few:
            return Tiling(16, 512, num_warps=4, depth=5, dot=True, prefetch=2048)
        return Tiling(64, 256, num_warps=4, depth=4, dot=True, prefetch=512)
    if many:
        return Tiling(128, 128, num_warps=8, depth=4, dot=True, prefetch=256)
    if few:
        return Tiling(16, 256, num_warps=4, depth=6, dot=True, prefetch=1024)
    if k > 8192:
        return Tiling(32, 256, num_warps=4, depth=5, dot=True, prefetch=1024)
    return Tiling(64, 128, num_warps=4, depth=5, dot=True, prefetch=512)


def serves(m: int, weight: Tensor) -> bool:
    """Whether these kernels are faster than cuBLAS for `m` rows of activations, as measured on an H100."""
    if weight.dtype == torch.float32 or not 0 < m <= MAX_ROWS:
        return False
    n, k = weight.shape
    return m <= 32 or n >= 64 * MIN_PROGRAMS or (n >= 4096 and k <= 2048)


def _power_of_two_below(value: int) -> int:
    return 1 << max(value.bit_length() - 1, 0)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, gated: bool, tiling: Tiling | None = None
) -> Tensor:
    """`skinny_linear` or `skinny_gated` with a tiling of the caller's choice, and for any number of rows."""
    m, k = x.shape
    total = weight.shape[0]
    n = total // 2 if gated else total
    tiling = tiling or _config(m, total, k)
    block_n = max(tiling.block_n, 2) if gated else tiling.block_n
    grid = (triton.cdiv(total, block_n * tiling.blocks),)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    pdl = use_pdl(x.device)
    if not tiling.dot:
        _vector_kernel[grid](
            x, weight, bias, scale, out, x.stride(0) if m > 1 else k, m, n, k, gated, block_n, tiling.block_k,
            tiling.blocks, tiling.depth, 16 // weight.element_size(), pdl,
            num_warps=tiling.num_warps, launch_pdl=pdl,
        )  # fmt: skip
        return out
    # Bulk copies want addresses and sizes in whole 16 bytes, also when up to 8 threads share a row.
    row_bytes = k * weight.element_size()
    aligned = row_bytes % 16 == 0 and weight.data_ptr() % 16 == 0
    prefetch = min(tiling.prefetch * weight.element_size(), row_bytes) // 128 * 128 if aligned else 0
    _matrix_kernel[grid](
        x, weight, bias, scale, out, m, x.stride(0), n, k, gated, max(8, triton.next_power_of_2(m)), block_n,
        tiling.block_k, prefetch, 32 * tiling.num_warps, x.device.type == "cpu", pdl,
        num_warps=tiling.num_warps, num_stages=tiling.depth, launch_pdl=pdl,
    )  # fmt: skip
    return out


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [N, K] transposed, plus bias [N] -> [M, N] of x's type; sums in float32.

    `x` may be a slice of wider rows; `weight` is contiguous, of x's type or float8, then with its rows' `scale` [N]
    float32. Made for M <= `MAX_ROWS`.
    """
    return launch(x, weight, bias, scale, gated=False)


def skinny_gated(x: Tensor, gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
    """silu(x gate^T) * (x up^T): x [M, K], gate_up [2I, K] (the gate's I rows, then up's) -> [M, I] of x's type.

    Everything up to the product of both is float32 and rounded once. `scale` [2I]: as in `skinny_linear`.
    """
    return launch(x, gate_up, None, scale, gated=True)
