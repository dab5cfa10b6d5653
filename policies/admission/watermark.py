from __future__ import annotations

from policies.contract import does_nothing
from policies.draft import Draft
from policies.plan import Report
from policies.registry import register
from policies.request import Request


@register("admission", "watermark")
class Watermark:
    """Let a request in if its first chunk fits and a share of all blocks stays free for those that run.

    `watermark`: that share; 0.01 is vLLM v0's and Sarathi-Serve's, 0 is vLLM v1's default.
    """

    def __init__(self, watermark: float = 0.01) -> None:
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark must be in [0, 1), not {watermark}")
        self._watermark = watermark

    def allows(self, request: Request, first_blocks: int, all_blocks: int, draft: Draft) -> bool:
        return draft.blocks_left - first_blocks >= self._watermark * draft.view.num_blocks

    def on_admit(self, request: Request) -> None:
        """Nothing is promised beyond what is allocated."""

    def on_release(self, request: Request) -> None:
        """Nothing was."""

    @does_nothing
    def on_report(self, report: Report) -> None:
        """What ran changes nothing."""
