"""The compiled simulator: the same records, to the byte, and policies of a user's own that derive from ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from experiments.compiling import compile_into

ROOT = Path(__file__).parents[2]
NO_COMPILER = not shutil.which("cc") or not Path(sysconfig.get_path("include"), "Python.h").exists()

POLICY = """
from policies.draft import Draft
from policies.plan import Plan
from policies.schedulers.mixed import Mixed


class Hasty(Mixed):
    '''Asks now and then for what the control plane must refuse.'''

    asked = 0

    def plan(self, view, now):
        self.asked += 1
        assert (next(view.decoding(), None) is None) == (view.num_decoding == 0)
        request = self.queue.peek(now)
        if request is not None and self.asked % 7 == 0:
            self.queue.pop(now)
            return Plan(decode_all=view.num_decoding > 0, chunks=[(request, 1.5 if self.asked % 2 else 10**6)])
        return super().plan(view, now)
"""

SIMULATE = """
import sys
import numpy as np
from experiments.records import RunWriter, run_info
from experiments.records.environment import is_compiled
from policies.prefix import chain_key, root_key
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import LinearCost
from simulator.simulation import Simulation

stack = StackSpec(scheduler=sys.argv[2], queue=sys.argv[3], preemption=sys.argv[4])
caching, together = sys.argv[5] == "caching", sys.argv[5] != "one by one"
limits = Limits(150, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=160,
                prefix_caching=caching, num_host_blocks=60, lag=int(caching))
draw, arrivals, at = np.random.default_rng(5), [], 0
for i in range(200):
    at += int(draw.choice([0, 900, 60_000], p=[0.4, 0.3, 0.3]))
    prompt, output = int(draw.integers(1, 60)), int(draw.integers(1, 90))
    keys = [chain_key(root_key(), [i % 3 if n < 6 else i, n]) for n in range((prompt + output) // 4)]
    arrivals.append(Arrival(Request(i, at, prompt, output + i % 2), output, keys))
info = run_info("sim", spec={}, limits={}, stack=stack.as_dict(), clairvoyant=False, workload={})
with RunWriter(sys.argv[1], info, flush_seconds=None) as writer:
    simulation = Simulation(limits, [stack.build(block_size=4)], LinearCost(1_000.4, 10.3, 0.7), recorder=writer,
                            check=True, together=together)
    simulation.run(arrivals)
"""


def simulated(code: Path, out: Path, *settings: str) -> dict[str, bytes]:
    """The files of a run by the code in this folder."""
    env = {**os.environ, "PYTHONPATH": f"{code}{os.pathsep}{out.parent}"}
    command = [sys.executable, "-c", SIMULATE, str(out), *settings]
    done = subprocess.run(command, env=env, cwd=out.parent, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute of one core, of which a busy machine may give little
@pytest.mark.skipif(NO_COMPILER, reason="there is no C compiler, or no headers of Python")
def test_compiled_code_writes_the_same_records_byte_by_byte_under_a_users_own_policies_too(tmp_path: Path) -> None:
    compile_into(tmp_path / "compiled")
    (tmp_path / "hasty.py").write_text(POLICY)
    shutil.copy(ROOT / "examples" / "aged-shortest" / "aged_shortest.py", tmp_path)
    for number, settings in enumerate(
        (
            ("sarathi,chunk_size=32", "fcfs", "last_admitted", "together"),
            ("hasty:Hasty", "aged_shortest:AgedShortest", "last_admitted,mode=swap", "caching"),
            ("hasty:Hasty", "aged_shortest:AgedShortest", "last_admitted", "one by one"),
        )
    ):
        ours = simulated(ROOT, tmp_path / f"interpreted {number}", *settings)
        theirs = simulated(tmp_path / "compiled", tmp_path / f"compiled {number}", *settings)
        was, is_now = (json.loads(files.pop("run.json")) for files in (ours, theirs))
        assert (was.pop("compiled"), is_now.pop("compiled")) == (False, True)
        assert was == is_now
        assert len(ours) == 3
        assert ours == theirs


def test_a_folder_with_anything_but_an_earlier_copy_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "mine.py").touch()
    for folder in (tmp_path, ROOT):
        with pytest.raises(RuntimeError, match="holds other things"):
            compile_into(folder)
    assert (tmp_path / "policies" / "mine.py").exists()
    assert (ROOT / "policies").exists()
