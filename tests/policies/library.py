"""Every registered policy in a stack, so that what must hold of all is asked of each, new ones included."""

from __future__ import annotations

from policies import registry
from policies.contract import RankedQueue
from policies.stack import StackSpec

SMALL = {
    "static": "static,max_batch_size=3",
    "sarathi": "sarathi,chunk_size=24",
    "watermark": "watermark,watermark=0.1",
    "decaying_ratio": "decaying_ratio,start=0.05,clip=1",  # as it comes it lets in so few that memory is never short
    "t_lru": "t_lru,budget=16,next_prompt=8",
    "ltr": "ltr,threshold=3,quantum=2",
    "multi_bin": "multi_bin,edges=10;25,batch=3,max_wait_ms=0.01",
}
"""Knobs that suit a replica of some 40 blocks of 4 tokens; the other policies are tested as they come."""

MORE: dict[str, list[StackSpec]] = {
    "scheduler": [
        StackSpec("mixed,long_prefill_threshold=7"),
        StackSpec("preemptive,mode=swap", "srpt"),
        StackSpec("preemptive,mode=cheapest,long_prefill_threshold=7", "las,quantum_ms=0.002"),
        StackSpec("andes,horizon_ms=0.05,memory=0.5,ttft_ms=0.005,tokens_per_s=300000,pool=3"),
    ],
    "queue": [
        StackSpec(queue="sjf,predictor=oracle"),
        StackSpec(queue="vtc,weights=a:2;b:0.5,predictor=moving_average"),
        StackSpec(queue="drr,quantum=5"),
        StackSpec(queue="dlpm,quantum=9,window=4"),
        StackSpec(queue="rpm,limit=2,window_s=0.00002"),
        StackSpec("preemptive", "las,quantum_ms=0"),
        StackSpec("preemptive,mode=keep", "mlfq,quantum_ms=0.002,alpha_ms=0.01"),
        StackSpec("preemptive", "plas,quantum_ms=0.003,beta=2"),
        StackSpec("preemptive,mode=keep", "atlas,quantum_ms=0.003,beta=2"),
        StackSpec("static,max_batch_size=3", "multi_bin,edges=10;25,batch=3,max_wait_ms=0.01"),
    ],
    "preemption": [StackSpec(preemption="last_admitted,mode=swap"), StackSpec(preemption="longest,mode=swap")],
    "eviction": [StackSpec(eviction="gdsf,crossover=20")],
    "admission": [
        StackSpec(admission="reserve_pow2,predictor=declared"),
        StackSpec(admission="predicted_peak,estimates=declared"),
    ],
}
"""Other knobs worth the same tests."""

DRAWS = {"noisy_oracle", "predicted_peak"}
"""Policies that draw at random by request id: with other ids they decide otherwise."""


def is_ranked(queue: str) -> bool:
    """Whether `preemptive` takes it."""
    return isinstance(registry.make("queue", queue, block_size=4, seed=0, oracle={}), RankedQueue)


def stacks(role: str) -> list[StackSpec]:
    """A stack for each policy of this role, with defaults in the others; each ranked queue under `preemptive` too."""
    made = []
    for name in registry.names(role):
        text = SMALL.get(name, name)
        if role == "queue" and is_ranked(text):
            made += [StackSpec("preemptive", text), StackSpec("preemptive,mode=keep", text)]
        made.append(StackSpec(**{role: text}))
    return made + MORE.get(role, [])


ROLES = ("scheduler", "queue", "admission", "preemption", "eviction", "offload")
EVERY = [stack for role in ROLES for stack in stacks(role) if role != "offload" or stack.offload != "never"]
EVERY += [StackSpec(queue=f"sjf,predictor={name}") for name in registry.names("predictor")]


def says(stack: StackSpec) -> str:
    """What is not a default in it, for a test's name."""
    default = StackSpec().as_dict()
    return " ".join(text for role, text in stack.as_dict().items() if text != default[role]) or "defaults"
