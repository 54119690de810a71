"""LaTeX formulas on a terminal: no mark within one is Markdown, none is wrapped, and a price is no formula."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4_mlx.terminal.markdown import MarkdownStream
from tests.unit.terminal.test_markdown import plain, render

FORMULAS = [
    "$E = m*c*c$", "$a_1 * b_1 * c$", "$**x**$", "$`x`$", r"$\_a\*b\#c$", r"$x\$y*z*w$", "$5 x * 3 * y$", "$2$", "$x$",
    r"$\text{total of all parts} * a * b$", r"$f(x)*g*h$", "$$a*b*c$$", "$$ a * b * c $$", r"\(a*b*c\)", r"\( **a** \)",
    r"\[a*b*c\]", r"\[ \sum_{i=1}^n x_i \]", r"\(\_\)", r"$\{a*b*c\}$", r"$a \\ b*c*d$", r"\[a \\[2pt] b*c*d\]",
    "$日*本*語$", "$a|b$",
]  # fmt: skip


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(
    "around", ["{}", "so {} is", "**so {} is**", "- {}", "# {}", "> {}", "({}), *a* b", "*a* {}."]
)
def test_a_formula_is_left_as_it_is(formula: str, around: str) -> None:
    marks = str.maketrans("", "", "*") if "*" in around else {}
    expected = around.format("@").translate(marks).replace("- ", "• ").removeprefix("# ").replace("> ", "│ ")
    assert plain(render(around.format(formula), width=200)) == expected.replace("@", formula) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        "$5 and *a* $10", "*a* for $5, or $6", "US$5 and *a* US$6", "$5-$10 *a*", "from $5 to *a*",
        "$20,000 *a* and $30",
        "$ 5 *a* $", "a $ b *a* c $ d", "$HOME and $PATH_A are *a*", "echo $$ *a*", "$$$ *a*", "$", "$*a*",
        "it is $5 *a*\n\nand $6", "$12.50/month *a* or $99/year",
    ],
)  # fmt: skip
def test_a_price_is_text(text: str) -> None:
    assert plain(render(text, width=200)) == text.replace("*a*", "a") + "\n"


def test_an_escaped_dollar_is_a_dollar() -> None:
    assert plain(render(r"\$5 *a* \$6")) == "$5 a $6\n"


@pytest.mark.parametrize(
    "formula",
    [
        "$$\na*b*c\n$$", "$$\n- a\n# b\n| c |\n> d\n1. e\n---\n$$", "\\[\n a * b * c\n\\]",
        "so \\[ x*y*z\n = w \\] and", "$x^2 +\n y*z*w$ and", "\\(a +\n b*c*d\\), so",
        "then $$\n\\begin{aligned}\n a &= b*c*d \\\\\n\\end{aligned}\n$$ so",
        "  $$\n  a*b*c\n  $$", "$$ a*b*c\n$$",
    ],
)  # fmt: skip
def test_a_formula_of_several_lines_is_left_as_it_is(formula: str) -> None:
    assert plain(render(f"{formula}\n*a* b", width=200)) == f"{formula}\na b\n"


def test_a_formula_in_a_list_or_a_quote_may_have_several_lines() -> None:
    assert plain(render("- so $$\n  a*b*c\n  $$ *a*\n- b")) == "• so $$\n  a*b*c\n  $$ a\n• b\n"


@pytest.mark.parametrize("opener", ["$$", "\\[", "\\(", "$x^2 +", "$$\\alpha"])
def test_a_formula_that_never_closes_ends_at_an_empty_line_or_a_fence(opener: str) -> None:
    assert plain(render(f"{opener}\n- a\n\n- *b*")) == f"{opener}\n- a\n\n• b\n"
    assert plain(render(f"{opener}\n```\nx\n```\n- *b*")) == f"{opener}\n```\nx\n```\n• b\n"


@pytest.mark.parametrize("formula", ["$a + b + c$", r"\(a + b + c\)", "$$a + b + c$$", r"\[a + b + c\]"])
def test_a_formula_is_not_wrapped(formula: str) -> None:
    for before in range(40):
        shown = plain(render("x" * before + f" {formula}, and so on"))
        assert formula + "," in shown
    long = formula.replace("b", " + ".join("b" * 40))
    assert long in plain(render(f"word {long} word"))


def test_a_cell_keeps_its_formulas() -> None:
    shown = plain(render("|a|b|\n|-|-|\n|$x*y*z$|$\\|v\\|*w*w$|\n|\\(\\|v\\|*w*\\)|$5|"))
    assert shown.splitlines()[2:] == ["$x*y*z$      │ $\\|v\\|*w*w$", "\\(\\|v\\|*w*\\) │ $5"]
    assert plain(render("|$5|$6|\n|$a|$b|")) == "$5 │ $6\n$a │ $b\n"


def test_a_price_is_shown_before_its_line_ends() -> None:
    written: list[str] = []
    stream = MarkdownStream(written.append, lambda: 200)
    for text, shown in (("I pay $5 ", "I pay"), ("and then ", "I pay $5 and then"), ("$x", "I pay $5 and then")):
        stream.add(text)
        assert plain("".join(written)) == shown
    stream.add("$ so ")
    assert plain("".join(written)) == "I pay $5 and then $x$ so"


pieces = st.sampled_from([*"$a *`\n{}5^\\|", "$$", "\\(", "\\)", "\\[", "\\]", "word "])


@given(st.lists(pieces, max_size=25).map("".join), st.lists(st.integers(0, 60), max_size=4))
def test_no_dollar_is_lost_and_pieces_come_out_as_the_whole(text: str, cuts: list[int]) -> None:
    whole = render(text)
    assert render(text, *[min(cut, len(text)) for cut in cuts]) == whole
    assert plain(whole).count("$") == text.count("$")
