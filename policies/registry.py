"""Policies by name: built in, from an installed package, or from a file of the user's.

A policy is written as `name`, or `name,knob=value,...`. The name is one of the built-in ones, one that an installed
package offers in the entry-point group `diptych.policies` (as `role.name`), or `package.module:Class`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeVar

from policies.contract import (
    Admission,
    Autoscaler,
    Eviction,
    LengthPredictor,
    Offload,
    Preemption,
    Queue,
    Router,
    Scheduler,
)

ENTRY_POINT_GROUP = "diptych.policies"
ROLES: dict[str, type] = {
    "scheduler": Scheduler,
    "queue": Queue,
    "admission": Admission,
    "preemption": Preemption,
    "eviction": Eviction,
    "offload": Offload,
    "router": Router,
    "autoscaler": Autoscaler,
    "predictor": LengthPredictor,
}
_PACKAGES = {
    "scheduler": "policies.schedulers",
    "queue": "policies.queues",
    "admission": "policies.admission",
    "preemption": "policies.preemption",
    "eviction": "policies.eviction",
    "offload": "policies.offload",
    "router": "policies.routers",
    "autoscaler": "policies.autoscalers",
    "predictor": "policies.predictors",
}
CONTEXT = ("queue", "oracle", "future", "seed", "block_size", "cost", "transfer")
"""What a policy's constructor may ask of its surroundings by name; these are no knobs."""
_REGISTERED: dict[str, dict[str, type]] = {role: {} for role in ROLES}

Class = TypeVar("Class", bound=type)


