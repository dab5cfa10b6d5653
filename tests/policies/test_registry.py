"""Policies by name: built in, from a file of the user's, from an installed package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from policies import registry
from policies.contract import Admission, Scheduler
from policies.registry import PolicyError, PolicySpec, make
from policies.replica_state import Limits
from policies.stack import StackSpec
from tests.policies.fleet import PerBlock, PerToken
from tests.policies.harness import Drive, Job

WriteModule = Callable[[str], str]


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteModule]:
    """Writes a module of the user's onto the Python path; gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def write(source: str) -> str:
        name = f"users_policies_{tmp_path.name}_{len(made)}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        made.append(name)
        return name

    yield write
    for name in made:
        sys.modules.pop(name, None)


LIFO = '''
"""Last come, first served: a policy of somebody else's."""
from policies.key_queue import KeyQueue
from policies.request import Request


class Lifo(KeyQueue):
    """Last come, first served."""

    def rank(self, request: Request) -> float:
        return -request.arrival_ns
'''


def test_the_built_in_policies_are_known_by_role() -> None:
    assert {"mixed", "prefill_first", "sarathi", "static"} <= set(registry.names("scheduler"))
    assert {"fcfs", "priority", "sjf"} <= set(registry.names("queue"))
    assert {"full_prompt", "reserve_max", "watermark"} <= set(registry.names("admission"))
    assert "last_admitted" in registry.names("preemption")
    assert "lru" in registry.names("eviction")
    assert {"least_tokens", "round_robin"} <= set(registry.names("router"))
    for role in registry.ROLES:
        assert registry.names(role) == sorted(registry.names(role))


@pytest.mark.parametrize("role", registry.ROLES)
def test_every_built_in_policy_plays_its_role_and_says_what_it_does(role: str) -> None:
    surroundings = {"block_size": 16, "seed": 0, "oracle": {}, "future": {}, "cost": PerToken(), "transfer": PerBlock()}
    for name in registry.names(role):
        policy = registry.find(role, name)
        assert (policy.__doc__ or "").strip().splitlines()[0].endswith((".", ","))
        made = make(role, name, queue=make("queue", "fcfs"), **surroundings)
        assert isinstance(made, registry.ROLES[role])


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(PolicyError, match=r"there is no scheduler 'sarati'; did you mean 'sarathi'\?.*mixed"):
        make("scheduler", "sarati", queue=None)
    with pytest.raises(PolicyError, match=r"there is no queue 'zzz'; known: .*fcfs.*package\.module:Class"):
        make("queue", "zzz")


def test_an_unknown_knob_suggests_the_nearest() -> None:
    with pytest.raises(PolicyError, match="sarathi has no knob 'chunksize'; did you mean 'chunk_size'"):
        make("scheduler", "sarathi,chunksize=3", queue=None)
    with pytest.raises(PolicyError, match="fcfs has no knob 'x'; it has none"):
        make("queue", "fcfs,x=3")


def test_what_the_surroundings_give_is_no_knob() -> None:
    with pytest.raises(PolicyError, match="reserve_max has no knob 'block_size'"):
        make("admission", "reserve_max,block_size=3", block_size=16)
    with pytest.raises(PolicyError, match="reserve_max needs block_size"):
        make("admission", "reserve_max")


@pytest.mark.parametrize("text", ["mixed,", "mixed,x", "mixed,=3"])
def test_a_specification_that_cannot_be_read_says_how_to_write_one(text: str) -> None:
    with pytest.raises(PolicyError, match="write name,knob=value"):
        PolicySpec.parse(text)


def test_a_specification_is_read_from_text_or_from_a_mapping() -> None:
    assert PolicySpec.parse(" sarathi , chunk_size = 64 ") == PolicySpec("sarathi", {"chunk_size": "64"})
    assert PolicySpec.parse({"name": "sarathi", "chunk_size": 64}) == PolicySpec("sarathi", {"chunk_size": 64})
    assert str(PolicySpec.parse("sarathi, chunk_size=64")) == "sarathi,chunk_size=64"
    with pytest.raises(PolicyError, match="a policy needs a name"):
        PolicySpec.parse({"chunk_size": 64})


