"""Time against length of all that reads a client's or the model's text: four times the text, four times the time.

Work that grows with the square takes 16 times as long. The bound of 9 leaves room for caches and for n log n; the time
is this thread's processor time, the least of several runs, so that a busy machine does not fail the tests.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from phi4_mlx.bridge.__main__ import Lines
from phi4_mlx.chat import transcript
from phi4_mlx.chat.conversation import Conversation
from phi4_mlx.generation.answer import AnswerAssembler
from phi4_mlx.generation.stop_strings import StopStrings
from phi4_mlx.generation.stream import AnswerText
from phi4_mlx.server.apis.fields import read_body
from phi4_mlx.server.apis.wire import sse
from phi4_mlx.terminal.markdown import MarkdownStream
from phi4_mlx.terminal.printable import one_line, printable
from phi4_mlx.tokens.chat_format import CHAT_FORMATS
from phi4_mlx.tokens.tokenizer import Tokenizer, load_tokenizer
from phi4_mlx.tokens.white_space import longest_run_exceeds
from phi4_mlx.tools.calls import NotACall, parse_calls
from phi4_mlx.tools.parser import ToolCallParser
from tests.char_tokenizer import OneCharDecoder
from tests.conftest import DATA

N = 4000  # characters of the shorter text
BOUND = 9.0  # times the time for four times the text
ENOUGH_S = 0.002  # less than this is not told from noise

Reader = Callable[[str], object]

CALL = '{"name": "f", "arguments": {"a": 1}}'
UNITS = [
    "a", "A", "aA", " ", "\n", "\t", "\r\n", "7", "\\", '"', "'", "[", "{", "(", "`", "|", "*", "_", "#", ">", "-",
    "<|", "\u0301", "a\u0301", "\u200d", "\U0001f468\u200d", "漢", "\U0001f600", "\u3000", "\x00", "\ufeff", "\ud83d",
    "word ", "<|end|>", "<|tool_call|>", "<|tool_call|>[", f"<|tool_call|>[{CALL}]<|/tool_call|>",
    f"functools[{CALL}]", f"[TOOL_REQUEST]{CALL}[END_TOOL_REQUEST]", "functools[", f"[{CALL},", '{"a":', "[1,",
    '"\\u', "1e", "```json\n", "```\n", "| a ", "|a|b|\n", "|`a|", "\\|", "*a", "*a*", "**a ", "***a", "**a *b** c* ",
    "`a", "``a`", "*`a**b``c", "- a\n", "  - a\n", "> ", "1. ", "[a](b) ", "~~", "<a>", "&amp;", "a_b", "\x1b[1m",
    "---", "aab", "$", "$a", "$a$", "$a ", "$$", "$$a", "$5 ", "$x^2 ", "\\(", "\\(a\\)", "\\[a ", "a\\]", "\\$",
    "${", "|$a|\n",
    "```python\nx = 1 # a\n", '```python\n"""\n', "```js\n/*\n", "```html\n<!-- a\n<a>\n", "```sh\n'a\n",
]  # fmt: skip


def growing(mark: str) -> Callable[[int], str]:
    """Runs of 1, 2, 3, ... marks: none of them closes another."""

    def text(n: int) -> str:
        parts: list[str] = []
        for run in count(1):
            parts.append(mark * run + "a ")
            n -= run + 2
            if n < 0:
                return "".join(parts)
        raise AssertionError

    return text


