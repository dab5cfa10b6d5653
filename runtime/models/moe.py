"""A mixture of experts in place of a decoder layer's MLP: Qwen3-MoE and Mixtral (Jiang et al., arXiv:2401.04088)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.model_config import ModelConfig
from runtime.models.linear import frozen
from runtime.ops import Ops


class MoeMlp(nn.Module):
    """Top-k routed experts, each a gated MLP (Shazeer et al., arXiv:1701.06538).

    E experts of width I over hidden states of width H. Parameters, uninitialised until a loader fills
    `weight_slots`: `router` [E, H], `gate_up` [E, 2 I, H] with each expert's gate in front of its up, `down` [E, H, I].
    Router logits have the type of the weights, as in transformers; softmax and the weighted sum are in float32.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob
        self.mixtral_names = config.mixtral_names

        experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.router = frozen(experts, hidden, dtype=dtype, device=device)
        self.gate_up = frozen(experts, 2 * inner, hidden, dtype=dtype, device=device)
        self.down = frozen(experts, hidden, inner, dtype=dtype, device=device)

    @property
    def block_name(self) -> str:
        """What a checkpoint calls this part of a layer: the names of `weight_slots` come after it and a dot."""
        return "block_sparse_moe" if self.mixtral_names else "mlp"

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """x [T, H] -> [T, H]. Fused operations never wait for the device."""
        logits = ops.linear(x, self.router)
        if ops.fused:
            from runtime.kernels.moe import experts_mlp  # Triton is optional

            return experts_mlp(x, logits, self.gate_up, self.down, self.top_k, self.renormalise)
        return self.mix(x, *self.route(logits))

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [T, top_k], best first, and their float32 weights [T, top_k], from router logits [T, E].

        Of equal logits the lower expert wins, so that a token's experts do not depend on the batch it is in.
        """
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
        experts = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        weights = scores.gather(1, experts)
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return experts, weights

    def mix(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts [T, top_k], one expert after another. Waits for the device."""
        pair_experts = experts.flatten()
        outputs = x.new_empty(len(pair_experts), x.shape[1])
        for expert in pair_experts.unique().tolist():
            pairs = (pair_experts == expert).nonzero().squeeze(1)
            gate, up = F.linear(x[pairs // self.top_k], self.gate_up[expert]).chunk(2, dim=-1)
            outputs[pairs] = F.linear(F.silu(gate) * up, self.down[expert])
        outputs = outputs.view(len(x), self.top_k, x.shape[1]).float()
        return (outputs * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)

    def weight_slots(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Every weight under its Hugging Face name after `prefix`, as a view into the parameter it belongs to."""
        gate_name, up_name, down_name = (
            ("w1", "w3", "w2") if self.mixtral_names else ("gate_proj", "up_proj", "down_proj")
        )
        yield f"{prefix}gate.weight", self.router
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            gate, up = gate_up.chunk(2)
            yield f"{prefix}experts.{expert}.{gate_name}.weight", gate
            yield f"{prefix}experts.{expert}.{up_name}.weight", up
            yield f"{prefix}experts.{expert}.{down_name}.weight", down
