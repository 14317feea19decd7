"""YAML with line numbers, so that an error can say where."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dmd2.core.errors import UserError, did_you_mean

# The folder whose workflow/ holds the Snakefile: that of the packages in a clone, `dmd2` in a wheel.
CODE = Path(__file__).parents[2]
ORIGIN = CODE / "dmd2" if (CODE / "dmd2/workflow").is_dir() else CODE


class _Loader(yaml.CSafeLoader):
    """Safe loader that reads 2e-6 as a number (YAML 1.2)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


@dataclass(frozen=True)
class Place:
    """Where a value is written: a file, ``file:line`` of each of its keys by dotted path, and the path of the value."""

    file: Path
    lines: dict[str, str]
    keys: tuple[str | int, ...] = ()

    def where(self, *keys: str | int) -> str:
        """``file:line`` of the value, or of a key below it; of the nearest parent where that has no line of its own."""
        path = ".".join(map(str, (*self.keys, *keys)))
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return self.lines[path] if path else str(self.file)

    def below(self, *keys: str | int) -> "Place":
        """The place of a key below the value."""
        return replace(self, keys=(*self.keys, *keys))


def read_yaml(path: Path) -> tuple[dict[str, Any], Place]:
    """The mapping in a YAML file, and where its keys (``rows.0.change.critic.ratio``) are written.

    Raises:
        UserError: the file is missing, is not YAML, repeats a key or is not a mapping.
    """
    lines: dict[str, int] = {}
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        value = None if node is None else _value(loader, node, "", lines)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}:{line}: {error.problem or error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected keys and values at the top level")
    return value, Place(path, {key: f"{path}:{line}" for key, line in lines.items()})


def workflow_files(folder: Path) -> dict[str, Path]:
    """YAML files of a folder by name.

    One relative to the workspace, as `workflow/tables`, also has those beside the Snakefile that the workspace has not.
    """
    places = [folder] if folder.is_absolute() else [ORIGIN / folder, folder]
    found = {file.stem: file for place in places for file in place.glob("*.yaml")}
    return dict(sorted(found.items()))


def read_named(kind: str, name: str, folder: Path) -> tuple[dict[str, Any], Place]:
    """`read_yaml` of ``FOLDER/NAME.yaml``, which is one of `workflow_files`.

    Raises:
        UserError: there is none; the sentence has the nearest name, or all of them.
    """
    known = workflow_files(folder)
    if name not in known:
        hint = did_you_mean(name, known, f"; known: {', '.join(known)}")
        raise UserError(f"there is no {kind} {folder / name}.yaml{hint}")
    return read_yaml(known[name])


def _value(loader: _Loader, node: yaml.Node, path: str, lines: dict[str, int]) -> Any:
    """The plain value of a node; adds the lines of its keys and elements to `lines`."""
    if isinstance(node, yaml.SequenceNode):
        lines |= {f"{path}{i}": item.start_mark.line + 1 for i, item in enumerate(node.value)}
        return [_value(loader, item, f"{path}{i}.", lines) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    loader.flatten_mapping(node)
    result: dict[str, Any] = {}
    for key_node, item in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str) or key in result:
            told = f"key {key!r} is given twice" if isinstance(key, str) else f"key {key!r} is not text"
            raise yaml.MarkedYAMLError(problem=told, problem_mark=key_node.start_mark)
        lines[f"{path}{key}"] = key_node.start_mark.line + 1
        result[key] = _value(loader, item, f"{path}{key}.", lines)
    return result
