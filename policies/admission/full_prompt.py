from __future__ import annotations

from policies.contract import does_nothing
from policies.draft import Draft
from policies.plan import Report
from policies.registry import register
from policies.request import Request


@register("admission", "full_prompt")
class FullPrompt:
    """Let a request in if all the tokens it has now fit, not only the first chunk of them.

    Source: vLLM v1, `scheduler_reserve_full_isl` (its default). The blocks are checked, not reserved: requests
    admitted in later steps are checked against what is free then.
    """

    def allows(self, request: Request, first_blocks: int, all_blocks: int, draft: Draft) -> bool:
        return all_blocks <= draft.blocks_left

    def on_admit(self, request: Request) -> None:
        """Nothing is promised beyond what is allocated."""

    def on_release(self, request: Request) -> None:
        """Nothing was."""

    @does_nothing
    def on_report(self, report: Report) -> None:
        """What ran changes nothing."""
