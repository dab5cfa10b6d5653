"""Long-context chat with shared prefixes: sessions like those of the Mooncake conversation trace (FAST 2025).

Sessions were rebuilt from the trace: a request continues the session that last held its deepest matched
block. Its 12,031 requests make 7,373 sessions, 2.085 new ones a second. The tables below are the fits. Every
prompt begins with the same 512-token block. A turn keeps a share of the previous prompt's full blocks, adds
tokens, and has new blocks for the rest. Against the trace: token-weighted prefix hit rate 0.36 to 0.37 with an
infinite cache (0.374), within 0.02 for LRU caches of 1,000 to 50,000 blocks; mean input 13 k (12.0 k) tokens.
"""

from __future__ import annotations

import numpy as np

from experiments.workloads.generators import arrivals
from experiments.workloads.generators.lengths import TABLES, QuantileTable
from experiments.workloads.generators.processes import Size
from experiments.workloads.generators.streams import stream
from experiments.workloads.request import Workload

BLOCK = 512
LONGEST_PROMPT = 126_000
NATIVE_RATE = 3.401  # req/s
REQUESTS_PER_SESSION = 12_031 / 7_373

#: P(another turn) after turn 1, 2, ...; the last holds for all later ones.
CONTINUE = (0.353, 0.458, 0.541, 0.620, 0.642, 0.674, 0.793, 0.783, 0.833)
#: Seconds from one turn of a session to the next: lognormal(mu, sigma), median 134 s.
GAP_MU, GAP_SIGMA = 4.895, 0.964
FIRST_LENGTH = QuantileTable(
    (
        *(891, 894, 897, 905, 1092, 1757, 3913, 5264, 7418, 10771, 15871, 25559, 38494, 67126, 89868),
        *(111632, 121160, 126195),
    )
)
#: Tokens added by a turn: the previous answer and the next question.
GROWTH = QuantileTable(
    (2, 15, 48, 105, 239, 343, 421, 497, 596, 801, 2013, 5016, 7848, 12899, 18567, 24642, 41214, 91918)
)
#: Share of the previous prompt's full blocks that the next turn keeps.
KEPT = QuantileTable(
    (0.01, 0.06, 0.15, 0.37, 0.83, 0.91, 0.94, 0.96, 0.97, 0.98, 0.99, 1.0, 1.0),
    grid=(0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
)

_Turn = tuple[float, int, int, int, int]  # arrival s, session, turn, prompt tokens, blocks kept


def prefix_chat(size: Size) -> Workload:
    """The workload. `rate` scales how often sessions begin; think times stay as they are.

    The rate holds over about the hour that the trace has. A run begins with no session under way, so it sends
    less at first; after hours it sends 12 % more.
    """
    rate = NATIVE_RATE if size.rate is None else size.rate
    turns: list[_Turn] = []

    def make(horizon: float) -> arrivals.Seconds:
        turns[:] = _all_turns(horizon, rate / REQUESTS_PER_SESSION, size.seed)
        return np.array([turn[0] for turn in turns])

    times, _ = arrivals.until(make, rate, size.n, size.duration_s)
    del turns[len(times) :]
    rng = stream(size.seed, "output tokens")
    return Workload.build(
        arrivals.to_ns(times - times[0]),
        [turn[3] for turn in turns],
        TABLES["mooncake_conversation"][1].draw(len(turns), rng),
        session=[turn[1] for turn in turns],
        turn=[turn[2] for turn in turns],
        hash_ids=_number_blocks(turns),
        hash_block=BLOCK,
        name="prefix-chat",
    )


def _all_turns(horizon: float, session_rate: float, seed: int) -> list[_Turn]:
    """The turns of all sessions in [0, horizon), by arrival. A longer horizon only adds."""
    first = lambda n: arrivals.poisson(session_rate, n, stream(seed, "sessions"))  # noqa: E731
    starts = arrivals.renewal_until(first, session_rate)(horizon)
    turns = [turn for k, start in enumerate(starts.tolist()) for turn in _session(k, start, horizon, seed)]
    return sorted(turns)


def _session(number: int, start: float, horizon: float, seed: int) -> list[_Turn]:
    rng = stream(seed, "session", number)
    now, prompt, kept = start, round(float(FIRST_LENGTH.at(rng.random()))), 1
    turns: list[_Turn] = []
    while now < horizon:
        turns.append((now, number, len(turns), min(prompt, LONGEST_PROMPT), kept))
        if rng.random() >= CONTINUE[min(len(turns), len(CONTINUE)) - 1]:
            break
        now += rng.lognormal(GAP_MU, GAP_SIGMA)
        full_blocks = turns[-1][3] // BLOCK
        kept = max(1, int(float(KEPT.at(rng.random())) * full_blocks))
        prompt = turns[-1][3] + round(float(GROWTH.at(rng.random())))
    return turns


def _number_blocks(turns: list[_Turn]) -> list[tuple[int, ...]]:
    """Block ids: 0 is everyone's head, kept blocks have their old ids, all others are new."""
    unused = 1
    last: dict[int, tuple[int, ...]] = {}
    numbered: list[tuple[int, ...]] = []
    for _, session, _, prompt, kept in turns:
        old = last.get(session, (0,))[:kept]
        new = -(-prompt // BLOCK) - len(old)
        ids = old + tuple(range(unused, unused + new))
        unused += new
        last[session] = ids
        numbered.append(ids)
    return numbered
