"""A pool of a simulated cluster, as a specification has it, and as a flag says it."""

from __future__ import annotations

from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from policies.contract import PoolRole

NotNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class PoolSpec(BaseModel):
    """Some replicas of a simulated cluster that are alike. What it does not say is as for the whole run.

    Attributes:
        role: `prefill` and `decode` are for routers that move KV cache.
        device: of the roofline; short for `cost: {device: ...}`.
        cost, limits, policies, link: fields that are others here than in the groups of the run.
        cold_start_s, price_per_hour: as of a run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    replicas: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 1
    role: PoolRole = "both"
    device: str | None = None
    cost: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    policies: dict[str, Any] = {}
    link: dict[str, Any] = {}
    cold_start_s: NotNegative | None = None
    price_per_hour: NotNegative | None = None

    @field_validator("policies")
    @classmethod
    def _of_a_replica(cls, policies: dict[str, Any]) -> dict[str, Any]:
        if "router" in policies:
            raise ValueError("there is one router before all pools: policies.router of the run")
        return policies


def read_pool(text: str) -> dict[str, Any]:
    """A pool as a flag says it: `NAME,FIELD=VALUE,...`, where FIELD may be limits.max_num_seqs and the like.

    Slashes in a policy stand for commas, as in policies.scheduler=sarathi/chunk_size=512. Raises ValueError.
    """
    name, *pairs = (part.strip() for part in text.split(","))
    pool: dict[str, Any] = {"name": name}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not equals or not field:
            raise ValueError(f"cannot read {pair!r} in {text!r}; write NAME,FIELD=VALUE, as fast,replicas=2")
        *groups, last = field.split(".")
        inside = pool
        try:
            for group in groups:
                inside = inside.setdefault(group, {})
            inside[last] = value.replace("/", ",") if groups == ["policies"] else yaml.safe_load(value)
        except (yaml.YAMLError, AttributeError, TypeError):  # the group has been given as a value
            raise ValueError(f"cannot read {pair!r} in {text!r}; write it as limits.max_num_seqs=64") from None
    return pool
