"""Tables that can be pasted into a Markdown file."""

from collections.abc import Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells; columns are as wide as their widest cell, so that it can also be read as it is."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def listed(values: str) -> list[str]:
    """The values of an option that are separated by commas."""
    return [value.strip() for value in values.split(",") if value.strip()]
