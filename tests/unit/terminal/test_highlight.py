"""Colours of code blocks on a terminal: the text is unchanged, and what a library does not know is plain."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4_mlx.terminal.highlight import highlighter
from phi4_mlx.terminal.markdown import MarkdownStream
from phi4_mlx.terminal.style import STYLES
from tests.conftest import ROOT
from tests.unit.terminal.test_markdown import plain, render, styles_at

KEYWORD, STRING, NUMBER, COMMENT = (f"\x1b[{STYLES[name]}m" for name in ("keyword", "string", "number", "comment"))


def block(language: str, *lines: str) -> str:
    return render("\n".join([f"```{language}", *lines, "```"]), width=200)


@pytest.mark.parametrize(
    ("language", "line", "word", "style"),
    [
        ("python", "def f(x):", "def", KEYWORD), ("python", "x = 'abc'", "abc", STRING), ("py", "x = 12", "12", NUMBER),
        ("python", "x  # so", "# so", COMMENT), ("Python title=x", "return", "return", KEYWORD),
        ("c++", "int x", "int", KEYWORD), ("js", "const x = 1", "const", KEYWORD), ("sh", "if true", "if", KEYWORD),
        ("json", '{"a": "bcd"}', '"bcd', STRING), ("sql", "SELECT 1", "SELECT", KEYWORD),
        ("swift", "let x = 1", "let", KEYWORD), ("rust", "fn f() {}", "fn", KEYWORD),
        ("php", "echo 1;", "echo", KEYWORD), ("html", "<p>", "p", KEYWORD), ("diff", "+new", "+new", STRING),
        ("yaml", "a: 12", "a", KEYWORD), ("go", "func f()", "func", KEYWORD), ("c", "/* so */ x", "/* so", COMMENT),
    ],
)  # fmt: skip
def test_words_of_a_language_have_colours(language: str, line: str, word: str, style: str) -> None:
    rendered = block(language, line)
    body = rendered.partition("\n")[2]
    assert styles_at(body, word).endswith(style)
    assert plain(rendered).splitlines()[1] == line


@pytest.mark.parametrize(
    ("language", "lines", "style"),
    [
        ("python", ['x = """a', "if so", "of", '"""'], STRING), ("js", ["/* a", "if so", "of", "*/"], COMMENT),
        ("java", ["/** a", "if", "of */"], COMMENT), ("html", ["<!-- a", "if <b>", "of -->"], COMMENT),
        ("go", ["x := `a", "if so", "of`"], STRING), ("css", ["/* a", "if", "of */"], COMMENT),
        ("sh", ["x='a", "if", "of'"], STRING), ("swift", ["/* a", "if", "of */"], COMMENT),
        ("rust", ["/* a", "if", "of */"], COMMENT), ("c", ["/* a", "if", "of */"], COMMENT),
    ],
)  # fmt: skip
def test_a_comment_or_a_string_goes_on_in_the_next_line(language: str, lines: list[str], style: str) -> None:
    rendered = block(language, *lines, "zz")
    body = rendered.partition("\n")[2]
    assert styles_at(body, "if").endswith(style) and styles_at(body, "of").endswith(style)
    assert not styles_at(body, "zz").endswith(style)
    assert plain(rendered).splitlines()[1:-1] == [*lines, "zz"]


@pytest.mark.parametrize("language", ["", "nonsense", "mcschema", "\x00", "../x", "x" * 500, "日本", "{.python}", "-"])
def test_an_unknown_language_is_plain(language: str) -> None:
    assert highlighter(language) is None
    rendered = block(language, "for x in y: 12")
    assert f"{STYLES['code']}mfor x in y: 12\x1b[0m" in rendered


def test_a_line_is_written_when_it_is_whole() -> None:
    written: list[str] = []
    stream = MarkdownStream(written.append, lambda: 80)
    stream.add("```python\nx = 1\ny =")
    assert plain("".join(written)) == "```python\nx = 1\n"
    stream.add(" 2")
    stream.finish()
    assert plain("".join(written)) == "```python\nx = 1\ny = 2\n"


def test_a_very_long_line_is_written_as_it_arrives() -> None:
    written: list[str] = []
    stream = MarkdownStream(written.append, lambda: 80)
    stream.add("```python\nx = '" + "a" * 5000)
    assert plain("".join(written)).count("a") >= 4000
    stream.finish()
    assert plain("".join(written)) == "```python\nx = '" + "a" * 5000 + "\n"


languages = st.sampled_from("python js html sh c go json yaml php diff console pycon text".split())  # noqa: SIM905
lines = st.lists(st.text(alphabet="ab1 \"'`/*<>!-#$\\{}()=:\t日", max_size=30), max_size=6)


@given(languages, lines)
def test_the_text_of_code_is_unchanged(language: str, code: list[str]) -> None:
    colour = highlighter(language)
    assert colour is not None
    assert [plain(colour(line)) for line in code] == code


def test_the_library_is_imported_at_the_first_block_that_names_a_language() -> None:
    code = (
        "import sys; from phi4_mlx.terminal.markdown import MarkdownStream;"
        "stream = MarkdownStream(lambda text: None); stream.add('hi `x`\\n```\\nx\\n```\\n');"
        "before = 'pygments' in sys.modules; stream.add('```python\\n'); print(before, 'pygments' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False True\n", done.stderr
