"""The decode group against a plain list of requests that is walked in every step."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from policies.decode_group import DecodeGroup
from policies.request import Request


@dataclass
class Plain:
    """A request with its own counts."""

    request: Request
    computed: int
    tokens: int


class GroupAgainstList(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.group = DecodeGroup(4)
        self.inside: list[Plain] = []
        self.outside: list[Plain] = []
        self.steps: dict[int, int] = {}
        self.next_id = 0

    @rule(prompt=st.integers(1, 20), cap=st.integers(2, 12))
    def a_new_request_joins(self, prompt: int, cap: int) -> None:
        request = Request(self.next_id, 0, prompt, cap)
        self.next_id += 1
        request._computed, request._tokens = prompt, prompt + 1  # its prompt ran and sampled one token
        self.steps[request.id] = 0
        self.group.join(request)
        self.inside.append(Plain(request, prompt, prompt + 1))

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        plain = data.draw(st.sampled_from(self.inside))
        self.group.leave(plain.request)
        self.inside.remove(plain)
        self.outside.append(plain)

    @precondition(lambda self: self.outside)
    @rule(data=st.data(), alone=st.integers(0, 5))
    def come_back(self, data: st.DataObject, alone: int) -> None:
        """Some single decodes outside the group, then back into it."""
        plain = data.draw(st.sampled_from(self.outside))
        request = plain.request
        alone = min(alone, request.max_tokens - 1 - request.num_output_tokens)
        if request.num_output_tokens >= request.max_tokens:
            return
        request._computed += alone
        request._tokens += alone
        plain.computed += alone
        plain.tokens += alone
        self.outside.remove(plain)
        self.group.join(request)
        self.inside.append(plain)

    @rule(times=st.integers(1, 4))
    def advance(self, times: int) -> None:
        for _ in range(times):
            capped = self.group.advance()
            expected = []
            for plain in list(self.inside):
                plain.computed += 1
                plain.tokens += 1
                self.steps[plain.request.id] += 1
                if plain.tokens - plain.request.num_prompt_tokens >= plain.request.max_tokens:
                    expected.append(plain.request)
                    self.inside.remove(plain)
                    self.outside.append(plain)
            assert sorted(r.id for r in capped) == sorted(r.id for r in expected)

    @invariant()
    def agrees(self) -> None:
        group = self.group
        assert list(group.members.values()) == [plain.request for plain in self.inside]
        assert len(group) == len(self.inside)
        assert group.context == sum(plain.computed for plain in self.inside)
        assert group.longest == max((plain.computed for plain in self.inside), default=0)
        boundary = {plain.request.id for plain in self.inside if plain.computed % 4 == 0}
        assert {r.id for r in group.at_block_boundary()} == boundary
        for plain in [*self.inside, *self.outside]:
            request = plain.request
            assert (request.num_computed_tokens, request.num_tokens) == (plain.computed, plain.tokens)
            assert request.num_pending_tokens == 1
            assert request.num_output_tokens == plain.tokens - request.num_prompt_tokens

    @invariant()
    def the_runs_on_record_count_every_step_in_the_group(self) -> None:
        for plain in [*self.inside, *self.outside]:
            runs = plain.request._decode_runs
            if plain.request._group is not None:
                runs = [*runs, self.group.clock]
            assert sum(b - a for a, b in zip(runs[::2], runs[1::2], strict=True)) == self.steps[plain.request.id]


TestGroupAgainstList = GroupAgainstList.TestCase
TestGroupAgainstList.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


def test_coming_and_going_leaves_no_pile_of_stale_entries_behind() -> None:
    group, request = DecodeGroup(4), Request(0, 0, 10, 1_000_000)
    other = Request(1, 0, 1_000, 1_000_000)
    for r in (request, other):
        r._computed, r._tokens = r.num_prompt_tokens, r.num_prompt_tokens + 1
    group.join(other)
    for _ in range(2_000):
        group.join(request)
        group.advance()
        assert group.longest == other.num_computed_tokens
        group.leave(request)
    assert len(group._caps) < 200
    assert len(group._longest) < 200


def test_the_longest_of_many_that_come_and_go_stays_cheap_to_keep() -> None:
    group, longest = DecodeGroup(4), Request(0, 0, 1_000, 1_000_000)
    longest._computed, longest._tokens = 1_000, 1_001
    for _ in range(2_000):
        group.join(longest)
        group.advance()
        assert group.longest == longest.num_computed_tokens
        group.leave(longest)
        assert group.longest == 0
    assert len(group._caps) < 200
