"""One request in each state that a plan can meet, for tests of what a plan does to it."""

from __future__ import annotations

from dataclasses import dataclass

from policies.plan import Mode, Plan
from policies.replica_state import Limits
from policies.request import Request
from tests.policies.byhand import Desk

LIMITS = Limits(20, 4, 4, 32, 80, prefix_caching=False)


@dataclass
class Scene:
    """One request that decodes, one in mid-prefill, one paused, one waiting, one ended."""

    desk: Desk
    decode: Request
    prefill: Request
    paused: Request
    waiting: Request
    ended: Request

    def base(self) -> Plan:
        return Plan(decode_all=True, chunks=[(self.prefill, 4)])


def make_scene() -> Scene:
    desk = Desk(LIMITS)
    ended, decode, prefill, paused = desk.submit(3), desk.submit(5), desk.submit(24), desk.submit(6)
    desk.run(Plan(chunks=[(ended, 3), (decode, 5), (prefill, 8), (paused, 6)]), ended)
    desk.run(Plan(preempt=[(paused, Mode.KEEP)]))
    return Scene(desk, decode, prefill, paused, desk.submit(10), ended)


def books(scene: Scene) -> list[tuple[object, ...]]:
    requests = (scene.decode, scene.prefill, scene.paused, scene.waiting)
    return [(r.id, r.state, r.num_computed_tokens, r.num_tokens, list(r._blocks)) for r in requests]