class PolicyError(ValueError):
    """No such policy, or a knob it does not have; the message names what there is."""


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy by name, with its knobs: plain values, so that it can be written as text."""

    name: str
    knobs: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | Mapping[str, Any]) -> PolicySpec:
        """From `name,knob=value,...` or `{"name": ..., knob: value, ...}`. Raises PolicyError."""
        if isinstance(text, Mapping):
            knobs = dict(text)
            name = knobs.pop("name", None)
            if not isinstance(name, str) or "," in name:
                raise PolicyError(f"a policy needs a name, as in {{name: mixed}}; got {dict(text)}")
            for knob, value in knobs.items():
                if not str(knob).isidentifier():
                    raise PolicyError(f"{name}: {knob!r} is no knob's name")
                if not isinstance(value, (str, int, float, types.NoneType)) or "," in str(value):
                    raise PolicyError(f"{name}: {knob} must be one plain value without a comma, not {value!r}")
            return cls(name, knobs)
        name, *pairs = (part.strip() for part in text.split(","))
        knobs = {}
        for pair in pairs:
            knob, equals, value = pair.partition("=")
            if not equals or not knob:
                raise PolicyError(f"cannot read {pair!r} in {text!r}; write name,knob=value")
            knobs[knob.strip()] = value.strip()
        return cls(name, knobs)

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{knob}={value}" for knob, value in self.knobs.items())])


def register(role: str, name: str) -> Callable[[Class], Class]:
    """Class decorator: offer a policy under this name. The first line of its docstring is its description."""

    def decorate(policy: Class) -> Class:
        _REGISTERED[role][name] = policy
        return policy

    return decorate


def names(role: str) -> list[str]:
    """The names known for a role, installed plug-ins included, in alphabetical order."""
    _load_built_in(role)
    plugged = (ep.name.split(".", 1)[1] for ep in entry_points(group=ENTRY_POINT_GROUP) if _role_of(ep.name) == role)
    return sorted({*_REGISTERED[role], *plugged})


def find(role: str, name: str) -> type:
    """The class behind a name. Raises PolicyError with the nearest name where there is none."""
    _load_built_in(role)
    if ":" in name:
        found = _load_from_path(name)
    elif name in _REGISTERED[role]:
        found = _REGISTERED[role][name]
    else:
        plugged = [ep for ep in entry_points(group=ENTRY_POINT_GROUP) if ep.name == f"{role}.{name}"]
        if not plugged:
            raise PolicyError(_unknown(role, name))
        try:
            found = plugged[0].load()
        except Exception as error:
            raise PolicyError(f"the plug-in {plugged[0].value} for {role} {name!r} does not load: {error}") from error
    missing = _missing(role, found)
    if missing:
        raise PolicyError(f"{name} is no {role}: it lacks {', '.join(missing)}")
    return found


def roles(name: str) -> list[str]:
    """The roles in which there is a policy of this name, or that a `package.module:Class` can play.

    Raises PolicyError where there is none.
    """
    if ":" in name:
        policy = _load_from_path(name)
        played = [role for role in ROLES if not _missing(role, policy)]
        if not played:
            raise PolicyError(f"{name} plays no role: it has the methods of none of {', '.join(ROLES)}")
        return played
    known = {role: names(role) for role in ROLES}
    played = [role for role in ROLES if name in known[role]]
    if not played:
        everything = sorted({one for of_role in known.values() for one in of_role})
        near = nearest(name, everything)
        raise PolicyError(f"there is no policy {name!r}; {near}known: {', '.join(everything)}, or package.module:Class")
    return played


def knobs(policy: type) -> dict[str, inspect.Parameter]:
    """The keyword arguments of a policy's constructor."""
    parameters = inspect.signature(policy).parameters
    return {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def make(role: str, spec: PolicySpec | str | Mapping[str, Any], **context: object) -> Any:
    """A new policy object.

    `context` holds what the surroundings can give (`queue`, `oracle`, `seed`, ...); a policy gets what its constructor
    names. Raises PolicyError for an unknown name, an unknown knob or a value of the wrong kind.
    """
    if not isinstance(spec, PolicySpec):
        spec = PolicySpec.parse(spec)
    policy = find(role, spec.name)
    accepted = knobs(policy)
    try:
        hints = typing.get_type_hints(getattr(policy, "__init__"))  # noqa: B009  (inherited ones too)
    except NameError as error:
        message = f"{role} {spec.name}: cannot read the annotations of its constructor: {error}"
        raise PolicyError(message) from error
    arguments = {name: value for name, value in context.items() if name in accepted}
    for knob, value in spec.knobs.items():
        if knob not in accepted or knob in arguments:
            own = sorted(set(accepted) - set(context))
            near = difflib.get_close_matches(knob, own, 1)
            known = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(own) or 'none'}"
            raise PolicyError(f"{role} {spec.name} has no knob {knob!r}; {known}")
        wanted = hints.get(knob, _type_of(accepted[knob].default))
        arguments[knob] = _convert(f"{role} {spec.name}: {knob}", value, wanted)
    missing = [n for n, p in accepted.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise PolicyError(f"{role} {spec.name} needs {', '.join(missing)}")
    try:
        return policy(**arguments)
    except ValueError as error:
        raise PolicyError(f"{role} {spec.name}: {error}") from error


def make_inner(role: str, text: str, **context: object) -> Any:
    """`make` for a policy named inside another one's knob, where slashes stand for commas: `name/knob=value`."""
    return make(role, text.replace("/", ","), **context)


def is_clairvoyant(policy: object) -> bool:
    """Whether a policy is told what a real system cannot know."""
    return bool(getattr(policy, "clairvoyant", False))


def moves_kv(router: object) -> bool:
    """Whether a router, or its class, sends KV from one replica to another, which only simulations can so far."""
    return bool(getattr(router, "moves_kv", False))


def _load_built_in(role: str) -> None:
    package = importlib.import_module(_PACKAGES[role])
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def _load_from_path(path: str) -> type:
    module_name, _, class_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise PolicyError(f"{path}: importing {module_name} failed: {error}") from error
        raise PolicyError(f"{path}: there is no module {module_name!r} on the Python path") from error
    except Exception as error:
        raise PolicyError(f"{path}: importing {module_name} failed: {error}") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise PolicyError(f"{path}: {module_name} has no class {class_name!r}")
    return found


def _role_of(entry_name: str) -> str:
    return entry_name.split(".", 1)[0] if "." in entry_name else ""


def _unknown(role: str, name: str) -> str:
    known = names(role)
    played = [other for other in ROLES if name in names(other)]
    hint = f"that is a policy for {played[0]}; " if played else nearest(name, known)
    return f"there is no {role} {name!r}; {hint}known: {', '.join(known)}, or package.module:Class"


def nearest(name: str, known: list[str]) -> str:
    """`did you mean ...? ` for the known name most like this one, or nothing."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}? " if near else ""


def _missing(role: str, policy: type) -> list[str]:
    """The methods of a role that a class lacks."""
    methods = [n for n, v in vars(ROLES[role]).items() if inspect.isfunction(v) and not n.startswith("_")]
    return [n for n in methods if not callable(getattr(policy, n, None))]


def _type_of(default: object) -> Any:
    """What a knob without annotation takes: its default's type; where that says nothing, what the value looks like."""
    unknown = default is None or default is inspect.Parameter.empty
    return bool | int | float | str | None if unknown else type(default)


def _convert(what: str, value: object, wanted: Any) -> object:
    """A knob's value as its annotation wants it; text from the command line is read as such."""
    union = typing.get_origin(wanted) in (types.UnionType, typing.Union)
    options = typing.get_args(wanted) if union else (wanted,)
    if type(None) in options and value in (None, "none", "None", ""):
        return None
    for option in (bool, int, float, str):
        if option not in options:
            continue
        try:
            if option is bool:
                return {"true": True, "false": False}[str(value).lower()]
            if option is str:
                return str(value)
            number = float(str(value)) if option is float else int(str(value))
        except (KeyError, ValueError):
            continue
        if isinstance(number, float) and not math.isfinite(number):
            raise PolicyError(f"{what} must be a finite number, not {value!r}")
        return number
    if any(option not in (bool, int, float, str, type(None)) for option in options):
        return value
    wanted_name = " or ".join("None" if option is type(None) else option.__name__ for option in options)
    raise PolicyError(f"{what} must be {wanted_name}, not {value!r}")
