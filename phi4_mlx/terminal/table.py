"""A Markdown table, laid out in columns."""

from __future__ import annotations

import re

from phi4_mlx.terminal.inline import CODE, LOOKAHEAD, Piece, parse
from phi4_mlx.terminal.style import styled, text_width

TABLE_RULE = re.compile(r"[\s|:-]+")
# Narrower than that of `inline`: only an escaped pipe is part of a formula, any other ends the cell.
FORMULA = r"(?P<formula>\$(?![\s$])(?:\\.|[^$\\|])*(?<=\S)\$(?!\d)|\\\((?:\\[^)]|[^\\|])*\\\))"
CELL_END = re.compile(rf"{FORMULA}|\\[|`]|{CODE}|`+|\|")  # a cell ends where this matches a single pipe


def laid_out(rows: list[str], width: int) -> list[str]:
    """The rows of a table, its columns aligned if they fit."""
    ruled = len(rows) > 1 and TABLE_RULE.fullmatch(rows[1]) is not None
    body = _body(rows, ruled, width)
    widths = [max(map(text_width, column)) for column in zip(*body, strict=True)]
    if not body or sum(widths) + 3 * (len(widths) - 1) > width:
        return [row.strip() for row in rows]
    lines = [
        " │ ".join(cell + " " * (wide - text_width(cell)) for cell, wide in zip(row, widths, strict=True)).rstrip()
        for row in body
    ]
    return [lines[0], styled("─┼─".join("─" * wide for wide in widths), "dim"), *lines[1:]] if ruled else lines


def _body(rows: list[str], ruled: bool, width: int) -> list[list[str]]:
    """The styled cells of a table, as many in each row; none if they cannot fit."""
    if max(map(len, rows)) > LOOKAHEAD:
        return []
    cells = [_cells(row, {"bold"} if ruled and at == 0 else set()) for at, row in enumerate(rows)]
    body = [row for at, row in enumerate(cells) if not (ruled and at == 1)]
    columns = max(map(len, body))
    return [] if 3 * (columns - 1) > width else [row + [""] * (columns - len(row)) for row in body]


def _cells(row: str, styles: set[str]) -> list[str]:
    """The styled cells of a table's row; a pipe that is escaped or in code is text."""

    def part(found: re.Match[str]) -> str:
        return "\n" if found[0] == "|" else found["formula"] or found[0].replace("\\|", "|")

    parted = CELL_END.sub(part, row.strip())
    shown = []
    for cell in parted.removeprefix("\n").removesuffix("\n").split("\n"):
        pieces: list[Piece] = []
        parse(cell.strip(), pieces)
        shown.append("".join(styled(piece.text, *piece.styles | styles) for piece in pieces))
    return shown
