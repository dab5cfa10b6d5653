"""What each KV block holds on the device and on the host, token by token: the slow way, for checks."""

from __future__ import annotations

from policies.plan import Step
from policies.request import Request

Content = tuple[object, int]


class KvModel:
    """Carries out steps on two dictionaries. `run` fails where a request computes on anything but its own context.

    Given a step at once when it is planned, since steps and copies run in the order of their plans.
    """

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._device: dict[tuple[int, int], Content] = {}
        self._host: dict[tuple[int, int], Content] = {}
        self.copied = {True: 0, False: 0}  # blocks out, blocks in

    def run(self, step: Step, group: list[Request]) -> None:
        """`group`: members of the decode group after the step, if it ran."""
        for copy in step.copies:
            assert len(copy.device) == len(copy.host) == len(set(copy.device)) == len(set(copy.host))
            self.copied[copy.out] += len(copy.device)
            sides = (self._device, copy.device, self._host, copy.host)
            source, these, target, those = sides if copy.out else (*sides[2:], *sides[:2])
            for here, there in zip(these, those, strict=True):
                for offset in range(self._size):
                    if (here, offset) in source:
                        target[there, offset] = source[here, offset]
        ran = [(c.request, c.start, c.num_tokens) for c in step.chunks]
        ran += [(r, r.num_computed_tokens - 1, 1) for r in [*step.decodes, *group, *step.capped]]
        for request, start, count in ran:
            for position in range(start, start + count):
                self._device[self._place(request, position)] = self._content(request, position)
        for request, start, count in ran:
            for position in range(start + count):
                held = self._device.get(self._place(request, position))
                assert held == self._content(request, position), f"{request}, token {position}: {held}"

    def _place(self, request: Request, position: int) -> tuple[int, int]:
        return request._blocks[position // self._size], position % self._size

    def _content(self, request: Request, position: int) -> Content:
        """Full blocks with the same key hold the same."""
        depth = position // self._size
        return (request._keys[depth] if depth < len(request._keys) else request.id, position)
