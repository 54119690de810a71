"""Markdown as it arrives: styles, wrapping, and output that only grows."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4_mlx.terminal.markdown import MarkdownStream
from phi4_mlx.terminal.style import text_width

WIDTH = 40
SAMPLE = """# A **title** with `code`

Some *italic*, **bold words**, ***both***, 2 * 3 * 4 and snake_case_name, `a*b` code; then it wraps.

- first
  - nested **item** that is long enough to wrap
10. ten
> a quote that is long enough to wrap around

```python
def f(x):
    return x * 2  # `no` **markup**

```
---
| name | value |
|---|---:|
| **a** | 1 |
| 日本 | 22 |
-5 degrees, --flag, \\*literal\\*, \\(x\\), 3*4
"""

marks = st.sampled_from(["*", "**", "`", "```", "\n", "- ", "# ", "| a |", "|-|", "> ", "1. ", " ", "\\", "word", "日"])
markdown = st.lists(st.one_of(marks, st.text(max_size=5)), max_size=30).map("".join)


def render(text: str, *cuts: int, width: int = WIDTH) -> str:
    written: list[str] = []
    stream = MarkdownStream(written.append, lambda: width)
    for start, end in zip((0, *sorted(cuts)), (*sorted(cuts), len(text)), strict=True):
        stream.add(text[start:end])
    stream.finish()
    return "".join(written)


def plain(rendered: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", rendered)


def styles_at(rendered: str, word: str) -> str:
    """The styles in force where a word begins."""
    before = rendered[: rendered.index(word)]
    return before.rpartition("\x1b[0m")[2]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a **b** c", "a b c\n"),
        ("**b** c", "b c\n"),
        ("**a ** b** c", "a ** b c\n"),
        ("word " + "日" * 20, "word " + "日" * 17 + "\n日日日\n"),
        ("2 * 3 * 4 ** 5", "2 * 3 * 4 ** 5\n"),
        ("snake_case 3*4*5", "snake_case 3*4*5\n"),
        ("`a * b` and ``c ` d``", "a * b and c ` d\n"),
        ("\\*x\\* \\(y\\)", "*x* \\(y\\)\n"),
        ("## T\nx", "T\nx\n"),
        ("#5 and #", "#5 and #\n"),
        ("-5\n--x\n- y", "-5\n--x\n• y\n"),
        ("* y\n+ z\n1) w\n2024", "• y\n• z\n1) w\n2024\n"),
        ("---", "─" * 40 + "\n"),
        ("> q", "│ q\n"),
        ("```sh\nls *.py **x**\n```\n**y**", "```sh\nls *.py **x**\n```\ny\n"),
        ("```\nopen", "```\nopen\n"),
        ("|a|b|\n|-|-|\n|ccc|d|", "a   │ b\n────┼──\nccc │ d\n"),
        ("|a|" + "b" * 60 + "|", "|a|" + "b" * 60 + "|\n"),
        ("", ""),
        ("\n\nx", "\n\nx\n"),
        ("**never closed\nnext", "**never closed\nnext\n"),
        ("use *args and **kwargs", "use *args and **kwargs\n"),
        ("def f(*a, **k)", "def f(*a, **k)\n"),
        ("a pointer *p in C", "a pointer *p in C\n"),
        ("*p = a*b", "*p = a*b\n"),
        ("a*(b + c)*d", "a*(b + c)*d\n"),
        ("2**3 = 8 and more, 3**2 = 9", "2**3 = 8 and more, 3**2 = 9\n"),
        ("a backtick ` and *more", "a backtick ` and *more\n"),
        ("`*open **code** here", "`*open code here\n"),
        ("**one* and two*", "**one* and two*\n"),
        ("`2**3` is `*p`, **x**", "2**3 is *p, x\n"),
        ("`a\\` \\`b\\`", "a\\ `b`\n"),
        ("y `\\`` x", "y ``` x\n"),
        ("\\a*b* **(a)**b", "\\a*b* **(a)**b\n"),
        ("*a **b* c**", "a **b c**\n"),
        ("**API**s of **「日本」**語", "APIs of 「日本」語\n"),
        ("|a|b|\n|-|-|\n|2**3|`**k`|", "a    │ b\n─────┼────\n2**3 │ **k\n"),
        ("|a|b|\n|-|-|\n|`x|y`|*z|", "a   │ b\n────┼───\nx|y │ *z\n"),
        ("|a|b|\n|-|-|\n|x\\|y|`p\\|q`|", "a   │ b\n────┼────\nx|y │ p|q\n"),
        ("|| x | y |\n|-|-|-|\n|r| 1 | 2 |", "  │ x │ y\n──┼───┼──\nr │ 1 │ 2\n"),
        ("|a||\n|-|-|\n||b|", "a │\n──┼──\n  │ b\n"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert plain(render(text)) == shown


def test_styles_are_where_they_belong_and_end() -> None:
    rendered = render("plain *slanted* **strong** `code` after")
    assert [styles_at(rendered, w) for w in ("slanted", "strong", "code", "after")] == [
        "\x1b[3m", "\x1b[1m", "\x1b[36m", ""
    ]  # fmt: skip
    assert "\x1b" not in styles_at(render("**never closed\nnext"), "next")


def test_emphasis_nests() -> None:
    rendered = render("**bold *slanted* `code` text** ***both*** after")
    assert [styles_at(rendered, w) for w in ("bold", "slanted", "code", "text", "both", "after")] == [
        "\x1b[1m", "\x1b[1m\x1b[3m", "\x1b[1m\x1b[36m", "\x1b[1m", "\x1b[1m\x1b[3m", ""
    ]  # fmt: skip


def test_cells_have_styles() -> None:
    rendered = render("|head|*slope*|\n|-|-|\n|**bold**|`code` tail|")
    assert [styles_at(rendered, w).strip("│ \n") for w in ("head", "slope", "bold", "code", " tail")] == [
        "\x1b[1m", "\x1b[1m\x1b[3m", "\x1b[1m", "\x1b[36m", ""
    ]  # fmt: skip


def test_long_lines_break_between_words_and_keep_their_indent() -> None:
    lines = plain(render("- " + "word " * 20)).splitlines()
    assert len(lines) > 2
    assert all(line.startswith("  word") for line in lines[1:])
    assert all(not line.strip("• ").replace("word", "").strip() for line in lines)


def test_a_word_is_shown_as_soon_as_it_is_whole() -> None:
    written: list[str] = []
    stream = MarkdownStream(written.append, lambda: WIDTH)
    stream.add("one two ")
    assert plain("".join(written)) == "one two"


def test_only_text_that_a_mark_may_style_waits_until_it_closes() -> None:
    written: list[str] = []
    stream = MarkdownStream(written.append, lambda: WIDTH)
    shown = []
    for text in ("2 * 3 and *a b", " c", "* d ", "\\<x ", "2**3 ", "`e f ", "g` h "):
        stream.add(text)
        shown.append(plain("".join(written)))
    assert shown == [
        "2 * 3 and", "2 * 3 and", "2 * 3 and a b c d", "2 * 3 and a b c d \\<x", "2 * 3 and a b c d \\<x 2**3",
        "2 * 3 and a b c d \\<x 2**3", "2 * 3 and a b c d \\<x 2**3 e f g h",
    ]  # fmt: skip


@given(markdown, st.lists(st.integers(0, 200), max_size=5))
def test_pieces_come_out_as_the_whole(text: str, cuts: list[int]) -> None:
    cuts = [min(cut, len(text)) for cut in cuts]
    assert render(text, *cuts) == render(text)


openings = st.sampled_from(["a", "b", "_", "2", "\\", " ", " *", " **", " ***", "a*b", "2**2", " * "])
unclosed = st.lists(openings).map("".join)


@given(unclosed, st.sampled_from(["", "`", "``"]), unclosed)
def test_marks_that_never_close_are_shown(start: str, backticks: str, end: str) -> None:
    text = "x" + start + backticks + end
    shown = re.sub(r"\\([_`])", r"\1", re.sub(r"\\\\", "\0", text)).replace("\0", "\\\\")
    rendered = render(text, width=10**6)
    assert plain(rendered) == shown.rstrip(" ") + "\n"
    assert "\x1b" not in rendered


@given(st.text(alphabet="ab *_`2\\"))
def test_a_line_loses_only_marks_and_a_cell_shows_the_same(text: str) -> None:
    shown = plain(render(f"x{text} x", width=10**6))
    assert re.sub(r"[*`\\]", "", shown) == re.sub(r"[*`\\]", "", f"x{text} x\n")
    assert render(f"x{text} x", *range(len(text) + 3), width=10**6) == render(f"x{text} x", width=10**6)
    assert plain(render(f"|x{text} x|", width=10**6)) == shown


@given(markdown)
def test_no_line_is_wider_than_the_terminal(text: str) -> None:
    text = re.sub(r"[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f]", "", text)
    unwrapped = re.search(r"[`|$]|\\[(\[]", text)  # code, tables and formulas are printed as they are
    for line in plain(render(text)).split("\n"):
        assert unwrapped or text_width(line) <= WIDTH or not line.strip()


@pytest.mark.parametrize("mark", ["", "> ", "- ", "10. "])
def test_a_word_longer_than_a_row_fills_each_row(mark: str) -> None:
    *rows, last = plain(render(mark + "x" * 200)).splitlines()
    assert len(rows) >= 4 and all(text_width(row) == WIDTH for row in rows) and text_width(last) <= WIDTH


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="*`\\#|>-+\n\t\r\x1b. )"), max_size=200))
def test_plain_text_loses_nothing(text: str) -> None:
    assert plain(render("x" + text)).replace("\n", "") == "x" + text


def test_only_styles_are_ever_sent() -> None:
    rendered = render(SAMPLE)
    assert "\r" not in rendered
    assert "\x1b" not in plain(rendered)
    assert rendered.count("\x1b[0m") and plain(rendered).endswith("\n")


@pytest.mark.parametrize("mark", ["*", "**", "`", "``"])
def test_a_mark_that_stays_open_for_long_is_text(mark: str) -> None:
    near, far = "word " * 150, "word " * 250
    assert mark not in plain(render(f"{mark}{near}end{mark} after", width=10**6))
    written: list[str] = []
    stream = MarkdownStream(written.append, lambda: 10**6)
    stream.add(mark + far)
    assert plain("".join(written)).startswith(f"{mark}word")  # shown before the line ends
    stream.add(f"end{mark} after\n")
    stream.finish()
    assert plain("".join(written)) == f"{mark}{far}end{mark} after\n"


def test_a_table_of_many_or_long_cells_is_written_as_it_is() -> None:
    for row in ("| a " * 10_000 + "|", "| " + "`a" * 2000 + " | b |", "|a" * 2000 + "\n" + "\n".join(["|b"] * 2000)):
        assert render(row) == row + "\n"


def test_an_indent_as_wide_as_the_terminal_is_written_once() -> None:
    shown = render(" " * 900 + "word " * 100)
    assert shown.startswith(" " * 900) and shown.count(" " * 20) == 900 // 20