def test_a_stack_spells_its_policies_in_one_way() -> None:
    assert StackSpec(scheduler="sarathi , chunk_size = 64").as_dict() == {
        "scheduler": "sarathi,chunk_size=64",
        "queue": "fcfs",
        "admission": "full_prompt",
        "preemption": "last_admitted",
        "eviction": "lru",
        "offload": "never",
    }


KNOBS = """
from __future__ import annotations
from typing import Optional, Union
from policies.admission.watermark import Watermark


class Knobs(Watermark):
    def __init__(self, whole: int = 1, real: float = 1.0, flag: bool = False, text: str = "a",
                 maybe: int | None = 3, old: Optional[float] = None, either: Union[int, str] = 0) -> None:
        self.values = dict(whole=whole, real=real, flag=flag, text=text, maybe=maybe, old=old, either=either)
"""


@pytest.mark.parametrize(
    ("knob", "value", "expected"),
    [
        ("whole", "7", 7),
        ("whole", 7, 7),
        ("real", "7", 7.0),
        ("real", "1e-3", 0.001),
        ("flag", "true", True),
        ("flag", "False", False),
        ("flag", True, True),
        ("text", "7", "7"),
        ("maybe", "7", 7),
        ("maybe", "none", None),
        ("maybe", None, None),
        ("old", "2.5", 2.5),
        ("old", "none", None),
        ("either", "7", 7),
        ("either", "seven", "seven"),
    ],
)
def test_a_knob_is_read_as_its_annotation_says(
    write_module: WriteModule, knob: str, value: object, expected: object
) -> None:
    policy = make("admission", {"name": f"{write_module(KNOBS)}:Knobs", knob: value})
    assert policy.values[knob] == expected
    assert type(policy.values[knob]) is type(expected)


@pytest.mark.parametrize(
    ("knob", "value", "wanted"),
    [
        ("whole", "7.5", "int"),
        ("whole", "seven", "int"),
        ("whole", 7.5, "int"),
        ("whole", "nan", "int"),
        ("real", "much", "float"),
        ("real", "nan", "a finite number"),
        ("real", "inf", "a finite number"),
        ("real", "-inf", "a finite number"),
        ("real", "1e999", "a finite number"),
        ("real", float("nan"), "a finite number"),
        ("flag", "yes", "bool"),
        ("flag", 1, "bool"),
        ("maybe", "many", "int or None"),
        ("maybe", "inf", "int or None"),
        ("old", "much", "float or None"),
        ("old", "inf", "a finite number"),
    ],
)
def test_a_knob_of_the_wrong_kind_is_refused(write_module: WriteModule, knob: str, value: object, wanted: str) -> None:
    with pytest.raises(PolicyError, match=f"{knob} must be {wanted}, not "):
        make("admission", {"name": f"{write_module(KNOBS)}:Knobs", knob: value})


BARE_KNOBS = """
from policies.admission.watermark import Watermark


class Knobs(Watermark):
    def __init__(self, needed, share=0.25, count=1, flag=True, text="a", maybe=None):
        self.values = dict(needed=needed, share=share, count=count, flag=flag, text=text, maybe=maybe)
"""


