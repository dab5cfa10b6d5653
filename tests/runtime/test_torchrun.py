"""Ranks that torchrun has started: rank 0 does what the command line says, and the others follow."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from runtime.model_config import ModelError
from runtime.parallel import leader, torchrun
from runtime.parallel.leader import Leader, RankFailed
from runtime.parallel.shard import Shard
from runtime.parallel.torchrun import Job

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


def job_of(rank: int, size: int = 2) -> Job:
    return Job(rank, size, rank, size, "127.0.0.1", 1, "0")


@contextlib.contextmanager
def silent_peer(store: dist.Store) -> Iterator[None]:
    """Connects to rank 0 before anybody else, and says nothing."""
    connected: list[socket.socket] = []

    def connect() -> None:
        connected.append(socket.create_connection(("127.0.0.1", int(store.get("port")))))

    thread = threading.Thread(target=connect)
    thread.start()
    yield
    thread.join()
    connected[0].close()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """And waiting times for a test."""
    monkeypatch.setattr(torchrun, "MEET_S", 1.0)
    monkeypatch.setattr(torchrun, "GREET_S", 0.1)
    found = dist.HashStore()
    found.set_timeout(datetime.timedelta(seconds=1))
    return found


@pytest.mark.timeout(20)
@pytest.mark.parametrize("somebody", [False, True], ids=["nobody comes", "one comes and says nothing"])
def test_rank_0_gives_up_in_time_and_says_who_is_missing(store: dist.Store, somebody: bool) -> None:
    with (
        silent_peer(store) if somebody else contextlib.nullcontext(),
        pytest.raises(ModelError, match=r"^of 3 ranks these have not come within 1 s: 1, 2; see their logs$"),
    ):
        torchrun.meet(job_of(0, 3), store)


@pytest.mark.timeout(20)
def test_a_peer_that_says_nothing_does_not_keep_the_others_from_meeting(store: dist.Store) -> None:
    found: list[tuple[Connection, Connection]] = []

    def come() -> None:
        store.get("port")
        time.sleep(0.05)  # after the silent one
        found.append(torchrun.find(job_of(1), store))

    with silent_peer(store):
        other = threading.Thread(target=come)
        other.start()
        [(orders, life)] = torchrun.meet(job_of(0), store)
        other.join()
    (theirs, their_life) = found[0]
    with orders, life, theirs, their_life:
        time.sleep(0.3)  # the limit was for the greeting alone
        orders.send_bytes(b"cpu")
        assert theirs.recv_bytes() == b"cpu"
        their_life.send("done")
        assert life.recv() == "done"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("listens", [False, True], ids=["is not there", "says nothing"])
def test_a_rank_gives_up_on_a_rank_0_that(store: dist.Store, listens: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        if listens:
            store.set("key", "00" * 32)
            store.set("port", str(server.getsockname()[1]))
        with pytest.raises(ModelError, match=r"^rank 1 has not found rank 0 at 127.0.0.1 within 1 s .*see the log"):
            torchrun.find(job_of(1), store)


@pytest.mark.timeout(20)
def test_a_rank_that_never_gives_a_sign_of_life_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(shard: Shard, device: str, place: Path, threads: int) -> leader._Follower:
        (ours, theirs), (life, their_life) = socket.socketpair(), socket.socketpair()
        with theirs, their_life:
            process = subprocess.Popen(["sleep", "60"], pass_fds=(theirs.fileno(), their_life.fileno()))
        return leader._Follower(shard, Connection(ours.detach()), Connection(life.detach()), process)

    monkeypatch.setattr(leader, "_start", start)
    with pytest.raises(RankFailed, match=r"rank 1 has given no sign of life for 0.5 s and was killed"):
        Leader(2, "cpu", start_s=0.5)
