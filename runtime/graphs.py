"""Steps of decodes alone, captured once in CUDA graphs and replayed (CUDA programming guide, "CUDA Graphs").

One graph a batch size of the ladder, all in one memory pool. A graph reads the step from the buffer that the host
fills, runs the model, samples the rows that need no more than a temperature, and puts the tokens where the next step
reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.device_state import DeviceState
from runtime.kernels.launch import compiling, is_compiling
from runtime.kernels.sample import sample
from runtime.models.llama import LlamaModel


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """`hidden` [size, hidden_size] and `tokens` int64 [size] hold a replay's results until the next one."""

    graph: torch.cuda.CUDAGraph
    hidden: Tensor
    tokens: Tensor


class DecodeGraphs:
    """Captured decode steps by batch size.

    Args:
        sizes: of the batches, ascending.
        stream: where they are captured and replayed.
    """

    def __init__(
        self,
        model: LlamaModel,
        state: DeviceState,
        hashed_vocab: Tensor,
        sizes: Sequence[int],
        stream: torch.cuda.Stream,
    ) -> None:
        self._model = model
        self._state = state
        self._hashed_vocab = hashed_vocab
        self._tokens = torch.zeros(max(sizes), dtype=torch.int64, device=state.device)
        self._steps: dict[int, CapturedStep] = {}
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode(), torch.cuda.stream(stream):
            with compiling():
                for size in sizes:
                    self._step(size)
            for size in reversed(sizes):  # the largest first: the others fit into its memory
                state.send_padding(size)
                self._step(size)  # buffers and libraries' plans are made outside of the capture
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    hidden = self._step(size)
                self._steps[size] = CapturedStep(graph, hidden, self._tokens[:size])
            stream.synchronize()

    def _step(self, size: int) -> Tensor:
        state, tokens = self._state, self._tokens[:size]
        state.apply_blocks()
        inputs = state.captured_inputs(size)
        if is_compiling():
            for unwritten in (inputs.input_ids, inputs.seq_lens, inputs.block_table):
                unwritten.zero_()  # the kernel that fills them has not run, and other libraries' do
        hidden = self._model.forward(inputs)
        logits = self._model.logits(hidden)
        sample(
            logits,
            state.part("temperature", size),
            state.part("keys", size),
            state.part("draws", size),
            self._hashed_vocab,
            tokens,
        )
        state.store(tokens)
        return hidden

    def __contains__(self, size: int | None) -> bool:
        return size in self._steps

    def replay(self, size: int) -> CapturedStep:
        """Run the step that was sent, on the current stream."""
        step = self._steps[size]
        step.graph.replay()
        return step
