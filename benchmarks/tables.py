"""Tables that can be pasted into a Markdown file, and options with several values."""

from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells; columns are as wide as their widest cell, so that it can also be read as it is."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    padded = [[cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] for cells in [head, *rows]]
    first, *others = map(line, padded)
    return "\n".join([first, rule, *others])


def line(cells: Iterable[str]) -> str:
    """One row."""
    return "| " + " | ".join(cells) + " |"


def listed(values: str) -> list[str]:
    """The values of an option that are separated by commas."""
    return [value.strip() for value in values.split(",") if value.strip()]