def repeated(unit: str) -> Callable[[int], str]:
    return lambda n: (unit * (n // len(unit) + 1))[:n]


def code(language: str, line: str) -> Callable[[int], str]:
    return lambda n: f"```{language}\n" + line * (n // len(line))


CODE = [
    ("python", "def f(x): return 'a' # b\n"), ("python", '"""a\n'), ("python", "(" * 50 + "\n"), ("js", "/* a\n"),
    ("js", "`a ${b\n"), ("js", "a"), ("html", "<!-- a\n"), ("sh", "'a\n"), ("sh", "`"), ("diff", "-a\n"),
]  # fmt: skip
SHAPES: dict[str, Callable[[int], str]] = {
    **{ascii(unit): repeated(unit) for unit in UNITS},
    **{f"growing {mark}": growing(mark) for mark in "`*|<["},
    "half spaces": lambda n: " " * (n // 2) + "b " * (n // 4),
    "runs of spaces": lambda n: (" " * (n // 8) + "a") * 8,
    "a wide row, then many": lambda n: "|a" * (n // 4) + "\n" + "|b\n" * (n // 6),
    "deeper lists": lambda n: "".join(" " * (at % 20) + "- a\n" for at in range(n // 14)),
    **{f"code in {language}: {line!a}": code(language, line) for language, line in CODE},
    "a formula of many lines": lambda n: "$$\n" + "a*b\n" * (n // 4),
    "nested": lambda n: "[" * (n // 2) + "]" * (n // 2),
    "a long call": lambda n: f'<|tool_call|>[{{"name": "f", "arguments": {{"a": "{"x" * n}"}}}}]',
    "many arguments": lambda n: json.dumps({"name": "f", "arguments": {f"k{at}": at for at in range(n // 8)}}),
}


def pieces(text: str, size: int = 3) -> Iterator[str]:
    return (text[at : at + size] for at in range(0, len(text), size))


def seconds(read: Reader, text: str) -> float:
    start = time.thread_time()
    read(text)
    return time.thread_time() - start


def grows_too_fast(read: Reader, shape: Callable[[int], str], n: int = N) -> str:
    """The figures if the time grows faster than the text, else nothing; measures again before it says so."""
    short, long = shape(n), shape(4 * n)
    least = [float("inf"), float("inf")]
    for _ in range(6):
        least = [min(least[0], seconds(read, short)), min(least[1], seconds(read, long))]
        if least[1] < ENOUGH_S or least[1] < BOUND * least[0]:
            return ""
    return f"{1000 * least[0]:.1f} ms, {1000 * least[1]:.1f} ms"


def stream_parser(text: str) -> None:
    parser = ToolCallParser(["f"])
    for piece in pieces(text):
        parser.add(piece)
    parser.finish()


def whole_parser(text: str) -> None:
    parser = ToolCallParser(["f"])
    parser.add(text)
    parser.finish()


def assembler(text: str) -> None:
    answer = AnswerAssembler(["f"])
    for piece in pieces(text):
        answer.add(piece)
        assert answer.calls is not None
    answer.finish()


def thoughts(text: str) -> None:
    answer = AnswerAssembler((), thinks=True)
    for piece in pieces(f"<think>{text}</think>{text}"):
        answer.add(piece)
        answer.new_thought()
    answer.finish()


def calls(text: str) -> None:
    with contextlib.suppress(NotACall):
        parse_calls([text], {"f": None}, whole=False)


def stops(*strings: str) -> Reader:
    def read(text: str) -> None:
        answer = AnswerText(OneCharDecoder(), list(strings))
        for char in text:
            if answer.add(ord(char) + 10)[1]:
                break
        answer.finish()

    return read


def long_stop(text: str) -> None:
    """A stop string as long as half of the text, whose last character never comes."""
    stops(text[: len(text) // 2] + "\x07")(text)


def markdown(text: str) -> None:
    stream = MarkdownStream(lambda _: None, lambda: 80)
    for piece in pieces(text):
        stream.add(piece)
    stream.finish()


def markdown_whole(text: str) -> None:
    stream = MarkdownStream(lambda _: None, lambda: 80)
    stream.add(text)
    stream.finish()


def body(text: str) -> None:
    content = text.encode("utf-8", "replace").decode()
    message = {"role": "user", "content": content}
    raw = json.dumps({"messages": [message], "stop": [content]}).encode()
    read_body(json.loads(raw))
    sse({"delta": content})


def bridge_line(text: str) -> None:
    Lines(io.BytesIO()).read(io.BytesIO(text.encode("utf-8", "replace")))


READERS: dict[str, Reader] = {
    "parser, streamed": stream_parser,
    "parser, whole": whole_parser,
    "assembler": assembler,
    "thoughts": thoughts,
    "calls": calls,
    "stop strings": stops("zzz", "<|end|>", "aab", "\n\n\n#"),
    "a long stop string": long_stop,
    "Markdown, streamed": markdown,
    "Markdown, whole": markdown_whole,
    "printable": lambda text: (printable(text), one_line(text)),
    "body": body,
    "lines of the bridge": bridge_line,
}


@pytest.fixture(scope="module", params=["tiny_tokenizer", "tiny_sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found = load_tokenizer(DATA / request.param)
    found.chat_format = CHAT_FORMATS["phi4-mini" if request.param == "tiny_tokenizer" else "phi3.5-mini"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_readers_of_text_take_time_in_proportion_to_its_length(reader: str) -> None:
    slow = {name: why for name, shape in SHAPES.items() if (why := grows_too_fast(READERS[reader], shape))}
    assert not slow


@pytest.mark.slow
def test_a_tokenizer_takes_time_in_proportion_to_the_length(tokenizer: Tokenizer) -> None:
    def rendered(text: str) -> None:
        tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": text}]))

    def trusted(text: str) -> None:
        tokenizer.encode(text, specials=True)

    for read in (tokenizer.encode, trusted, rendered):
        assert not {name: why for name, shape in SHAPES.items() if (why := grows_too_fast(read, shape))}


def test_long_white_space_is_found_in_linear_time() -> None:
    for limit_of in (lambda n: n // 2, lambda n: n // 8):
        for shape in (lambda n: (" " * (limit_of(n)) + "a") * (n // limit_of(n)), repeated(" a"), repeated("a")):  # noqa: B023
            assert not grows_too_fast(lambda text: longest_run_exceeds(text, limit_of(len(text))), shape, 500_000)  # noqa: B023


def test_a_history_takes_time_in_proportion_to_its_turns(tokenizer: Tokenizer) -> None:
    def messages(n: int) -> list[dict[str, Any]]:
        return [{"role": ("user", "assistant")[at % 2], "content": "hi"} for at in range(2 * n)]

    class Turns(Conversation):
        def __post_init__(self) -> None:
            """Makes no cache."""

    def conversation(n: int) -> Conversation:
        _, turns = transcript.from_messages(messages(n), tokenizer)
        return Turns(model=None, tokenizer=tokenizer, turns=turns)  # type: ignore[arg-type]

    short, long = messages(1000), messages(4000)
    for read in (tokenizer.apply_chat_template, lambda given: transcript.from_messages(given, tokenizer)):
        assert ratio(read, short, long) < BOUND
    assert ratio(lambda given: given.prompt_ids("and?"), conversation(1000), conversation(4000)) < BOUND


def ratio(read: Callable[[Any], object], short: Any, long: Any) -> float:
    least = [float("inf"), float("inf")]
    for _ in range(4):
        least = [min(least[0], seconds(read, short)), min(least[1], seconds(read, long))]
    return least[1] / least[0]


def test_stop_strings_are_those_of_a_search_from_the_start() -> None:
    """Equal to looking at every beginning of the text, for all texts of up to 8 characters and some stop strings."""
    sets = (["aab"], ["ab", "aab"], ["b", "aab"], ["aba", "bab"], ["aa", "aaa"], ["baa", "a"], [])
    for at in range(2**9):
        text = bin(at)[2:].replace("0", "a").replace("1", "b")[1:]
        for strings in sets:
            found = StopStrings(strings)
            for end, char in enumerate(text, 1):
                whole = [each for each in strings if text[:end].endswith(each)]
                expected = (1, max(whole, key=len)) if whole else None
                assert found.read(char) == expected
                if whole:
                    break
                begun = [n for each in strings for n in range(1, len(each)) if text[:end].endswith(each[:n])]
                assert found.begun == max(begun, default=0)
