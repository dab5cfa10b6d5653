"""Steps captured once in CUDA graphs and replayed (CUDA programming guide, "CUDA Graphs").

One graph a batch size of decodes alone, and one a number of tokens of steps with chunks, all in one memory pool. A
graph reads the step from the buffer that the host fills, runs the model, samples the rows that need no more than a
temperature, and puts the tokens where the next step reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.device_state import DeviceState
from runtime.kernels.launch import compiling, is_compiling
from runtime.models.llama import LlamaModel
from runtime.sampling.plain import PlainSampler


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A step of `num_seqs` sequences and `num_tokens` tokens, padding included.

    `hidden` [rows, hidden_size] and `tokens` int64 [rows], of the rows that sample, hold a replay's results until the
    next one.
    """

    num_seqs: int
    num_tokens: int
    graph: torch.cuda.CUDAGraph
    hidden: Tensor
    tokens: Tensor


class StepGraphs:
    """Captured steps.

    Args:
        decode_sizes: of steps of decodes alone.
        mixed_sizes: tokens of steps with chunks.
        stream: where they are captured and replayed.
    """

    def __init__(
        self,
        model: LlamaModel,
        state: DeviceState,
        sampler: PlainSampler,
        decode_sizes: Iterable[int],
        mixed_sizes: Iterable[int],
        stream: torch.cuda.Stream,
    ) -> None:
        self._model = model
        self._state = state
        self._sampler = sampler
        self._tokens = torch.zeros(state.num_slots, dtype=torch.int64, device=state.device)
        shape = (state.num_slots, model.config.hidden_size)
        self._hidden = torch.zeros(shape, dtype=model.dtype, device=state.device)
        self._steps: dict[tuple[bool, int], CapturedStep] = {}
        pool = torch.cuda.graph_pool_handle()
        sizes = [*((True, size) for size in mixed_sizes), *((False, size) for size in decode_sizes)]
        sizes.sort(key=lambda key: -key[1])  # the largest first: the others fit into its memory
        with torch.inference_mode(), torch.cuda.stream(stream):
            with compiling():
                for chunks, size in sizes:
                    self._step(chunks, size)
            for chunks, size in sizes:
                num_seqs = state.max_seqs if chunks else size
                state.send_padding(num_seqs, size)
                self._step(chunks, size)  # buffers and libraries' plans are made outside of the capture
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    hidden, tokens = self._step(chunks, size)
                self._steps[chunks, size] = CapturedStep(num_seqs, size, graph, hidden, tokens)
            stream.synchronize()

    def _step(self, chunks: bool, size: int) -> tuple[Tensor, Tensor]:
        state = self._state
        state.apply_blocks()
        inputs = state.captured_mixed(size) if chunks else state.captured_decodes(size)
        if is_compiling():
            for unwritten in (inputs.input_ids, inputs.seq_lens, inputs.block_table):
                unwritten.zero_()  # the kernel that fills them has not run, and other libraries' do
        hidden = self._model.forward(inputs)
        rows = size
        if chunks:
            rows = min(size, state.num_slots)
            hidden = torch.index_select(hidden, 0, state.part("sampled", rows), out=self._hidden[:rows])
        logits, tokens = self._model.logits(hidden), self._tokens[:rows]
        self._sampler(logits, state, tokens)
        state.store(tokens)
        return hidden, tokens

    def find(self, chunks: bool, num_tokens: int) -> CapturedStep | None:
        """The step of so many tokens, padding included, with chunks among them or of decodes alone."""
        return self._steps.get((chunks, num_tokens))
