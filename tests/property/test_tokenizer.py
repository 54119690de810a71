"""The tokenizer against the `tokenizers` library, on the true o200k table: 20,000 random strings, and hostile ones."""

from __future__ import annotations

import hashlib
import json
import random
import runpy
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library

from phi4_mlx.tokenizer import ByteTokenizer, Control, LibraryTokenizer, Tokenizer, load_tokenizer, merges_agree

DATA = Path(__file__).parents[1] / "data"
STRINGS = 20_000

TAGS = [
    "<|endoftext|>", "<|endofprompt|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>", "<|tool|>", "<|/tool|>",
    "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>", "<|tag|>",
]  # fmt: skip
NEIGHBOURS = [
    "<|", "|>", "<|end", "end|>", "<| end|>", "<|END|>", "<|endoftext10|>", "<|endoftext98|>", "<|fim|>", "<|user |>",
    "<<|user|>>", "</s>", "<s>", "<|im_end|>",
]  # fmt: skip
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u2003", "\u2028",
          "\u2029", "\u202f", "\u205f", "\u3000", "\u200b", "\ufeff", "\u180e"]  # fmt: skip
ENGLISH = ["don't", "I'LL", "we've", "The", " quick", "foo_bar(baz)", "12345.678e-9", "https://x.y/z?q=1", "ÉCOLE"]
# One stretch of each script and of each odd corner: letters, marks, numbers, symbols, emoji, private use, controls.
RANGES = [
    (0x00, 0x20), (0x21, 0x7F), (0x80, 0xA0), (0xA1, 0x250), (0x300, 0x370), (0x370, 0x400), (0x400, 0x530),
    (0x530, 0x590), (0x591, 0x5F5), (0x600, 0x700), (0x900, 0x980), (0xE00, 0xE5C), (0x10A0, 0x1100),
    (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2070, 0x2190), (0x2190, 0x2800), (0x3040, 0x3100),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xE000, 0xE100), (0xFB00, 0xFE10), (0xFE20, 0xFFFE), (0x10000, 0x10100),
    (0x1D400, 0x1D800), (0x1F300, 0x1FA00), (0x20000, 0x20100), (0xE0000, 0xE0080), (0x10FF00, 0x10FFFE),
]  # fmt: skip


def strings(seed: int, n: int, tags: float) -> list[str]:
    """Random strings of 1 to 12 stretches; `tags` is the share of stretches that are control strings or nearly so."""
    draw = random.Random(seed)

    def stretch() -> str:
        kind = draw.random()
        if kind < tags:
            return draw.choice(TAGS if draw.random() < 0.7 else NEIGHBOURS)
        if kind < tags + 0.2:
            return "".join(draw.choices(SPACES, k=draw.randint(1, 5)))
        if kind < tags + 0.35:
            return draw.choice(ENGLISH)
        low, high = draw.choice(RANGES)
        return "".join(chr(draw.randrange(low, high)) for _ in range(draw.randint(1, 8)))

    return ["".join(stretch() for _ in range(draw.randint(1, 12))) for _ in range(n)]


@pytest.fixture(scope="module")
def o200k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runpy.run_path(str(DATA / "o200k.py"))["write"](tmp_path_factory.mktemp("o200k"))


@pytest.fixture(scope="module")
def ours(o200k: Path) -> Tokenizer:
    return load_tokenizer(o200k)


@pytest.fixture(scope="module")
def library(o200k: Path) -> Library:
    return Library.from_file(str(o200k / "tokenizer.json"))


@pytest.fixture(scope="module")
def library_without_tags(o200k: Path) -> Library:
    spec = json.loads((o200k / "tokenizer.json").read_text(encoding="utf-8"))
    return Library.from_str(json.dumps({**spec, "added_tokens": []}))


def ids_of(library: Library, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]


def test_the_file_is_microsofts(o200k: Path) -> None:
    found = hashlib.sha256((o200k / "tokenizer.json").read_bytes()).hexdigest()
    assert found == "382cc235b56c725945e149cc25f191da667c836655efd0857b004320e90e91ea"


def test_its_merges_agree_with_its_ranks(o200k: Path, ours: Tokenizer) -> None:
    """What the file's hash stands for."""
    assert isinstance(ours, ByteTokenizer)
    assert merges_agree(json.loads((o200k / "tokenizer.json").read_text(encoding="utf-8")))


def test_plain_text_is_encoded_as_the_library_does(ours: Tokenizer, library_without_tags: Library) -> None:
    texts = strings(1, STRINGS, tags=0.05)
    assert {unicodedata.category(c)[0] for text in texts for c in text} == set("LMNPSZC")
    differing = [t for t, ids in zip(texts, ids_of(library_without_tags, texts), strict=True) if ours.encode(t) != ids]
    assert differing == []


