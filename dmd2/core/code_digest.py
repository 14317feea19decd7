"""A digest of each module whose code makes the numbers of a training; needs no torch.

The modules are found by following imports from `START`. The digest is of their syntax without comments, docstrings,
annotations, formatting, the wording of errors and the places that names are imported from, so that moving a file
changes nothing.
"""

import ast
import hashlib
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = __name__.partition(".")[0]
ROOT = Path(str(sys.modules[PACKAGE].__file__)).parents[1]
START = f"{PACKAGE}.training.trainer"
AROUND = f"{PACKAGE}.core.precision"  # what a job sets up around the trainer, which does not import it
# Modules, by the last part of their name, that imports reach but that have no part in the numbers: they read and write
# files (whose content is part of a run's key), prepare sets, check or digest settings, or print.
NO_PART = {
    "checkpoint", "cluster", "code_digest", "dotted_keys", "errors", "eval_config", "files", "inheritance",
    "interfaces", "interrupts", "network", "parts", "prepare", "progress", "provenance", "record", "retraining", "run",
    "run_inputs", "section", "slurm_queue", "sources", "thread", "transformers", "upload", "yaml_file",
}  # fmt: skip
RENAMED = {"network_checks": "network", "encode": "prepare", "checkpoint_parts": "parts"}
SKIPPED = {"annotation", "returns", "type_comment", "type_params", "type_ignores", "kind", "ctx", "simple", "level"}
SETTINGS = ("Section", "TrainConfig")  # bases of sections of a configuration
Modules = Mapping[str, str]


@cache
def modules_of(start: str = START) -> dict[str, str]:
    """Digest of every module that has a part in the numbers of `start`, by dotted name."""
    found: dict[str, str] = {}
    waiting = [start, AROUND]
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if name in found or path is None or _without_part(name):
            continue
        tree = ast.parse(path.read_bytes())
        found[name] = digest_of_code(tree)
        waiting += sorted(_imported(tree))
    return dict(sorted(found.items()))


def digest_of_code(tree: ast.Module) -> str:
    """Eight hex digits of the syntax of a module, equal in all versions of Python that parse it alike."""
    words: list[str] = []
    _spell(tree, words)
    words += sorted(set(_names(tree)))
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]


def differing(old: Modules, new: Modules) -> list[str]:
    """Files of the modules whose code differs between two records; a module that only moved does not differ."""
    ours, theirs = set(old.values()), set(new.values())
    names = {name for name, digest in old.items() if digest not in theirs}
    names |= {name for name, digest in new.items() if digest not in ours}
    return [name.replace(".", "/") + ".py" for name in sorted(names) if not _without_part(name)]


def _without_part(module: str) -> bool:
    """Whether a module has no part in the numbers; `RENAMED` maps names in records of earlier versions."""
    name = module.rpartition(".")[2]
    return RENAMED.get(name, name) in NO_PART


def _file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return path if path.exists() else None


def _imported(tree: ast.Module) -> set[str]:
    """Everything of this package that may be a module, in functions too: ``from a import b`` may mean ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE}
    return found


def _names(tree: ast.Module) -> list[str]:
    """The names that are imported, with their module only where it is not ours."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            ours = (node.module or "").split(".")[0] == PACKAGE
            found += [f"{'' if ours else node.module} {alias.name} {alias.asname}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [f"{alias.name} {alias.asname}" for alias in node.names if alias.name.split(".")[0] != PACKAGE]
    return found


def _spell(value: Any, words: list[str]) -> None:
    """Append the syntax below a node, as words."""
    if isinstance(value, list):
        words.append("[")
        for item in value:
            if not _silent(item):
                _spell(item, words)
        words.append("]")
    elif isinstance(value, ast.AST):
        words.append(type(value).__name__)
        if isinstance(value, ast.Raise):
            return
        settings = isinstance(value, ast.ClassDef) and any(
            isinstance(base, ast.Name) and base.id in SETTINGS for base in value.bases
        )
        for name, part in ast.iter_fields(value):
            if name in SKIPPED or part is None or part == []:
                continue
            words.append(name)
            _spell(_methods(part) if settings and name == "body" else part, words)
    else:
        words.append(repr(value))


def _silent(node: Any) -> bool:
    """Whether a statement adds nothing here: an import (see `_names`) or a string that stands alone."""
    alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return alone or isinstance(node, ast.Import | ast.ImportFrom)


def _methods(body: list[ast.stmt]) -> list[ast.stmt]:
    """Methods of a class of settings but its validators: the digest of a run's settings covers keys and checks."""
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    return [node for node in functions if not any("validator" in ast.dump(d) for d in node.decorator_list)]
