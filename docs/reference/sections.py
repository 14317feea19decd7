"""Reference pages of YAML files: every key of a pydantic section, with the section's docstring for its meaning."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any

from pydantic import TypeAdapter

Schema = dict[str, Any]
BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, which is its anchor, its values in words, its default in JSON, and its meaning."""

    name: str
    values: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """A section at its first place, ``KEY.NAME`` for one of a mapping, with all places that have the same keys."""

    anchor: str
    places: list[str]
    text: str
    keys: list[Key]


def sections(model: type) -> list[Section]:
    """The file itself, whose place is empty, then all sections below it in the order of their keys."""
    schema = TypeAdapter(model).json_schema()
    defined = schema.get("$defs", {})
    places: dict[str, list[str]] = {}
    _find(schema, "", defined, places)
    links: dict[str, str] = {}
    for name, (first, *_) in places.items():  # a key may be one of two sections
        links[name] = f"{first}-{name.lower()}" if first in links.values() else first
    about = {name: _first_sentence(defined[name].get("description", "")) for name in places}
    rest = [_section(defined[name], links[name], found, links, about) for name, found in places.items()]
    return [_section(schema, "", [""], links, about), *rest]


def _first_sentence(text: str) -> str:
    return re.split(r"\.\s+(?=[A-Z])", " ".join(text.partition("\n\n")[0].split()))[0].rstrip(".")


def _find(schema: Schema, place: str, defined: Schema, places: dict[str, list[str]]) -> None:
    """Collect the places of each definition below a schema, in order."""
    for key, value in schema.get("properties", {}).items():
        for name, suffix in _refers(value):
            below = ".".join(part for part in (place, key, suffix) if part)
            known = name in places
            places.setdefault(name, []).append(below)
            if not known:
                _find(defined[name], below, defined, places)


def _refers(value: Any, suffix: str = "") -> Iterator[tuple[str, str]]:
    """Names of the definitions in the schema of a value, with what stands between the key and them."""
    if "$ref" in value:
        yield value["$ref"].rpartition("/")[2], suffix
    for option in value.get("anyOf", value.get("oneOf", [])):
        yield from _refers(option, suffix)
    if isinstance(value.get("items"), dict):
        yield from _refers(value["items"], suffix)
    if isinstance(value.get("additionalProperties"), dict):
        yield from _refers(value["additionalProperties"], "NAME")


def _section(schema: Schema, anchor: str, places: list[str], links: dict[str, str], about: dict[str, str]) -> Section:
    keys = schema.get("properties", {})
    text, meanings = split(schema.get("description", ""), set(keys))
    found = []
    for key, value in keys.items():
        options = [value, *value.get("anyOf", [])]  # a description may be that of an option beside null
        told = [option["description"] for option in options if "description" in option]
        told += [meanings[key]] if key in meanings else []
        meaning = "; ".join(told or [about[name] for name, _ in _refers(value)][:1])
        name = f"{places[0]}.{key}".lstrip(".")
        found.append(Key(name, words(value, links), _default(key, schema), prose(meaning)))
    return Section(anchor, places, prose(text), found)


def _default(key: str, schema: Schema) -> str:
    if key in schema.get("required", []):
        return "required"
    value = schema["properties"][key]
    if "default" not in value:
        return "the protocol's"  # keys of `Eval` that a protocol gives
    return "its defaults" if value["default"] and "$ref" in value else f"`{json.dumps(value['default'])}`"


def split(docstring: str, keys: set[str]) -> tuple[str, dict[str, str]]:
    """The text of a docstring, and the meaning of each key from its entries ``key, other: meaning``."""
    text: list[str] = []
    meanings: dict[str, str] = {}
    open_keys: list[str] = []
    for line in cleandoc(docstring).splitlines():
        entry = re.match(r"(\w+(?:, \w+)*): (.+)", line)
        if entry and set(entry[1].split(", ")) & keys:
            open_keys = entry[1].split(", ")
            meanings |= {key: f"{meanings[key]} {entry[2]}" if key in meanings else entry[2] for key in open_keys}
        elif open_keys and line.startswith("    "):
            meanings |= {key: f"{meanings[key]} {line.strip()}" for key in open_keys}
        else:
            open_keys = []
            text.append(line)
    return "\n".join(text).strip(), meanings


def prose(text: str) -> str:
    """A docstring's text as Markdown."""
    return text.replace("``", "`")


def words(schema: Schema, links: dict[str, str]) -> str:
    """The values that a JSON Schema allows, in words; sections are links to their anchors."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{re.sub('(?<!^)(?=[A-Z])', ' ', name).lower()}](#{links[name]})"
    if options := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(words(option, links) for option in options)
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`", "null": "`null`",
            "array": "list", "object": "mapping"}.get(schema.get("type", ""), "any value")  # fmt: skip
    if "prefixItems" in schema:
        return f"`[a, b]`, each {words(schema['prefixItems'][0], links)}"
    if isinstance(schema.get("items"), dict):
        kind += f" of {words(schema['items'], links)}"
    if isinstance(schema.get("additionalProperties"), dict):
        kind += f" of names to {words(schema['additionalProperties'], links)}"
    limits = [f"{told} {schema[bound]:g}" for bound, told in BOUNDS.items() if bound in schema]
    if "pattern" in schema:
        limits.append(f"like `{schema['pattern']}`")
    return " ".join([kind, *limits])
