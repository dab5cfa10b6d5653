"""A replica's link to its host memory: copies queue for it, each direction for itself, beside the steps.

The rule is that of the runtime on a card (`runtime.copy_streams`). Copies out begin when their step does, as blocks are
packed then, and nobody waits for them. Copies in begin when the step is launched, while the one before may still
compute, and the step waits for them; before that for what was asked to be written to the same host blocks. What a card
takes to pack and unpack, and that no more than some buffers are on their way at once, is left out.

Where copies are not made beside the steps, as on a CPU, a step waits for all of its own.
"""

from __future__ import annotations

from policies.plan import CopyTimes, Step
from policies.shapes import StepShape
from simulator.costs.base import CostModel


def without_copies(shape: StepShape) -> StepShape:
    """The same step, but for its copies."""
    return shape._replace(swapped_out=0, swapped_in=0)


class CopyLinks:
    """Called once for each step that copies, in their order."""

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._overlaps = bool(getattr(costs, "overlaps_copies", False))
        self._out_free = self._in_free = 0
        self._arrival: dict[int, int] = {}  # host block -> when what is on its way there has arrived

    def times(self, step: Step, plain_ns: int, launch: int, start: int) -> CopyTimes:
        """Of a step that takes `plain_ns` on the device without its copies, and could start then."""
        shape = step.shape
        out = self._costs.cost(shape._replace(swapped_in=0)).device_ns - plain_ns
        back = self._costs.cost(shape).device_ns - plain_ns - out
        if not self._overlaps:
            return CopyTimes(out, back, out + back)
        if self._out_free <= launch:
            self._arrival.clear()
        if out:
            self._out_free = max(start, self._out_free) + out
            for copy in step.copies:
                if copy.out:
                    self._arrival.update(dict.fromkeys(copy.host, self._out_free))
        if not back:
            return CopyTimes(out)
        begin = max(launch, self._in_free)
        if self._arrival:
            there = (block for copy in step.copies if not copy.out for block in copy.host)
            begin = max([begin, *(self._arrival.get(block, 0) for block in there)])
        self._in_free = begin + back
        return CopyTimes(out, back, max(0, self._in_free - start))
