"""The policy objects of one replica, together, and how they are named in a specification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from policies import registry
from policies.contract import Admission, Eviction, Offload, Preemption, Scheduler
from policies.offload.never import Never
from policies.queued import QueuedScheduler
from policies.registry import PolicySpec


@dataclass(slots=True)
class PolicyStack:
    """One object a role. Policies hold state, so every replica has a stack of its own."""

    scheduler: Scheduler
    admission: Admission
    preemption: Preemption
    eviction: Eviction
    offload: Offload = field(default_factory=Never)

    @property
    def clairvoyant(self) -> bool:
        """Whether any of them is told what a real system cannot know."""
        return any(registry.is_clairvoyant(role) for role in self._roles)

    def needs_cost(self) -> str | None:
        """The name of a policy that plans by a cost model (it says `needs_cost = True`), or None."""
        return next((type(role).__name__ for role in self._roles if getattr(role, "needs_cost", False)), None)

    @property
    def _roles(self) -> tuple[object, ...]:
        return (self.scheduler, self.admission, self.preemption, self.eviction, self.offload)

    def ignores_reports(self) -> bool:
        """Whether `on_report` of none of them does anything."""
        told: Any = self.scheduler
        if getattr(told.on_report, "__func__", None) is QueuedScheduler.on_report:  # which tells its queue
            told = told.queue
        return all(getattr(policy.on_report, "does_nothing", False) for policy in (told, self.admission))


@dataclass(frozen=True, slots=True)
class StackSpec:
    """The names and knobs of a policy stack, as text: `name,knob=value,...` each."""

    scheduler: str = "mixed"
    queue: str = "fcfs"
    admission: str = "full_prompt"
    preemption: str = "last_admitted"
    eviction: str = "lru"
    offload: str = "never"

    def build(
        self,
        *,
        block_size: int = 16,
        seed: int = 0,
        oracle: Mapping[int, int] | None = None,
        future: Mapping[int, Sequence[bytes]] | None = None,
    ) -> PolicyStack:
        """New policy objects for one replica. Raises `registry.PolicyError`.

        For the policies that ask for them by name: `oracle`, true output tokens by request id; `future`, the chain of
        block keys of every request by id, in the order in which they arrive (`wants_future` says whether one asks).
        """
        context = {"block_size": block_size, "seed": seed, "oracle": oracle, "future": future}
        queue = registry.make("queue", self.queue, **context)
        return PolicyStack(
            scheduler=registry.make("scheduler", self.scheduler, queue=queue, **context),
            admission=registry.make("admission", self.admission, **context),
            preemption=registry.make("preemption", self.preemption, **context),
            eviction=registry.make("eviction", self.eviction, **context),
            offload=registry.make("offload", self.offload, **context),
        )

    @property
    def wants_future(self) -> bool:
        """Whether one of its policies asks for the block keys to come. Raises `registry.PolicyError`."""
        named = ((f.name, PolicySpec.parse(getattr(self, f.name)).name) for f in fields(self))
        return any("future" in registry.knobs(registry.find(role, name)) for role, name in named)

    def rebuilt(
        self, changes: Mapping[str, str], *, block_size: int = 16, seed: int = 0
    ) -> tuple[StackSpec, dict[str, Any]]:
        """The stack with other policies by role, and new objects for those that this replaces.

        For `ControlPlane.change_policies`. A new queue comes with a new scheduler around it. Raises
        `registry.PolicyError`, also for a policy that wants an oracle: what is put in while a replica runs gets none.
        """
        known = [f.name for f in fields(self)]
        for role in changes:
            if role not in known:
                raise registry.PolicyError(f"there is no role {role!r} in a stack; it has {', '.join(known)}")
        spec = replace(self, **changes)
        stack = spec.build(block_size=block_size, seed=seed)
        if stack.clairvoyant:
            raise registry.PolicyError(
                f"{', '.join(changes.values())}: nobody knows true output lengths in advance here"
            )
        roles = {"scheduler" if role == "queue" else role for role in changes}
        return spec, {role: getattr(stack, role) for role in sorted(roles)}

    def as_dict(self) -> dict[str, str]:
        """Role -> the policy's name and knobs, in one canonical spelling."""
        return {f.name: str(PolicySpec.parse(getattr(self, f.name))) for f in fields(self)}
