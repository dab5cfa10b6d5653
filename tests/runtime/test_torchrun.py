"""Ranks that torchrun has started: rank 0 does what the command line says, and the others follow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.model_config import ModelError
from runtime.parallel import torchrun
from runtime.parallel.leader import Leader

SCRIPT = """
import json, sys
from experiments.cli import main
from runtime.parallel import torchrun

if torchrun.job().rank:
    sys.argv[1:] = ["serve", "--model", "whatever rank 0 says"]
    main()

from policies.replica_state import Limits
from policies.stack import StackSpec
from runtime.engine import Engine
from runtime.parallel.leader import Leader
from runtime.parallel.ranks import Ranks
from runtime.sampling.params import SamplingParams
from runtime.weights import load_model

def generate(ranks):
    limits = Limits(64, 16, 8, 256, 512)
    loaded = load_model("tiny", load_format="dummy", ranks=ranks)
    with Engine(loaded, limits, StackSpec().build(block_size=16)) as engine:
        prompts = [[(7 * i + 3 * j) % 290 + 1 for j in range(12 + 9 * i)] for i in range(4)]
        params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
        return [completion.token_ids for (completion,) in engine.generate(prompts, params)]

with Leader(2, "cpu") as ranks:
    json.dump([generate(Ranks()), generate(ranks)], open(sys.argv[1], "w"))
"""


def test_tokens_of_two_ranks_that_torchrun_has_started_equal_those_of_one(tmp_path: Path) -> None:
    script, found = tmp_path / "script.py", tmp_path / "tokens.json"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    done = subprocess.run(
        [*command, str(script), str(found)], env=environment, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    alone, shared = json.loads(found.read_text())
    assert alone == shared
    assert len({token for tokens in alone for token in tokens}) > 3


def test_another_number_of_ranks_than_torchrun_has_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchrun.job() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(ModelError, match="torchrun's environment is incomplete"):
        torchrun.job()
    values = {"RANK": 0, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ModelError, match=r"^torchrun has started 3 ranks; write --tensor-parallel 3$"):
        Leader(2, "cpu")
    job = torchrun.job()
    assert job is not None
    assert not job.one_host
