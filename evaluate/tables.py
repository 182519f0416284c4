"""A table of texts, for Markdown and for pages."""

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Cells of a header and of the lines below it; the first column is text, others numbers."""

    header: list[str]
    body: list[list[str]]

    def markdown(self) -> str:
        """As Markdown, without a newline at its end."""
        return markdown_table(self.header, self.body)


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table, all columns but the first right-aligned; no newline at its end."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(
        "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
        for cells in (header, rule, *body)
    )