def test_control_strings_are_read_as_the_library_does(ours: Tokenizer, library: Library) -> None:
    texts = strings(2, STRINGS, tags=0.4)
    found = [ours.encode(text, specials=True) for text in texts]
    expected = ids_of(library, texts)
    assert [t for t, a, b in zip(texts, found, expected, strict=True) if a != b] == []
    assert {token for ids in found for token in ids} >= set(ours.control_ids.values())


def test_plain_text_never_yields_a_control_id_and_comes_back_whole(ours: Tokenizer) -> None:
    control = {*ours.control_ids.values(), *range(199998, 200064)}
    for text in strings(3, STRINGS, tags=0.6):
        ids = ours.encode(text)
        assert not control & set(ids), text
        assert ours.decode(ids) == text


def test_decoding_any_ids_is_the_librarys(ours: Tokenizer, library: Library) -> None:
    draw = random.Random(4)
    for _ in range(3000):
        ids = [draw.randrange(200_029) for _ in range(draw.randint(1, 20))]
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.streaming_decoder()
    return [*(decoder.add(token) for token in ids), decoder.finish()]


def test_a_stream_is_the_decoding_in_whole_characters(ours: Tokenizer) -> None:
    for text in strings(5, 3000, tags=0.1):
        parts = streamed(ours, ours.encode(text))
        assert "".join(parts) == text
        assert "\ufffd" not in "".join(parts) or "\ufffd" in text
    draw = random.Random(6)
    for _ in range(3000):
        ids = [draw.randrange(200_064) for _ in range(draw.randint(1, 20))]
        assert "".join(streamed(ours, ids)) == ours.decode(ids)


@pytest.mark.parametrize("name", ["tiny_tokenizer", "tiny_sentencepiece", "disagreeing"])
def test_every_backend_keeps_the_same_promises(name: str) -> None:
    tokenizer = load_tokenizer(DATA / name)
    library = Library.from_file(str(DATA / name / "tokenizer.json"))
    assert isinstance(tokenizer, ByteTokenizer if name == "tiny_tokenizer" else LibraryTokenizer)
    control = set(tokenizer.control_ids.values())
    texts = strings(7, 2000, tags=0.4)
    for text, expected in zip(texts, ids_of(library, texts), strict=True):
        assert tokenizer.encode(text, specials=True) == expected, text
        ids = tokenizer.encode(text)
        assert not control & set(ids), text
        whole = text.replace("▁", " ") if name == "tiny_sentencepiece" else text  # its sign for a space
        assert tokenizer.decode(ids) == whole
        assert "".join(streamed(tokenizer, ids)) == whole
    draw = random.Random(8)
    for _ in range(2000):
        # The library reads a run of byte tokens as a whole, valid or not: no stream can foresee that.
        first = 259 if name == "tiny_sentencepiece" else 0
        ids = [draw.randrange(first, tokenizer.vocab_size + 3) for _ in range(draw.randint(1, 12))]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["tiny_tokenizer", "tiny_sentencepiece"])
def test_pieces_are_the_whole_text_read_by_the_library(name: str) -> None:
    tokenizer = load_tokenizer(DATA / name)
    library = Library.from_file(str(DATA / name / "tokenizer.json"))
    draw, tags = random.Random(9), list(tokenizer.control_ids)
    for text in strings(10, 2000, tags=0.0):
        pieces: list[str] = [Control(draw.choice(tags)), text, Control(draw.choice(tags)), "\n", text]
        assert tokenizer.encode_pieces(pieces) == library.encode("".join(pieces), add_special_tokens=False).ids


def agreeing(change: Callable[[dict[str, object]], None]) -> bool:
    spec = json.loads((DATA / "tiny_tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    change(spec["model"])
    return merges_agree(spec)


def test_disagreement_is_found_whatever_makes_it() -> None:
    def nothing(model: dict) -> None: ...

    def exchange_ids(model: dict) -> None:
        vocab, names = model["vocab"], [left + right for left, right in model["merges"]]
        vocab[names[3]], vocab[names[4]] = vocab[names[4]], vocab[names[3]]

    def second_way(model: dict) -> None:  # the same token from other parts
        left, right = next(m for m in model["merges"] if len(m[0]) > 1)
        model["merges"][model["merges"].index([left, right])] = [left[0], left[1:] + right]

    def twice(model: dict) -> None:
        model["merges"].append(model["merges"][0])

    def missing_byte(model: dict) -> None:
        del model["vocab"]["Ā"]

    assert agreeing(nothing)
    assert not any(map(agreeing, (exchange_ids, second_way, twice, missing_byte)))
