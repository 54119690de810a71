"""Colours for code on a terminal, a line at a time as it arrives.

A line is lexed alone, or after the line that opened the comment or the string which it continues: the lines between
change nothing, and the work per line is bounded.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from phi4_mlx.terminal.style import styled

if TYPE_CHECKING:
    from pygments.lexer import Lexer
    from pygments.token import _TokenType

# By the beginning of a token's type; the longest that fits counts. Names and punctuation keep the terminal's colour.
COLOURS = {
    "Keyword": "keyword", "Operator.Word": "keyword", "Name.Tag": "keyword", "Literal.String": "string",
    "Literal.Number": "number", "Name.Builtin": "number", "Name.Attribute": "number", "Keyword.Constant": "number",
    "Comment": "comment", "Comment.Preproc": "keyword", "Name.Function": "name", "Name.Class": "name",
    "Generic.Deleted": "removed", "Generic.Inserted": "added", "Generic.Heading": "name", "Generic.Subheading": "name",
}  # fmt: skip
# Marks that some lexers take for operators until their end is there.
ENDS = {"/*": "*/", "<!--": "-->", "`": "`", "'": "'"}
EXPONENTIAL = ("mcschema",)  # its lexer takes for ever over some lines
LANGUAGE = re.compile(r"[\w+#.-]{1,40}")

Tokens = list[tuple["_TokenType", str]]


def highlighter(info: str) -> Highlighter | None:
    """The highlighter of a code block, or None for a language that is not known.

    Args:
        info: the text after the fence, which begins with the language.
    """
    named = LANGUAGE.match(info.strip())
    if named is None or named[0].lower() in EXPONENTIAL:
        return None
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        # Unchanged text; PHP without its opening tag, other lexers ignore the option.
        return Highlighter(get_lexer_by_name(named[0], stripnl=False, ensurenl=False, startinline=True))
    except ClassNotFound:
        return None


class Highlighter:
    """Colours the lines of one code block, in their order."""

    def __init__(self, lexer: Lexer) -> None:
        self._lexer = lexer
        self._opening = ""  # the line that opened the comment or string in which the next line begins

    def __call__(self, line: str) -> str:
        """The line with its colours; without them, it is unchanged.

        Args:
            line: without its line break.
        """
        before, text = self._opening, f"{self._opening}{line}\n"
        tokens, goes_on = self._lex(text)
        if goes_on is None:
            self._opening = ""
        elif not before or self._lex(f"{line}\n")[1] == goes_on:
            self._opening = f"{line}\n"
        if "".join(value for _, value in tokens)[: len(text)] != text:
            return line
        return _coloured(tokens, len(before), len(text) - 1)

    def _lex(self, text: str) -> tuple[Tokens, str | None]:
        """The tokens, and the style of the last one if it is a comment or a string that the next line continues."""
        for opener, end in ENDS.items():
            if opener in text:
                tokens = self._tokens(text + end)
                if tokens and (kind := _continued(tokens[-1][0])) and len(tokens[-1][1]) > len(end):
                    return tokens, kind
        tokens = self._tokens(text)
        return tokens, _continued(tokens[-1][0]) if tokens else None

    def _tokens(self, text: str) -> Tokens:
        return [(kind, value) for _, kind, value in self._lexer.get_tokens_unprocessed(text) if value]


def _continued(token: _TokenType) -> str | None:
    """The style of a token that may go on in the next line."""
    kind = _kind(token)
    return kind if kind in ("comment", "string") else None


def _kind(token: _TokenType) -> str | None:
    """The style of a token's type."""
    name = str(token).removeprefix("Token.")
    while name and name not in COLOURS:
        name = name.rpartition(".")[0]
    return COLOURS.get(name)


def _coloured(tokens: Tokens, start: int, end: int) -> str:
    """The characters from `start` to `end` of the text of some tokens, in their colours."""
    shown, at = [], 0
    for kind, value in tokens:
        part = value[max(0, start - at) : max(0, end - at)]
        at += len(value)
        style = _kind(kind)
        shown.append(styled(part, style) if style and not part.isspace() else part)
    return "".join(shown)
