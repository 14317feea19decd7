"""Bases that say only what differs from another one: ``like: digits``; imports no torch.

Sections are merged key by key. Lists are replaced as a whole, and so are networks and the samplers of teachers, and a
source or sampler whose kind or solver is written: their other keys belong to the kind that they replace.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dmd2.core.errors import UserError
from dmd2.experiment.teacher_config import OF_RUN
from dmd2.experiment.yaml_file import Place, read_named

Values = dict[str, Any]
LIKE = "like"
WHOLE = ("network", "teacher_samplers")  # sections that are replaced
KIND = ("kind", "solver")  # keys that make another one of a source or a sampler
REQUIRED = ("required", "anyOf")  # of a section's JSON Schema: which keys it needs


def read_base(name: str, folder: Path) -> tuple[Values, Place]:
    """The values of a base over those of the bases that it is like, and where each is written.

    Raises:
        UserError: a file is missing or no YAML, or `like` names no base or leads back.
    """
    return _read(name, folder, ())


def _read(name: str, folder: Path, heirs: tuple[str, ...]) -> tuple[Values, Place]:
    values, place = read_named("base", name, folder)
    if LIKE not in values:
        return values, place
    origin = values.pop(LIKE)
    if not isinstance(origin, str):
        raise UserError(f"{place.where(LIKE)}: like: give the name of one base, not {origin!r}")
    chain = (*heirs, name)
    if origin in chain:
        told = f"like leads in a circle: {' like '.join([*chain[chain.index(origin) :], origin])}"
        raise UserError(f"{place.where(LIKE)}: {told}; write one of these bases in full")
    try:
        inherited, of_origin = _read(origin, folder, chain)
    except UserError as error:
        told = str(error)
        raise UserError(f"{place.where(LIKE)}: like: {told}" if told.startswith("there is no base") else told) from None
    merged = _merged(inherited, values)
    replaced = tuple(_replaced(inherited, values))
    lines = {key: line for key, line in of_origin.lines.items() if not _below(key, replaced)}
    return _named(name, merged, inherited, values), Place(place.file, lines | place.lines)


def _merged(base: Any, over: Any, key: str = "") -> Any:
    """`over` on `base`: a section is merged, unless it is one to be replaced as a whole."""
    if not _merges(base, over, key):
        return over
    return {**base, **{name: _merged(base.get(name), value, name) for name, value in over.items()}}


def _merges(base: Any, over: Any, key: str) -> bool:
    both = isinstance(base, dict) and isinstance(over, dict)
    return both and key not in WHOLE and not any(kind in over for kind in KIND)


def _replaced(base: Any, over: Any, path: str = "", key: str = "") -> Iterator[str]:
    """Dotted keys of what `over` replaces in `base`."""
    if not _merges(base, over, key):
        yield path
        return
    for name, value in over.items():
        yield from _replaced(base.get(name), value, f"{path}.{name}" if path else name, name)


def _below(key: str, sections: tuple[str, ...]) -> bool:
    return any(key.startswith(f"{section}.") for section in sections)


def _named(name: str, values: Values, base: Values, written: Values) -> Values:
    """`values` with names of their own for what is no longer that of the base that it is like.

    Sets, teachers and pipelines are shared by their names. One that changed gets the name of the new base, unless its
    name is written; the evaluation then follows from the set of the other base to the new one.
    """
    data, teacher, text = (_at(values, *path) for path in (("data",), ("teacher",), ("data", "text")))
    old_data, old_teacher = _at(base, "data"), _at(base, "teacher")
    other_data = _differ(data, old_data)
    other_teacher = _differ(teacher, old_teacher, *OF_RUN) or (other_data and teacher.get("train") is not None)
    pipeline, old_pipeline = (_at(of, "data", "text", "pipeline") for of in (values, base))
    # What a pipeline made here learns from: a pipeline that is brought keeps its name, that of its folder.
    learned = pipeline.get("autoencoder") and any(data.get(k) != old_data.get(k) for k in ("source", "resolution"))
    if pipeline.get("encoder") and (learned or _differ(pipeline, old_pipeline)):
        text = {**text, "pipeline": _renamed(pipeline, name, _at(written, "data", "text", "pipeline"))}
        data = {**data, "text": text}
    if other_data:
        data = _renamed(data, name, _at(written, "data"))
    if other_teacher:
        teacher = _renamed(teacher, name, _at(written, "teacher"))
    found = {**values, **{key: part for key, part in (("data", data), ("teacher", teacher)) if part}}
    measured, old, new = _at(values, "eval"), old_data.get("name"), data.get("name")
    if measured and isinstance(old, str) and isinstance(new, str) and old != new:
        found["eval"] = _follows(measured, _at(written, "eval"), old, new)
    return found


def _follows(measured: Values, written: Values, old: str, new: str) -> Values:
    """The eval section with the set `new`, or a model of it, where that of `old` is inherited."""
    models = {old: new, f"{old}-classifier": f"{new}-classifier", f"{old}-clip": f"{new}-clip"}
    for key in ("reference", "detector", "clip"):
        if key not in written and str(measured.get(key)) in models:
            measured = {**measured, key: models[measured[key]]}
    patch = measured.get("patch")
    if isinstance(patch, dict) and "reference" not in _at(written, "patch") and patch.get("reference") == old:
        measured = {**measured, "patch": {**patch, "reference": new}}
    return measured


def _renamed(section: Values, name: str, written: Values) -> Values:
    return section if "name" in written else {**section, "name": name}


def _differ(a: Values, b: Values, *besides: str) -> bool:
    """Whether two sections differ in more than their names."""
    keys = (a.keys() | b.keys()) - {"name", *besides}
    return any(a.get(key) != b.get(key) for key in keys)


def _at(values: Any, *path: str) -> Values:
    """The section at a path; empty where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def for_editors(schema: Mapping[str, Any]) -> Values:
    """The JSON Schema of a base that may be like another one, given that of a complete base.

    With ``like`` no key is required; without, those of the base and of its sections are, and deeper ones are told when
    the base is read.
    """
    defined: dict[str, Values] = schema["$defs"]
    refers = {key: part["$ref"].rpartition("/")[2] for key, part in schema["properties"].items()}
    complete = {key: {k: v for k, v in defined[name].items() if k in REQUIRED} for key, name in refers.items()}
    sections = {name: {k: v for k, v in of.items() if k not in REQUIRED} for name, of in defined.items()}
    like = {"type": "string", "description": "Another base: this one says only what differs from it."}
    rest = {key: value for key, value in schema.items() if key not in ("$defs", "properties", "required")}
    return {
        **rest,
        "$defs": sections,
        "properties": {LIKE: like, **schema["properties"]},
        "if": {"not": {"required": [LIKE]}},
        "then": {"required": schema["required"], "properties": complete},
    }
