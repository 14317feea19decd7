"""Reference pages of what is listed in the code: metrics, protocols, claims, columns of the catalogue."""

from typing import Any

import eval.report.rules
from dmd2.experiment.metrics import METRICS, NUMBERS
from dmd2.experiment.protocols import known_protocols
from docs.reference.markdown import anchor, code, page, table
from docs.reference.sections import prose
from eval.catalogue.columns import LOG_SCHEMA, PREFIXES, SCHEMA, SUFFIXES
from eval.catalogue.columns import METRICS as METRIC_COLUMNS
from eval.report.claims import CLAIMS
from eval.report.rules import RULES

CLAIMS_NOTE = (
    "All tests of a claim must hold; the metric stands behind the colon. `distance` is the first Fréchet distance of a "
    "table. C5 and C10 are refuted by more than the reverse: see `eval/report/claims.py`."
)


def metrics() -> str:
    """What ``eval.metrics`` may name, and the numbers that it gives."""
    named = [
        (anchor(m.name), ", ".join(f"`{n}`" for n in m.gives), m.sees, ", ".join(m.needs), code(m.option))
        for m in METRICS.values()
    ]
    numbers = [(f"`{n.name}`", n.label, n.better or "", n.unit, code(n.paper), n.meaning) for n in NUMBERS.values()]
    return page(
        "Metrics",
        "What `eval.metrics` of a base names, or `--metrics` of `dmd2 eval score`.",
        table(("metric", "gives", "computed from", "needs", "option"), named),
        "## Numbers",
        "The keys of `metrics.json`, of tables and of the catalogue.",
        table(("number", "label", "better", "unit", "in place of", "meaning"), numbers),
    )


def protocols() -> str:
    """Every published protocol."""
    blocks = ["What a published number depends on besides the images: `eval.protocol` of a base, `--protocol NAME`."]
    for name, protocol in known_protocols().items():
        values = protocol.model_dump(mode="json", exclude={"name"}, exclude_none=True)
        blocks += [f"## {name}", table(("key", "value"), ((f"`{k}`", _listed(value)) for k, value in values.items()))]
    return page("Protocols", *blocks)


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def claims() -> str:
    """The paper's claims with their tests, and the rules of these."""
    blocks = [prose(str(eval.report.rules.__doc__))]
    blocks += [table(("rule", "judges"), ((f"`{n}`", prose(str(rule.__doc__))) for n, rule in RULES.items()))]
    rows = [
        (
            f"**{name}**{{ #{name.lower()} }}",
            c.claim,
            c.paper,
            "; ".join(f"`{t.a}` {t.rule} `{t.b}`: {t.metric}" for t in c.tests),
        )
        for name, c in CLAIMS.items()
    ]
    return page("Claims and rules", *blocks, "## Claims", CLAIMS_NOTE, table(("claim", "says", "paper", "test"), rows))


def catalogue() -> str:
    """Every column of the catalogue of results, and of the logs."""
    blocks = ["What `dmd2 catalogue` writes, and `eval.catalogue.read.catalogue` returns: one line for each snapshot."]
    ends = {f"NAME_{suffix}": about for suffix, about in SUFFIXES.items()}
    rest = {f"{prefix}NAME": about for prefix, about in PREFIXES.items()}
    parts = {"Columns": SCHEMA, "Metrics": METRIC_COLUMNS | ends, "Settings": rest, "Logs": LOG_SCHEMA}
    for title, columns in parts.items():
        rows = ((f"`{name}`", c.type, c.unit, c.meaning) for name, c in columns.items())
        blocks += [f"## {title}", table(("column", "type", "unit", "meaning"), rows)]
    return page("Catalogue", *blocks)
