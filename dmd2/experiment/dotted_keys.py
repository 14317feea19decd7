"""Dotted keys of a run: changing them, comparing them in a column condition, and where a wrong one is written."""

import operator as op
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from dmd2.core.errors import UserError, did_you_mean
from dmd2.experiment.config import RunConfig
from dmd2.experiment.section import Section, Strict
from dmd2.experiment.yaml_file import Place

Model = TypeVar("Model", bound=Strict)
ChangedAt = Mapping[str, str]  # file:line of the dotted keys that the changes of a row give, the newest last
_CONDITION = re.compile(r"^([a-z_]+(?:\.[a-z_0-9]+)+)\s*(==|!=|>=|<=|>|<)\s*(\S+)$")
_COMPARE = {"==": op.eq, "!=": op.ne, ">": op.gt, "<": op.lt, ">=": op.ge, "<=": op.le}


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
    """`base` with dotted keys replaced; `base` itself stays as it is.

    Raises:
        KeyError: a key is unknown; its arguments are the key and the sentence "no key ..., did you mean ...?".
    """
    for key, value in (item for change in changes for item in change.items()):
        try:
            base = _replaced(base, key.split("."), value)
        except LookupError:
            raise KeyError(key, f"no key {key}{did_you_mean(key, _names(base))}") from None
    return base


def _replaced(values: Any, keys: list[str], value: Any) -> dict[str, Any]:
    name, *below = keys
    if not isinstance(values, dict) or name not in values:
        raise LookupError(name)
    return {**values, name: _replaced(values[name], below, value) if below else value}


def _inside(key: str, section: str) -> bool:
    """Whether a dotted key is that of a section or lies in it."""
    return f"{key}.".startswith(f"{section}.")


def _newest(changed_at: ChangedAt, wanted: Callable[[str], bool]) -> str | None:
    """``file:line`` of the newest changed key that is wanted."""
    return next((line for key, line in reversed([*changed_at.items()]) if wanted(key)), None)


@dataclass(frozen=True)
class LocatedConfig:
    """A config and where its values are written: in a base, and in the changes that make a row of it."""

    cfg: RunConfig
    base: Place
    row: str = ""  # "row NAME: ", what a sentence about it starts with
    changed_at: ChangedAt = field(default_factory=dict)

    def where(self, *keys: str) -> str:
        """``file:line`` of what gave dotted keys their values: the newest change of one of them, or else the base."""
        changed = _newest(self.changed_at, lambda given: any(_inside(k, given) or _inside(given, k) for k in keys))
        return changed or self.base.where(keys[0])


def validate(model: type[Model], values: Any, place: Place, changed_at: ChangedAt | None = None) -> Model:
    """Validate values that are written at `place`; `changed_at` says where the keys are that changes gave.

    Raises:
        UserError: one sentence about all keys that are missing, or about the first other problem, with file and line.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors()  # a misspelled key also makes the right one "missing": tell the misspelling
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    keys = _keys(first["loc"])
    key = ".".join(map(str, keys))
    where = _newest(changed_at or {}, lambda changed: _inside(key, changed)) or place.where(*keys)
    if first["type"] == "extra_forbidden":
        in_list = max((i + 1 for i, part in enumerate(keys) if isinstance(part, int)), default=0)
        section = "".join(f"{part}." for part in keys[in_list:-1])
        wrong, known = f"{section}{keys[-1]}", [f"{section}{name}" for name in _beside(model, keys)]
        raise UserError(f"{where}: no key {wrong}{did_you_mean(wrong, known)}")
    if first["type"] == "missing":
        missing = [".".join(map(str, _keys(e["loc"]))) for e in errors if e["type"] == "missing"]
        told = f"keys {', '.join(missing)} are" if len(missing) > 1 else f"key {key} is"
        advice = (
            "; `like: digits` takes from that base what is not written" if model is RunConfig and missing[1:] else ""
        )
        raise UserError(f"{where}: {told} missing{advice}")
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    raise UserError(f"{where}: {key and f'{key}: '}{first['msg'].removeprefix('Value error, ')}{got}")


def _keys(path: Sequence[str | int]) -> list[str | int]:
    """The keys of a file in the path of an error, which also names alternatives of a type."""
    alternatives = ("constrained", "function", "union:", "[key]")
    return [part for part in path if isinstance(part, int) or not part.startswith(alternatives)]


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
