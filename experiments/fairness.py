"""What each tenant of a run was given, and how far tenants are apart: from the records alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from experiments.records import Run
from experiments.token_times import token_times


def service_received(run: Run, *, input_weight: float = 1.0, output_weight: float = 2.0) -> pd.DataFrame:
    """The service of each tenant up to each time at which somebody was given something.

    One column a tenant, in alphabetical order; the index is `t_ns`, ascending. Service is input_weight * input tokens,
    given when a request is first scheduled (in a client's run, which does not know that, when its first token comes),
    and output_weight for each output token when it comes. What is computed again after a preemption is not counted.
    The measure of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, section 3.
    """
    given = services(run, input_weight, output_weight)
    table = given.pivot_table(index="t_ns", columns="tenant", values="service", aggfunc="sum", fill_value=0.0)
    return table.reindex(columns=sorted(set(run.requests["tenant"])), fill_value=0.0).cumsum()


def services(run: Run, input_weight: float, output_weight: float) -> pd.DataFrame:
    """Each single service, in no order: `t_ns`, `tenant`, `service` (weighted tokens), `is_input` (else one token)."""
    requests, times = run.requests, token_times(run)
    admitted = requests["first_scheduled_ns"].fillna(requests["first_token_ns"])
    ran = admitted.notna().to_numpy()
    tenant = requests["tenant"].to_numpy()
    inputs = input_weight * requests["prompt_tokens"].to_numpy(np.float64)[ran]
    outputs = np.full(len(times.times_ns), output_weight, np.float64)
    return pd.DataFrame(
        {
            "t_ns": np.concatenate([admitted[ran].to_numpy(np.int64), times.times_ns]),
            "tenant": np.concatenate([tenant[ran], np.repeat(tenant, times.counts)]),
            "service": np.concatenate([inputs, outputs]),
            "is_input": np.concatenate([np.ones(len(inputs), bool), np.zeros(len(outputs), bool)]),
        }
    )


def service_difference(
    run: Run, tenants: Sequence[str] | None = None, *, input_weight: float = 1.0, output_weight: float = 2.0
) -> pd.Series[float]:
    """How far the tenant that was given most is ahead of the one given least, up to each time (index `t_ns`).

    Of all tenants or of those named. It says something of fairness while they all have requests waiting: whoever asks
    for less gets less under any policy. Raises ValueError for a tenant that the run does not have.
    """
    service = service_received(run, input_weight=input_weight, output_weight=output_weight)
    for tenant in tenants or ():
        if tenant not in service:
            raise ValueError(f"there is no tenant {tenant!r} in {run.name}; it has {', '.join(map(repr, service))}")
    chosen = service if tenants is None else service[list(tenants)]
    return (chosen.max(axis=1) - chosen.min(axis=1)).rename("service_difference")


def jain_index(shares: ArrayLike) -> float:
    """Jain's fairness index (sum x)^2 / (n sum x^2): 1 where all shares are equal, 1/n where one has everything.

    nan where there is nothing to share. Source: Jain, Chiu and Hawe, DEC-TR-301, 1984.
    """
    x = np.asarray(shares, np.float64)
    squares = len(x) * float(np.dot(x, x))
    return float(x.sum()) ** 2 / squares if squares else float("nan")
