"""Answers on the page: Markdown, code and formulas, while they grow and when they are complete; hostile ones too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from tests.e2e.page.conftest import answered, ask, axe, becomes_true, open_page
from tests.e2e.page.scripted_server import ScriptedServer, scripted_server

RICH = r"""# Sorting

### Merge sort

It takes **n log n** steps, *always*, unlike ~~bubble sort~~ `sorted(x)`; see [this](https://example.com/sort) and
https://example.com/a_b_c.

1. Split the list
   - into *halves*
   - of equal length
2. Merge them:

   ```python
   def merge(a, b):  # two sorted lists
       return sorted(a + b, key=None) or ["none", 1.5]
   ```

| step | cost |
|:-----|-----:|
| split | $O(n)$ |
| merge | \(O(n)\) |

> So the total is
> $$T(n) = 2\,T(n/2) + n$$

and therefore

\[
\begin{aligned}
T(n) &= n \log_2 n \\
- c &> 0
\end{aligned}
\]

A wide one: $a_1 + a_2 + a_3 + a_4 + a_5 + a_6 + a_7 + a_8 + a_9 + a_{10} = \sum_i a_i$ and $5 or $6.

---

```unknown-language
<b>text</b>
```
"""


@pytest.fixture(scope="module")
def drawing(browser: Any) -> Iterator[Any]:
    """A page with `draw(texts, growing)`: a new view, drawn with each text in turn; returns its HTML."""
    with scripted_server() as server:
        context = browser.new_context()
        page = open_page(context, server)
        prepare(page)
        yield page
        context.close()
    assert page.errors == []


def prepare(page: Any) -> None:
    page.evaluate(
        """async () => {
            const { MarkdownView } = await import("/page/text/markdown.js");
            window.box = document.createElement("div");
            window.draw = (texts, growing = false) => {
                window.box.remove();
                window.box = Object.assign(document.createElement("div"), { className: "text" });
                document.getElementById("log").replaceChildren(window.box);
                window.view = new MarkdownView(window.box);
                for (const text of texts) window.view.draw(text, growing);
                return window.box.innerHTML;
            };
        }"""
    )


def html(page: Any, text: str, growing: bool = False) -> str:
    drawn: str = page.evaluate("([text, growing]) => draw([text], growing)", [text, growing])
    return drawn


def shown(page: Any) -> str:
    text: str = page.evaluate("box.textContent")
    return text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a **b** *c* ~~d~~ `e`", "<p>a <strong>b</strong> <em>c</em> <s>d</s> <code>e</code></p>"),
        ("a\nb", "<p>a<br>\nb</p>"),
        ("snake_case_name 2*3*4", "<p>snake_case_name 2<em>3</em>4</p>"),
        ("# A\n### B", '<h2 class="level-1">A</h2><h3 class="level-3">B</h3>'),
        ("3. c\n4. d", '<ol start="3">\n<li>c</li>\n<li>d</li>\n</ol>'),
        ("a <b>c</b> &lt;d&gt;", "<p>a &lt;b&gt;c&lt;/b&gt; &lt;d&gt;</p>"),
        ("[a][1]\n\n[1]: https://b.c", 'href="https://b.c"'),
        ("|a|b|\n|-|:-:|\n|1|2|", '<td class="center">2</td>'),
        ("run main.py on example.com", "<p>run main.py on example.com</p>"),
        ("![a cat](https://b.c/d)", '<a href="https://b.c/d" target="_blank" rel="noopener noreferrer">a cat</a>'),
    ],
)
def test_markdown_becomes_elements(drawing: Any, text: str, expected: str) -> None:
    assert expected in html(drawing, text)


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<svg><style><img src=x onerror=alert(1)></style></svg>",
        "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
        "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](java\tscript:alert(1)) [d](data:text/html,x) [e](//x.y)",
        "[a](&#106;avascript:alert(1)) <javascript:alert(1)> ![a](javascript:alert(1)) [v](vbscript:x) [f](file:///etc)",
        "```\"><img/src=x/onerror=alert(1)>\nx\n```",
        '[a](https://b.c "><img src=x onerror=alert(1)>")',
        "[a](https://b.c/\"onclick=alert(1)//)",
        '| <a href="javascript:alert(1)"> |\n|-|\n| <iframe src=//x> |',
        r"$\href{javascript:alert(1)}{x}$ $\includegraphics{https://x.y/z.png}$ $\htmlData{a=b}{x}$",
        r"$\text{<img src=x onerror=alert(1)>}$ $\htmlId{input}{x}$ $\unicode{<script>}$",
    ],
)
def test_nothing_that_a_model_writes_becomes_active(drawing: Any, text: str) -> None:
    html(drawing, text)
    drawing.wait_for_timeout(150)
    found = drawing.evaluate(
        """[...box.querySelectorAll("*")].flatMap((it) =>
            [it.localName, ...it.getAttributeNames().map((name) => "@" + name)])"""
    )
    assert not {"script", "img", "iframe", "style", "object", "form"} & set(found)
    assert not [name for name in found if name.startswith(("@on", "@src", "@style", "@id", "@xlink"))]
    links = drawing.evaluate("[...box.querySelectorAll('a')].map((it) => it.href)")
    assert not [it for it in links if not it.startswith(("https:", "http:", "mailto:"))]


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("$x^2$ and \\(y\\) and $$z$$ and \\[w\\]", 4),
        ("\\[\na\n= b\n- c\n\\]", 1),
        ("$$\na\n\n$$", 0),
        ("- item\n  $$\n  x\n  $$", 1),
        ("> \\[\n> x\n> \\]", 1),
        ("| $a$ |\n|-|\n| $b$ |", 2),
        ("$5 and $6", 0),
        ("costs $5, or $6.50, not $7", 0),
        ("between $5-$6 or 5$ and 6$", 0),
        ("$5 million in US$", 0),
        ("echo $HOME and $PATH", 0),
        ("$HOME:$PATH", 0),
        ("`$x$` and \\$x\\$ and ``\\(y\\)``", 0),
        ("```\n$x$ \\[y\\]\n```", 0),
        ("    $x$", 0),
        ("$x$th and ($n$), $k$-th", 3),
        ("$ x $ or $$$$ or $ or \\(\\)", 0),
        (r"$\text{a \$5 bill}$", 1),
    ],
)
def test_formulas_are_told_from_prices_and_code(drawing: Any, text: str, formulas: int) -> None:
    html(drawing, text)
    becomes_true(drawing, "!box.querySelector('.formula:not(:has(math))')")
    assert drawing.evaluate("box.querySelectorAll('math').length") == formulas


def test_letters_come_in_the_alphabets_of_the_formula(drawing: Any) -> None:
    html(drawing, r"$\mathbb{R}\mathbb{A}\mathbf{x1}\mathcal{L}\mathfrak{g}\mathsf{S}\mathtt{t}\mathrm{d}$")
    drawing.wait_for_selector("math")
    assert shown(drawing) == "ℝ𝔸𝐱𝟏ℒ𝔤𝖲𝚝d"


@pytest.mark.parametrize(
    "text",
    [r"$\frac{$", r"$$\begin{aligned} a$$", r"\(\undefined\)", r"$\def\a{\a}\a$", r"$x$ then \[ \left( x \]", r"$}$"],
)
def test_invalid_latex_stays_as_its_source(drawing: Any, text: str) -> None:
    html(drawing, text + " $ok$")
    drawing.wait_for_selector("math")
    drawing.wait_for_timeout(100)
    assert text.rpartition("$x$ then ")[2] in shown(drawing)


def test_formulas_that_would_eat_time_or_space_are_given_up(drawing: Any) -> None:
    """The page goes on meanwhile: its own clock ticks, and later formulas are typeset."""
    bombs = [
        r"$\def\a{xxxxxxxxxx}\def\b{\a\a\a\a\a\a\a\a\a\a}\def\c{\b\b\b\b\b\b\b\b\b\b}\def\d{\c\c\c\c\c\c\c\c\c\c}\d\d\d\d\d$",
        r"$\def\a{\a\a}\a$",
        r"$\rule{1000000000em}{1000000000em}$",
        "$" + "{" * 1500 + "x" + "}" * 1500 + "$",
        "$" + "x^{" * 900 + "y" + "}" * 900 + "$",
        "$" + r"\sqrt{" * 500 + "y" + "}" * 500 + "$",
        "$" + "x+" * 100_000 + "x$",
        r"$\Huge\hspace{1e9em}\kern{99999em}\raisebox{9999em}{x}$",
    ]
    html(drawing, "\n\n".join(bombs) + "\n\n$last$")
    longest = drawing.evaluate(
        """async () => {
            let [worst, last] = [0, performance.now()];
            while (!box.lastElementChild.querySelector("math")) {
                await new Promise((done) => setTimeout(done, 5));
                const now = performance.now();
                [worst, last] = [Math.max(worst, now - last), now];
            }
            return worst;
        }"""
    )
    assert longest < 5000
    assert drawing.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert drawing.evaluate("box.querySelectorAll('*').length") < 50_000


def typeset_html(page: Any) -> str:
    """The HTML of what was drawn, once no formula and no colour is missing."""
    becomes_true(
        page,
        """[...box.querySelectorAll(".formula")].every((it) => it.querySelector("math")) &&
        [...box.querySelectorAll("code.language-python")].every((it) => it.querySelector(".hljs-comment"))""",
    )
    page.wait_for_timeout(50)
    text: str = page.evaluate("box.innerHTML")
    return text


def test_a_text_that_grew_equals_one_drawn_at_once(drawing: Any) -> None:
    html(drawing, RICH)
    at_once = typeset_html(drawing)
    drawing.evaluate("""(text) => {
        const prefixes = Array.from({ length: text.length }, (_, i) => text.slice(0, i + 1));
        const now = performance.now;
        performance.now = () => 0;  // no draw seems to take time, so none is left out
        draw(prefixes, true);
        performance.now = now;
        view.draw(text, false);
    }""", RICH)  # fmt: skip
    assert typeset_html(drawing) == at_once


PIECES = [
    "# H\n", "text ", "**bold** ", "*em* ", "`code` ", "$x^2$ ", "\\(y\\) ", "$$z$$ ", "\n", "\n\n", "- item\n",
    "1. one\n", "2. two\n", "  - nested\n", "> quote\n", "```python\nx = 1\n```\n", "```\n", "~~~\n",
    "    code\n", "|", "---\n", "===\n", "| a | b |\n|---|---|\n| 1 | 2 |\n", "[link](https://a.b) ", "[x",
    "](", "https://a.b/c ", "\\[\nq\n\\]\n", "$$\n", "\\[", "<b>", "~~s~~ ", "***", "_", "\\", "1", "2.", "-",
    "word\n", "[r]: https://a.b\n", "[r] ", "$5 ", "`", "**", "$", "é😀",
]  # fmt: skip


def test_a_text_that_grows_is_drawn_as_a_new_one_would_be(drawing: Any) -> None:
    """Only the end is parsed again while it grows; that must not show, at any length of any text."""
    random = Random(14)
    for _ in range(40):
        text = "".join(random.choices(PIECES, k=random.randint(3, 25)))
        different = drawing.evaluate("""([text, step]) => {
            const now = performance.now;
            performance.now = () => 0;
            draw([], true);
            const [growing, grown] = [view, box];
            const compare = (text, more) => {
                growing.draw(text, more);
                draw([text], more);
                const count = (it) => it.querySelectorAll("p, li, h2, pre, td").length;
                const same = grown.textContent === box.textContent && count(grown) === count(box);
                return same ? null : text;
            };
            const lengths = Array.from({ length: text.length / step }, (_, i) => i * step);
            const found = lengths.map((it) => compare(text.slice(0, it), true));
            const last = compare(text, false);
            performance.now = now;
            return [...found, last].find(Boolean) ?? null;
        }""", [text, random.choice([1, 3, 7])])  # fmt: skip
        assert different is None


MARKS = re.compile(r"\*\*|(?<!\w)[*_](?=\w)|`|~~|\]\(|https://example\.com/sort|\|-|\|:|^#|\n[#>=-]")


def test_marks_that_are_still_open_are_never_shown(drawing: Any) -> None:
    text = RICH.split("> So")[0]
    frames = drawing.evaluate("""(text) => {
        const now = performance.now;
        performance.now = () => 0;
        draw([], true);
        const frames = [];
        for (let i = 1; i <= text.length; i++) {
            view.draw(text.slice(0, i), true);
            frames.push([...box.querySelectorAll("figure, .formula, .source")].reduce(
                (all, it) => all.replace(it.textContent, ""), box.textContent));
        }
        performance.now = now;
        return frames;
    }""", text)  # fmt: skip
    assert [frame[-60:] for frame in frames if MARKS.search(frame)] == []


CODE = """| a | b |
|---|
- x
# **c**
[d](e
$f$ and \\[ g
1.
===
`h`
~~~"""


@pytest.mark.parametrize("before", ["", "text\n\n", "- item\n\n  ", "> "])
def test_code_that_grows_is_never_read_as_markdown(drawing: Any, before: str) -> None:
    lead = "\n" + {"- item\n\n  ": "  ", "> ": "> "}.get(before, "")
    text = before + "```text\n".replace("\n", lead) + CODE.replace("\n", lead)
    shown_code = drawing.evaluate("""(text) => Array.from({ length: text.length }, (_, i) => {
        draw([text.slice(0, i + 1)], true);
        return box.querySelector("pre code")?.textContent ?? "";
    })""", text)  # fmt: skip
    assert [it for it in shown_code if not CODE.startswith(it.rstrip("\n"))] == []
    assert shown_code[-1] and html(drawing, text)


def test_what_has_been_drawn_stays_the_same_element_while_the_text_grows(drawing: Any) -> None:
    kept = drawing.evaluate("""async () => {
        draw(["# A\\n\\nfirst **one**\\n\\n- item\\n\\n```python\\nx = 1\\n"], true);
        const before = [box.querySelector("h2"), box.querySelector("strong"), box.querySelector("pre code")];
        await new Promise((done) => setTimeout(done, 300));
        view.draw("# A\\n\\nfirst **one**\\n\\n- item\\n\\n```python\\nx = 1\\ny = 2\\n```\\n\\nThe end", false);
        const after = [box.querySelector("h2"), box.querySelector("strong"), box.querySelector("pre code")];
        return [before.every((it, i) => it === after[i]), after[2].textContent];
    }""")  # fmt: skip
    assert kept == [True, "x = 1\ny = 2"]


def test_a_changed_text_is_drawn_as_new(drawing: Any) -> None:
    drawn = drawing.evaluate("draw(['# A\\n\\none\\n\\ntwo', '# B\\n\\nthree'], true)")
    assert drawn == html(drawing, "# B\n\nthree", growing=True)
    assert drawing.evaluate("draw(['a', ''], false)") == ""


HOSTILE = {
    "brackets": "[" * 10_000,
    "images": "![" * 5000,
    "links": "[a](" * 5000,
    "emphasis": "*a **b _c " * 2000,
    "quotes": ">" * 10_000 + "deep",
    "lists": "".join("  " * i + f"- item {i}\n" for i in range(200)),
    "one line of lists": "- " * 5000 + "deep",
    "columns": "|a" * 3000 + "|\n" + "|-" * 3000 + "|\n" + "|b" * 3000 + "|",
    "rows": "|a|b|\n|-|-|\n" + "|x|y|\n" * 5000,
    "open formulas": "\\[\na\n" * 5000,
    "formulas": "$x$ " * 10_000,
    "dollars": "$$a " * 5000,
    "backticks": "".join("`" * i + "a" for i in range(1, 300)),
    "paragraphs": "a\n\n" * 10_000,
    "words": "word " * 40_000,
    "one word": "a" * 200_000,
    "code": "```python\n" + 'x = """a"""\n' * 17_000,
    "unclosed": "```cpp\n" + 'R"a(' * 10_000,
    "urls": "http://a.b/ " * 3000,
    "definitions": "".join(f"[a{i}]: http://b\n" for i in range(3000)),
    "controls": "\0\u202e\ufeff\u2028" * 5000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_keeps_its_text_and_the_page_goes_on(drawing: Any, name: str) -> None:
    """The limits only tell a freeze from work: each draw takes well under a second on an idle machine."""
    text = HOSTILE[name]
    took = drawing.evaluate("""(text) => {
        const times = [0, 1].map((growing) => {
            const start = performance.now();
            draw([1, 2, 3, 4].map((part) => text.slice(0, text.length * part / 4)), Boolean(growing));
            return performance.now() - start;
        });
        const start = performance.now();
        view.draw(text, false);
        return Math.max(...times, performance.now() - start);
    }""", text)  # fmt: skip
    assert took < 20_000
    if name != "definitions":  # which are not text
        letters = re.sub(r"[^A-Za-z0-9]", "", text).removeprefix("python").removeprefix("cpp")
        assert re.sub(r"[^A-Za-z0-9]", "", shown(drawing)).replace("textpythoncpp", "").endswith(letters[-1000:])


def test_nesting_that_is_too_deep_is_shown_as_source(drawing: Any) -> None:
    html(drawing, HOSTILE["lists"])
    assert "item 0" in shown(drawing) and "item 199" in shown(drawing)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_rich_answer_has_no_violations(page: Any, server: ScriptedServer, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    server.answers = [[RICH]]
    ask(page, "How does merge sort work?")
    answered(page)
    page.wait_for_selector("figure .hljs-comment")
    becomes_true(page, "!document.querySelector('.formula:not(:has(math))')")
    assert axe(page) == []


def test_the_heavy_libraries_are_loaded_when_they_are_needed(page: Any, server: ScriptedServer) -> None:
    loaded: list[str] = []
    page.context.on("request", lambda request: loaded.append(request.url))
    page.reload()
    ask(page, "Hello?")
    answered(page)
    assert f"{server.url}/page/vendor/markdown-it.js" in loaded and "katex" not in str(loaded)
    server.answers = [["A formula: $x$"]]
    ask(page, "Now with a formula.")
    page.wait_for_selector("math")
    assert "katex" in str(loaded) and "highlight" not in str(loaded)
    assert all(it.startswith((server.url, "data:")) for it in loaded)


def test_the_copy_button_copies_the_code(page: Any, server: ScriptedServer) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.answers = [["```python\n", "x = ", "1\n", "```"]]
    ask(page, "Code, please.")
    answered(page)
    page.click("figcaption button")
    page.wait_for_selector("figcaption use[href='#i-done']", state="attached")
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1"