@pytest.mark.parametrize(
    ("knob", "value", "expected"),
    [
        ("share", "0.5", 0.5),
        ("share", "1", 1.0),
        ("count", "7", 7),
        ("flag", "false", False),
        ("text", "7", "7"),
        ("maybe", "none", None),
        ("maybe", "7", 7),
        ("maybe", "0.5", 0.5),
        ("maybe", "true", True),
        ("maybe", "declared", "declared"),
        ("needed", "0.5", 0.5),
        ("needed", "declared", "declared"),
    ],
)
def test_a_knob_without_annotation_is_read_as_its_default_is(
    write_module: WriteModule, knob: str, value: str, expected: object
) -> None:
    given = {"needed": "0"} | {knob: value}
    policy = make("admission", {"name": f"{write_module(BARE_KNOBS)}:Knobs", **given})
    assert policy.values[knob] == expected
    assert type(policy.values[knob]) is type(expected)
    with pytest.raises(PolicyError, match="share must be float, not 'half'"):
        make("admission", {"name": f"{write_module(BARE_KNOBS)}:Knobs", "needed": 0, "share": "half"})


@pytest.mark.parametrize(
    ("mapping", "why"),
    [
        ({"name": "sarathi", "chunk_size": "64,long_prefill_threshold=2"}, "chunk_size must be one plain value"),
        ({"name": "sarathi", "chunk_size": [64]}, "chunk_size must be one plain value"),
        ({"name": "sarathi", "chunk_size": {"a": 1}}, "chunk_size must be one plain value"),
        ({"name": "sarathi", "chunk_size=64,x": 1}, "is no knob's name"),
        ({"name": "sarathi", 3: 1}, "3 is no knob's name"),
        ({"name": "sarathi,chunk_size=64"}, "a policy needs a name"),
    ],
)
def test_a_mapping_that_text_would_say_otherwise_is_refused(mapping: dict[str, object], why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        PolicySpec.parse(mapping)


def test_a_mapping_and_its_text_are_the_same_policy(write_module: WriteModule) -> None:
    spec = PolicySpec.parse({"name": f"{write_module(KNOBS)}:Knobs", "text": "a=b", "real": 0.5, "maybe": None})
    assert make("admission", spec).values == make("admission", str(spec)).values


def test_the_roles_of_a_name_are_those_that_have_it_and_of_a_class_those_it_can_play(write_module: WriteModule) -> None:
    assert registry.roles("sarathi") == ["scheduler"]
    name = write_module(LIFO)
    assert registry.roles(f"{name}:Lifo") == ["queue"]
    with pytest.raises(PolicyError, match=f"{name}:Request plays no role"):
        registry.roles(f"{name}:Request")
    with pytest.raises(PolicyError, match="there is no policy 'sarati'; did you mean 'sarathi'"):
        registry.roles("sarati")


def test_knobs_that_a_class_inherits_are_typed_too(write_module: WriteModule) -> None:
    name = write_module("from policies.admission.watermark import Watermark\n\n\nclass Mine(Watermark):\n    pass\n")
    assert make("admission", f"{name}:Mine,watermark=0.25")._watermark == 0.25
    with pytest.raises(PolicyError, match="watermark must be float, not 'much'"):
        make("admission", f"{name}:Mine,watermark=much")


def test_what_a_constructor_objects_to_comes_out_as_a_policy_error() -> None:
    with pytest.raises(PolicyError, match="scheduler sarathi: chunk_size must be at least 1, not 0"):
        make("scheduler", "sarathi,chunk_size=0", queue=None)
    with pytest.raises(PolicyError, match="long_prefill_threshold must be 0 or more, not -1"):
        make("scheduler", "mixed,long_prefill_threshold=-1", queue=None)
    with pytest.raises(PolicyError, match="max_batch_size must be at least 1"):
        make("scheduler", "static,max_batch_size=0", queue=None)


# Plug-ins


def test_a_policy_in_a_file_of_the_users_serves_like_a_built_in_one(write_module: WriteModule) -> None:
    stack = StackSpec(queue=f"{write_module(LIFO)}:Lifo")
    limits = Limits(100, 4, 1, 32, 80)
    drive = Drive(limits, stack, [Job(4, 2, arrives=i) for i in (0, 0, 0)] + [Job(4, 2, arrives=1)])
    order = [r.id for step in drive.steps for r in step.admitted]
    assert order == [0, 3, 1, 2]  # one slot; the last to come went ahead of those who came with the first


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("no_such_module_anywhere:Lifo", "there is no module 'no_such_module_anywhere' on the Python path"),
        ("policies.nothing.here:Lifo", "there is no module 'policies.nothing.here' on the Python path"),
        ("{module}:Fifo", "has no class 'Fifo'"),
        ("{module}:KeyQueue.rank", "has no class 'KeyQueue.rank'"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(write_module: WriteModule, path: str, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        make("queue", path.format(module=write_module(LIFO)))


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import a_package_that_is_not_here\n", "importing .* failed: No module named 'a_package_that_is_not_here'"),
        (
            "import users_policies\n",
            "importing .* failed: No module named 'users_policies'",
        ),  # a prefix of its own name
        ("1 / 0\n", "importing .* failed: division by zero"),
        ("def broken(:\n", "importing .* failed"),
    ],
)
def test_a_module_that_does_not_import_says_why(write_module: WriteModule, source: str, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        make("queue", f"{write_module(source)}:Lifo")


def test_a_class_that_lacks_a_roles_methods_is_refused_with_their_names(write_module: WriteModule) -> None:
    name = write_module(LIFO)
    with pytest.raises(PolicyError, match=f"{name}:Lifo is no scheduler: it lacks add, plan"):
        make("scheduler", f"{name}:Lifo")
    with pytest.raises(PolicyError, match="is no admission: it lacks allows, on_admit, on_release"):
        make("admission", f"{name}:Lifo")


def test_annotations_that_only_a_type_checker_can_read_are_refused_by_name(write_module: WriteModule) -> None:
    source = """
from __future__ import annotations
from typing import TYPE_CHECKING
from policies.key_queue import KeyQueue
if TYPE_CHECKING:
    from fractions import Fraction


class Odd(KeyQueue):
    def __init__(self, share: Fraction | None = None) -> None:
        super().__init__()

    def rank(self, request):
        return 0.0
"""
    with pytest.raises(PolicyError, match="Odd: cannot read the annotations of its constructor: name 'Fraction'"):
        make("queue", f"{write_module(source)}:Odd,share=1")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed package that offers a queue and something that is none."""
    package = "somebodys_package"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(LIFO)
    info = tmp_path / "somebodys_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[{registry.ENTRY_POINT_GROUP}]\n"
        f"queue.lifo = {package}:Lifo\n"
        f"scheduler.lifo_too = {package}:Lifo\n"
        f"queue.lost = {package}:Lost\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield package
    sys.modules.pop(package, None)


def test_an_installed_package_offers_policies_by_name(installed: str) -> None:
    assert {"lifo", "lost", "fcfs"} <= set(registry.names("queue"))
    assert "lifo" not in registry.names("scheduler")
    assert type(make("queue", "lifo")).__module__ == installed
    assert StackSpec(queue="lifo").build().scheduler.queue.__class__.__name__ == "Lifo"  # type: ignore[attr-defined]


def test_an_installed_policy_is_suggested_and_checked_like_a_built_in_one(installed: str) -> None:
    with pytest.raises(PolicyError, match="did you mean 'lifo'"):
        make("queue", "lfio")
    with pytest.raises(PolicyError, match="lifo_too is no scheduler: it lacks"):
        make("scheduler", "lifo_too")
    with pytest.raises(PolicyError, match="the plug-in somebodys_package:Lost for queue 'lost' does not load"):
        make("queue", "lost")


def test_a_stack_with_a_clairvoyant_member_is_clairvoyant() -> None:
    assert StackSpec(queue="sjf,predictor=oracle").build(oracle={}).clairvoyant
    assert not StackSpec(queue="sjf").build(oracle={}).clairvoyant


def test_every_stack_has_policies_of_its_own() -> None:
    first, second = (StackSpec().build() for _ in range(2))
    assert first.scheduler is not second.scheduler
    assert isinstance(first.scheduler, Scheduler)
    assert isinstance(first.admission, Admission)
    assert first.admission is not second.admission
