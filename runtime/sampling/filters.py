"""Top-k, top-p and min-p, each as a threshold on the scaled logits of its row.

Applied in Hugging Face's order: temperature, top-k, top-p over what top-k kept, min-p against the most
probable token. Each keeps "every token whose logit is at least t", so all three together are the largest of
three thresholds and one comparison. A threshold is a function of the row's values alone, never of the order
a sort leaves ties in: tokens that tie with the last one kept are kept too (as vLLM and Hugging Face do for
top-k), and a row's outcome cannot depend on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class FilterRows:
    """Rows filtered the same way: those with a top-k, or those with a top-p only.

    `rows` int64 [A] on the device, or None for every row of the batch. `top_k` int64 [A, 1] in [1,
    max_top_k], or None where no row has one. `top_p` float32 [A, 1], 1 for a row without, or None where no
    row has one.
    """

    rows: Tensor | None
    top_k: Tensor | None
    max_top_k: int
    top_p: Tensor | None


def filter_threshold(scaled: Tensor, group: FilterRows) -> Tensor:
    """The smallest logit each of the group's rows keeps.

    Args:
        scaled: logits over temperature, float32 [R, V].

    Returns:
        float32 [A, 1].
    """
    values = scaled if group.rows is None else scaled.index_select(0, group.rows)
    if group.top_k is None:
        # Sorting whole rows is the dear case: only rows with a top-p and no top-k come here.
        ordered = _descending(values)
        threshold = values.new_full((values.shape[0], 1), -torch.inf)
    else:
        ordered = values.topk(group.max_top_k, dim=-1, sorted=True).values
        threshold = ordered.gather(1, group.top_k - 1)
    if group.top_p is None:
        return threshold
    nucleus = _nucleus_threshold(ordered, group.top_k, group.top_p)
    return torch.maximum(threshold, nucleus.masked_fill_(group.top_p >= 1.0, -torch.inf))


def _descending(values: Tensor) -> Tensor:
    """Each row's values, largest first."""
    if values.device.type == "cpu":
        # NumPy sorts floats with vector instructions and keeps no indices: several times as quick as torch here.
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    return values.sort(dim=-1, descending=True).values


def _nucleus_threshold(ordered: Tensor, top_k: Tensor | None, top_p: Tensor) -> Tensor:
    """The value at which the mass of a row's values, from the largest down, reaches top_p of their whole
    mass.

    Args:
        ordered: float32 [A, K], descending.
        top_k: int64 [A, 1], how many of a row's K values count; None for all.
        top_p: float32 [A, 1] in (0, 1].

    Returns:
        float32 [A, 1].
    """
    mass = torch.exp(ordered - ordered[:, :1])
    if top_k is not None:
        # By place and not by value: values that tie with the k-th are in `ordered` or not as other rows' k
        # has it.
        mass.masked_fill_(torch.arange(ordered.shape[1], device=ordered.device) >= top_k, 0.0)
    # float64: the order of summation, which differs between devices and shapes, then moves no boundary.
    running = mass.cumsum(dim=-1, dtype=torch.float64)
    inside = running - mass < top_p * running[:, -1:]
    last = inside.sum(dim=-1, keepdim=True).clamp_(min=1) - 1
    return ordered.gather(1, last)
