"""Dotted keys of a run: changing them, comparing them in a column condition, and where a wrong one is written."""

import operator as op
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from dmd2.core.errors import UserError, did_you_mean
from dmd2.experiment.config import RunConfig, Section
from dmd2.experiment.section import Strict
from dmd2.experiment.yaml_file import Place

Model = TypeVar("Model", bound=Strict)
_CONDITION = re.compile(r"^([a-z_]+(?:\.[a-z_0-9]+)+)\s*(==|!=|>=|<=|>|<)\s*(\S+)$")
_COMPARE = {"==": op.eq, "!=": op.ne, ">": op.gt, "<": op.lt, ">=": op.ge, "<=": op.le}


@dataclass(frozen=True)
class Change:
    """Dotted keys with their new values, and where they are written."""

    values: dict[str, Any]
    place: Place


def _last_given(changes: Sequence[Change], asked: Callable[[str], bool]) -> str | None:
    """``file:line`` of the key that is asked for in the last change that has it."""
    return next((c.place.where(key) for c in reversed(changes) for key in c.values if asked(key)), None)


def _inside(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


@dataclass(frozen=True)
class Written:
    """A config and where it is written: its base, and the changes of a row in the order in which they were applied."""

    cfg: RunConfig
    base: Place
    row: str = ""  # "row NAME: ", what a sentence about it starts with
    changes: Sequence[Change] = ()

    def where(self, *keys: str) -> str:
        """``file:line`` of what gave dotted keys their values: the last change that gives one, or else the base."""
        given = _last_given(self.changes, lambda given: any(_inside(k, given) or _inside(given, k) for k in keys))
        return given or self.base.where(keys[0])


def leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of nested dicts by its dotted key; lists and empty dicts are values."""
    if not isinstance(values, dict) or (prefix and not values):
        return {prefix: values}
    return {k: v for key, part in values.items() for k, v in leaves(part, f"{prefix}.{key}" if prefix else key).items()}


def _names(values: dict[str, Any]) -> dict[str, None]:
    """The dotted keys of all values and sections, in order."""
    parts = (key.split(".") for key in leaves(values))
    return {".".join(key[:end]): None for key in parts for end in range(1, len(key) + 1)}


def differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both; None where one has no such key."""
    left, right = (leaves(x.model_dump(mode="json") if isinstance(x, Section) else x) for x in (a, b))
    keys = dict.fromkeys([*left, *right])
    return [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def apply_change(base: dict[str, Any], *changes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of `base` with dotted keys replaced.

    Raises:
        KeyError: of an unknown key, with the sentence "no key ..., did you mean ...?".
    """
    values = deepcopy(base)
    for key, value in (item for change in changes for item in change.items()):
        *sections, last = key.split(".")
        parent: Any = values
        for name in sections:
            parent = parent.get(name) if isinstance(parent, dict) else None
        if not isinstance(parent, dict) or last not in parent:
            raise KeyError(f"no key {key}{did_you_mean(key, _names(values))}")
        parent[last] = value
    return values


def validate(model: type[Model], values: Any, place: Place, changes: Sequence[Change] = ()) -> Model:
    """Validate values, which are written at a place and in the changes that were applied to them, in order.

    Raises:
        UserError: one sentence about the first problem, with key, file and line: those of the last change that gives
            the key, or else of the place.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors()  # a misspelled key also makes the right one "missing": the misspelling is the news
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    keys = [k for k in first["loc"] if isinstance(k, int) or not k.startswith(("constrained", "function", "union:"))]
    key = ".".join(map(str, keys))
    where = _last_given(changes, lambda given: _inside(key, given)) or place.where(*keys)
    if first["type"] == "extra_forbidden":
        in_list = max((i + 1 for i, part in enumerate(keys) if isinstance(part, int)), default=0)
        section = "".join(f"{part}." for part in keys[in_list:-1])
        wrong, known = f"{section}{keys[-1]}", [f"{section}{name}" for name in _beside(model, keys)]
        raise UserError(f"{where}: no key {wrong}{did_you_mean(wrong, known)}")
    if first["type"] == "missing":
        raise UserError(f"{where}: key {key} is missing")
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    raise UserError(f"{where}: {key and f'{key}: '}{first['msg'].removeprefix('Value error, ')}{got}")


def _beside(model: type[Strict], path: Sequence[str | int]) -> list[str]:
    """The keys that a model knows in the section in which the last key of a path stands."""
    sections = [model]
    for key in path[:-1]:
        fields = [of.annotation for m in sections for name, of in m.model_fields.items() if key in (name, of.alias)]
        sections = [section for field in fields for section in _sections(field)] or sections
    return [field.alias or name for section in sections for name, field in section.model_fields.items()]


def _sections(annotation: Any) -> list[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def holds(condition: str, cfg: RunConfig) -> bool:
    """Evaluate a column condition such as ``critic.ratio > 1`` on a run.

    Raises:
        ValueError: it has another form, an unknown key, or orders something that is no number.
    """
    match = _CONDITION.match(condition)
    if not match:
        raise ValueError(f"{condition!r} is not of the form 'section.key > value'")
    key, operator, text = match.groups()
    value: Any = cfg.model_dump(mode="json")
    if key not in (known := _names(value)):
        raise ValueError(f"no key {key}{did_you_mean(key, known)}")
    for name in key.split("."):
        value = value[name]
    wanted = float(text) if re.fullmatch(r"[-+.\deE]+", text) else yaml.safe_load(text)
    if operator not in ("==", "!=") and not all(isinstance(v, int | float) for v in (value, wanted)):
        raise ValueError(f"{condition!r} orders {value!r} and {wanted!r}, which are not both numbers")
    return bool(_COMPARE[operator](value, wanted))
