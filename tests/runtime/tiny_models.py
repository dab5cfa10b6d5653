"""Small random models of the transformers package, and our runtime held against them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runtime.weights import load_model

TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # sharp enough for logits to differ visibly
}


def assert_we_compute_the_same(theirs: Any, folder: Path, hand_runner: Any) -> None:
    """Save one of transformers' models in `folder`, load it with our loader, and compare all logits of a sequence."""
    theirs = theirs.eval()
    for parameter_name, parameter in theirs.named_parameters():
        if parameter_name.endswith(("bias", "norm.weight")):  # born as zeros and ones, which would hide a mistake
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    theirs.save_pretrained(folder)

    runner = hand_runner(load_model(str(folder)).model, num_blocks=40, shuffle=0)
    tokens = torch.randint(0, 300, (150,)).tolist()
    runner.add(0, tokens)
    ours = torch.cat([runner.step({0: count})[0] for count in (50, 7, 90, 1, 1, 1)])
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    assert expected.std() > 1  # a model that says something
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-4)
