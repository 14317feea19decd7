"""YAML with line numbers, so that an error can say where."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dmd2.core.errors import UserError


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses duplicate keys and reads 2e-6 as a number (YAML 1.2)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
        if key in result:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


@dataclass(frozen=True)
class YamlFile:
    """Parsed value and the line of every key path, for messages."""

    path: Path
    value: Any
    lines: dict[tuple[str | int, ...], int]

    def where(self, *keys: str | int) -> str:
        """``file:line`` of a key path, or of its nearest listed parent."""
        for end in range(len(keys), 0, -1):
            if keys[:end] in self.lines:
                return f"{self.path}:{self.lines[keys[:end]]}"
        return str(self.path)


def _walk(node: yaml.Node, keys: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*keys, key.value)] = key.start_mark.line + 1
            _walk(value, (*keys, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*keys, i)] = value.start_mark.line + 1
            _walk(value, (*keys, i), lines)


def read_yaml(path: Path) -> YamlFile:
    """Read a YAML mapping.

    Raises:
        UserError: the file is missing, is not YAML, repeats a key or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}:{line}: {error.problem or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict) or node is None:
        raise UserError(f"{path}: expected keys and values at the top level")
    lines: dict[tuple[str | int, ...], int] = {}
    _walk(node, (), lines)
    return YamlFile(path, value, lines)
