"""How many KV blocks a card has room for: what is free once the weights are there and the largest step has run."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.attention import AttentionShape, get_backend
from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache, num_blocks_that_fit
from runtime.model_config import ModelError
from runtime.parallel.leader import Leader
from runtime.sampling.filters import FilterRows, filter_threshold
from runtime.sampling.noise import gumbel, vocab_hash
from runtime.weights import LoadedModel

GIB = 1 << 30
_GRAPH_BYTES = 1 << 30
"""For captured graphs, pinned buffers' mirrors, and what libraries take at first use."""


def free_bytes(device: torch.device) -> int:
    """Bytes of a card that this process can still take, PyTorch's own unused ones included."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def profile_num_blocks(
    loaded: LoadedModel,
    *,
    block_size: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    attention: str = "auto",
    kv_dtype: torch.dtype | None = None,
    memory_share: float = 0.95,
) -> int:
    """KV blocks for a CUDA device: of `memory_share` of its memory, what weights and the largest step leave.

    Runs one step of `max_num_batched_tokens` prompt tokens and samples `max_num_seqs` rows, to see what it takes.
    Of a model over several ranks, as many as the fullest of their cards has room for.
    Raises ModelError, saying what to lower, where not even that fits.
    """
    device, dtype, ranks = loaded.model.device, kv_dtype or loaded.model.dtype, loaded.ranks
    ordered = None
    if isinstance(ranks, Leader):
        ordered = ranks.order(
            "profile",
            block_size=block_size,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            attention=attention,
            kv_dtype=kv_dtype,
            memory_share=memory_share,
        )
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    try:
        cache = PagedKVCache(loaded.config, 1, block_size, dtype=dtype, device=device)
        activations = _largest_step(loaded, cache, max_num_batched_tokens, max_num_seqs, max_model_len, attention)
        del cache
    except torch.cuda.OutOfMemoryError:
        raise ModelError(
            f"{loaded.name} and a step of {max_num_batched_tokens} tokens do not fit into {total / GIB:.0f} GiB; "
            "lower max_num_batched_tokens, or take a smaller model, a smaller dtype or fp8 weights"
        ) from None
    finally:
        torch.cuda.empty_cache()
    left = free_bytes(device) - round((1 - memory_share) * total) - activations - _GRAPH_BYTES
    blocks = ranks.smallest(num_blocks_that_fit(left, loaded.config, block_size, dtype), device)
    if isinstance(ranks, Leader) and ordered is not None:
        ranks.wait(ordered)
    if ranks.shard.rank == 0 and blocks * block_size < min(max_model_len, 16 * block_size):
        raise ModelError(
            f"{loaded.name} leaves {max(0, left) / GIB:.1f} GiB of {total / GIB:.0f} GiB for the KV cache; "
            "lower max_num_batched_tokens, or take a smaller model, a smaller dtype or fp8 weights"
        )
    return blocks


@torch.inference_mode()
def _largest_step(
    loaded: LoadedModel, cache: PagedKVCache, num_tokens: int, num_seqs: int, max_model_len: int, attention: str
) -> int:
    """Bytes at the peak of the largest step, over what was there before. Every block id is 0: content is no matter."""
    model, device, block_size = loaded.model, loaded.model.device, cache.block_size
    lengths = [max_model_len] * (num_tokens // max_model_len)
    if num_tokens % max_model_len:
        lengths.append(num_tokens % max_model_len)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    inputs = ForwardInputs(
        input_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        positions=positions,
        slot_mapping=positions % block_size,
        query_start_loc=torch.tensor([0, *lengths], device=device).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=torch.zeros(len(lengths), -(-max_model_len // block_size), dtype=torch.int32, device=device),
        host_query_lens=lengths,
        host_seq_lens=lengths,
    )
    with torch.cuda.device(device):  # kernels are launched on the current one
        shape = AttentionShape.of(loaded.config, block_size, cache.dtype)
        model.attach(cache, get_backend(attention, device, shape))
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            hidden = model.forward(inputs)
            _sample_by_nucleus(model.logits(hidden[:num_seqs].clone()).float())
            torch.cuda.synchronize(device)
        finally:
            model.detach(cache)
        return torch.cuda.max_memory_allocated(device) - before


def _sample_by_nucleus(logits: Tensor) -> None:
    """What takes most memory of all that a sampler may be asked for: every row with a top-p."""
    rows, vocab = logits.shape
    top_p = torch.full((rows, 1), 0.9, device=logits.device)
    filter_threshold(logits, FilterRows(rows=None, top_k=None, max_top_k=0, top_p=top_p))
    gumbel(torch.zeros(rows, dtype=torch.int64, device=logits.device), vocab_hash(vocab, logits.device))
