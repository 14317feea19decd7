"""Dotted keys of a run: changing them, comparing them in a column condition, and naming the nearest one when wrong."""

import difflib
import operator as op
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from dmd2.core.errors import UserError
from dmd2.experiment.config import RunConfig, Section
from dmd2.experiment.yaml_file import YamlFile

Model = TypeVar("Model", bound=Section)
_CONDITION = re.compile(r"^([a-z_]+(?:\.[a-z_0-9]+)+)\s*(==|!=|>=|<=|>|<)\s*(\S+)$")
_COMPARE = {"==": op.eq, "!=": op.ne, ">": op.gt, "<": op.lt, ">=": op.ge, "<=": op.le}


@dataclass(frozen=True)
class Change:
    """Dotted keys with their new values, and where they are written."""

    values: dict[str, Any]
    source: YamlFile
    keys: tuple[str | int, ...]

    def where(self, key: str) -> str:
        """``file:line`` of one of its keys."""
        return self.source.where(*self.keys, key)


@dataclass(frozen=True)
class Written:
    """A config and where it is written: its base, and the changes of a row in the order in which they were applied."""

    cfg: RunConfig
    base: YamlFile
    row: str = ""  # "row NAME: ", what a sentence about it starts with
    changes: Sequence[Change] = ()

    def where(self, *keys: str) -> str:
        """``file:line`` of what gave dotted keys their values: the last change that gives one, or else the base."""
        for change in reversed(self.changes):
            for given in change.values:
                if any(f"{key}.".startswith(f"{given}.") or f"{given}.".startswith(f"{key}.") for key in keys):
                    return change.where(given)
        return self.base.where(*keys[0].split("."))


def leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of nested dicts by its dotted key; lists and empty dicts are values."""
    if not isinstance(values, dict) or (prefix and not values):
        return {prefix: values}
    return {k: v for key, part in values.items() for k, v in leaves(part, f"{prefix}.{key}" if prefix else key).items()}


def differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both; None where one has no such key."""
    left, right = (leaves(x.model_dump(mode="json") if isinstance(x, Section) else x) for x in (a, b))
    keys = dict.fromkeys([*left, *right])
    return [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def apply_change(base: dict[str, Any], *changes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of `base` with dotted keys replaced; KeyError with a sentence for unknown ones."""
    values = deepcopy(base)
    for change in changes:
        for key, value in change.items():
            set_dotted(values, key, value)
    return values


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c`` in nested dicts.

    Raises:
        KeyError: with the sentence "no key ..., did you mean ...?".
    """
    parent: Any = values
    *parents, last = key.split(".")
    for part in parents:
        if not isinstance(parent.get(part), dict):
            raise KeyError(_unknown(values, key))
        parent = parent[part]
    if last not in parent:
        raise KeyError(_unknown(values, key))
    parent[last] = value


def _unknown(values: dict[str, Any], key: str) -> str:
    near = difflib.get_close_matches(key, dotted_keys(values), n=1, cutoff=0.5)
    return f"no key {key}" + (f", did you mean {near[0]}?" if near else "")


def dotted_keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    """All leaf and section keys of nested dicts, dotted."""
    keys: list[str] = []
    for name, value in values.items():
        keys.append(prefix + name)
        if isinstance(value, dict):
            keys += dotted_keys(value, f"{prefix}{name}.")
    return keys


def validate(
    model: type[Model], values: dict[str, Any], source: YamlFile, *prefix: str | int, changes: Sequence[Change] = ()
) -> Model:
    """Validate values; the first problem becomes one sentence with file, line and key.

    `changes` are what was applied to the values, in order: a key is blamed on the last of them that gives it, and
    anything else on `prefix` in `source`.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(model, error, source, prefix, changes)) from None


def _sentence(
    model: type[Section],
    error: ValidationError,
    source: YamlFile,
    prefix: tuple[str | int, ...],
    changes: Sequence[Change],
) -> str:
    errors = error.errors()  # a misspelled key also makes the right one "missing": the misspelling is the news
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    keys = tuple(k for k in first["loc"] if isinstance(k, int) or not k.startswith(("constrained", "function")))
    dotted = ".".join(str(k) for k in keys)
    blamed = ((c, key) for c in reversed(changes) for key in c.values if f"{dotted}.".startswith(f"{key}."))
    place = next((change.where(key) for change, key in blamed), source.where(*prefix, *keys))
    if first["type"] == "extra_forbidden":
        siblings = [k for k in _known_keys(model) if k.count(".") == dotted.count(".")]
        near = difflib.get_close_matches(dotted, siblings, n=1, cutoff=0.5)
        return f"{place}: no key {dotted}" + (f", did you mean {near[0]}?" if near else "")
    if first["type"] == "missing":
        return f"{place}: key {dotted} is missing"
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {dotted + ': ' if dotted else ''}{message}{got}"


def _known_keys(model: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            keys += _known_keys(info.annotation, f"{prefix}{name}.")
    return keys


def holds(condition: str, cfg: RunConfig) -> bool:
    """Evaluate a column condition such as ``critic.ratio > 1`` on a run.

    Raises:
        ValueError: it has another form, an unknown key, or orders something that is no number.
    """
    key, operator, text = split_condition(condition)
    value: Any = cfg
    for part in key.split("."):
        value = getattr(value, part)
    wanted = yaml.safe_load(text) if not re.fullmatch(r"[-+.\deE]+", text) else float(text)
    if operator not in ("==", "!=") and not all(isinstance(v, int | float) for v in (value, wanted)):
        raise ValueError(f"{condition!r} orders {value!r} and {wanted!r}, which are not both numbers")
    return bool(_COMPARE[operator](value, wanted))


def split_condition(condition: str) -> tuple[str, str, str]:
    """``"critic.ratio > 1"`` as (key, operator, value); ValueError if it has another form or an unknown key."""
    match = _CONDITION.match(condition)
    if not match:
        raise ValueError(f"{condition!r} is not of the form 'section.key > value'")
    known = _known_keys(RunConfig)
    if match[1] not in known:
        near = difflib.get_close_matches(match[1], known, n=1, cutoff=0.5)
        raise ValueError(f"no key {match[1]}" + (f", did you mean {near[0]}?" if near else ""))
    return match[1], match[2], match[3]
