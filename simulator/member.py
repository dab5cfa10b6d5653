"""A simulated replica as a member of a cluster: its pool, its role, and whether it takes requests."""

from __future__ import annotations

from policies.contract import CostModel, PoolRole
from simulator.replica import SimulatedReplica


class Member(SimulatedReplica):
    """Implements `policies.contract.ClusterReplica`."""

    pool = ""
    role: PoolRole = "both"
    starting = False
    """It will take requests once it has started."""
    draining = False
    """It finishes what it has and takes nothing new."""
    stopped = False
    """It has drained, or was told to go before it had started."""

    @property
    def cost(self) -> CostModel | None:
        """As its policies see it too."""
        return self.plane.view.cost

    @property
    def max_num_seqs(self) -> int:
        return self.plane.limits.max_num_seqs

    @property
    def takes_requests(self) -> bool:
        return not (self.failed or self.starting or self.draining or self.stopped)

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do, and nothing is on its way to it."""
        transfers = self.plane.transfers
        return not (self.num_waiting or self.num_running or transfers.underway or transfers.num_incoming_blocks)
