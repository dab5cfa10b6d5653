from __future__ import annotations

from collections.abc import Sequence

from policies.block_pool import num_blocks
from policies.contract import Replica, Route
from policies.pools import PromisedBlocks, check_prefill, split
from policies.registry import register
from policies.request import Request


@register("router", "splitwise")
class Splitwise:
    """Splitwise: prompt machines, token machines, and a mixed pool for those that one pool lends the other.

    Patel et al., "Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA 2024, section IV, cluster
    level; and the authors' simulator (`MixedPoolScheduler`). Both machines of a request are chosen when it arrives:

        prompt machine   the prompt machine with the fewest pending tokens, unless its queue is too long; else the
                         mixed one with the fewest, unless too long; else the token machine with the fewest, which
                         joins the mixed pool
        token machine    the token machine with the least memory promised, unless that is full; else the mixed one
                         with the least, unless full; else the prompt machine with the least, which joins the mixed pool
        neither nor      if one of the two cannot be found, both phases run where the fewest tokens are pending

    A queue is too long when somebody waits and the pending tokens and the prompt's are above `max_pending_tokens`
    (8192, as in the authors' configuration). Pending are prompt tokens to compute, and one for each request that
    decodes there or will. Memory is full when promised blocks and the prompt's reach all blocks. A mixed machine goes
    back to its own pool once it has no work of the other kind, as the paper has it (in the simulator: once it has no
    work): a token machine when no prompt is to be computed there, a prompt machine when no decode is assigned to it.
    Ties go to the lowest id. `prefill`: so many replicas, those with the lowest ids, are prompt machines (1).

    The simulator promises memory for the true output, which nobody knows; here a promise is for the prompt's blocks, or
    what the replica has in use, whichever is more. What a machine does is its scheduler's: the paper's batches up to
    2048 prompt tokens first come, first served, and mixed ones put prompts first (`prefill_first`).

    Of KV transfer this models what the network does: a request's blocks are sent as one, while both machines compute,
    but only after its prompt is done, which is what the paper does for short prompts. Its transfer layer by layer
    during the prompt is not modelled: its authors' simulator stands in for it with ten times the link's bandwidth, and
    so can `--link`.

    O(R log R); memory: what is in flight.
    """

    moves_kv = True

    def __init__(self, prefill: int = 1, max_pending_tokens: int = 8192, block_size: int = 16) -> None:
        check_prefill(prefill)
        if max_pending_tokens < 1:
            raise ValueError(f"max_pending_tokens must be at least 1, not {max_pending_tokens}")
        self._prefill = prefill
        self._max_pending = max_pending_tokens
        self._block_size = block_size
        self._promised = PromisedBlocks()
        self._mixed: dict[int, None] = {}  # ids of machines that are not in their own pool

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        prompts, tokens = split(replicas, self._prefill)
        if prompts == tokens:
            self._mixed.clear()
            return Route(min(prompts, key=self._pending).id)
        self._give_back(prompts, tokens)
        mixed = [replica for replica in (*prompts, *tokens) if replica.id in self._mixed]
        prompts = [replica for replica in prompts if replica.id not in self._mixed]
        tokens = [replica for replica in tokens if replica.id not in self._mixed]
        blocks = num_blocks(request.num_prompt_tokens, self._block_size)
        first = self._shortest(prompts, request) or self._shortest(mixed, request)
        second = self._emptiest(tokens, blocks) or self._emptiest(mixed, blocks)
        if first is None and tokens:
            first = self._lend(min(tokens, key=self._pending))
            tokens.remove(first)
        if second is None and prompts:
            second = self._lend(min(prompts, key=self._memory))
        if first is None or second is None:
            first = second = min(replicas, key=self._pending)
        self._promised.send(request, second.id, blocks)
        return Route(first.id, second.id)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self._promised.end(request)

    def _shortest(self, machines: Sequence[Replica], request: Request) -> Replica | None:
        """For a prompt; None if even the shortest queue is too long."""
        best = min(machines, key=self._pending, default=None)
        if best is None or not best.num_waiting:
            return best
        return None if self._pending(best)[0] + request.num_prompt_tokens > self._max_pending else best

    def _emptiest(self, machines: Sequence[Replica], blocks: int) -> Replica | None:
        """For a decode; None if even there memory is full."""
        best = min(machines, key=self._memory, default=None)
        return None if best is None or self._promised.at(best) + blocks >= best.num_blocks else best

    def _pending(self, replica: Replica) -> tuple[int, int]:
        decoding = replica.num_outstanding_tokens - replica.num_prefill_tokens
        return replica.num_prefill_tokens + max(decoding, self._promised.count(replica.id)), replica.id

    def _memory(self, replica: Replica) -> tuple[int, int]:
        return self._promised.at(replica), replica.id

    def _lend(self, machine: Replica) -> Replica:
        self._mixed[machine.id] = None
        return machine

    def _give_back(self, prompts: Sequence[Replica], tokens: Sequence[Replica]) -> None:
        """Machines that have no more work of the other kind go back to their pool; those that left are forgotten."""
        lent = [r.id for r in prompts if self._promised.count(r.id)] + [r.id for r in tokens if r.num_prefill_tokens]
        self._mixed = {machine: None for machine in self._mixed if machine in lent}
