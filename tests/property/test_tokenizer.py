"""The tokenizer against the `tokenizers` library on the o200k table: 20,000 random strings, plain and hostile."""

from __future__ import annotations

import hashlib
import json
import random
import runpy
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from phi4_mlx.tokens import byte_bpe
from phi4_mlx.tokens.tokenizer import ByteTokenizer, Control, LibraryTokenizer, Tokenizer, load_tokenizer
from tests.conftest import DATA

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
# A range of each script and of each special kind: letters, marks, numbers, symbols, emoji, private use, controls.
RANGES = [
    (0x00, 0x20), (0x21, 0x7F), (0x80, 0xA0), (0xA1, 0x250), (0x300, 0x370), (0x370, 0x400), (0x400, 0x530),
    (0x530, 0x590), (0x591, 0x5F5), (0x600, 0x700), (0x900, 0x980), (0xE00, 0xE5C), (0x10A0, 0x1100),
    (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2070, 0x2190), (0x2190, 0x2800), (0x3040, 0x3100),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xE000, 0xE100), (0xFB00, 0xFE10), (0xFE20, 0xFFFE), (0x10000, 0x10100),
    (0x1D400, 0x1D800), (0x1F300, 0x1FA00), (0x20000, 0x20100), (0xE0000, 0xE0080), (0x10FF00, 0x10FFFE),
]  # fmt: skip


def strings(seed: int, n: int, tags: float) -> list[str]:
    """Random strings of 1 to 12 parts; a share `tags` of the parts are control strings or resemble one."""
    draw = random.Random(seed)

    def part() -> str:
        kind = draw.random()
        if kind < tags:
            return draw.choice(TAGS if draw.random() < 0.7 else NEIGHBOURS)
        if kind < tags + 0.2:
            return "".join(draw.choices(SPACES, k=draw.randint(1, 5)))
        if kind < tags + 0.35:
            return draw.choice(ENGLISH)
        low, high = draw.choice(RANGES)
        return "".join(chr(draw.randrange(low, high)) for _ in range(draw.randint(1, 8)))

    return ["".join(part() for _ in range(draw.randint(1, 12))) for _ in range(n)]


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


def test_the_rebuilt_file_has_the_published_hash(o200k: Path) -> None:
    found = hashlib.sha256((o200k / "tokenizer.json").read_bytes()).hexdigest()
    assert found == "382cc235b56c725945e149cc25f191da667c836655efd0857b004320e90e91ea"


@pytest.mark.slow
def test_the_merges_of_the_known_file_agree_with_its_ranks(o200k: Path, ours: Tokenizer) -> None:
    """Ranks computed without the merges equal those computed from them."""
    raw = (o200k / "tokenizer.json").read_bytes()
    whole = json.loads(raw)
    spec, merged = byte_bpe.parse(raw)
    assert merged == 199_998 and spec["model"]["merges"] == [] and len(whole["model"]["merges"]) == 199_742
    assert byte_bpe.merges_agree(whole)
    assert byte_bpe.ranks(spec, merged) == byte_bpe.ranks(whole)
    assert isinstance(ours, ByteTokenizer) and ours.vocab_size == 200_029


def as_strings(spec: dict[str, Any]) -> str:
    """The older way of writing merges, in which Phi-4-mini-flash-reasoning has them."""
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    return json.dumps({**spec, "model": {**spec["model"], "merges": merges}}, ensure_ascii=False, indent=2)


def in_another_order(spec: dict[str, Any]) -> str:
    entries = list(spec["model"]["vocab"].items())
    random.Random(0).shuffle(entries)
    model = dict(reversed({**spec["model"], "vocab": dict(entries)}.items()))
    return json.dumps(dict(reversed({**spec, "model": model}.items())), indent=1) + "\n"


WRITINGS: dict[str, Callable[[dict[str, Any]], str]] = {
    "strings": as_strings,
    "another order": in_another_order,
    "one line, only ASCII": lambda spec: json.dumps(spec, separators=(",", ":")),
}


@pytest.mark.slow
@pytest.mark.parametrize("writing", WRITINGS)
def test_the_known_table_is_recognised_in_any_writing(
    o200k: Path, ours: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writing: str
) -> None:
    spec = json.loads((o200k / "tokenizer.json").read_text(encoding="utf-8"))
    text = WRITINGS[writing](spec)
    assert writing != "strings" or len(text.encode()) == 9_731_577  # bytes of the published file
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    (tmp_path / "generation_config.json").write_bytes((o200k / "generation_config.json").read_bytes())
    monkeypatch.setattr(byte_bpe, "merges_agree", lambda spec: pytest.fail("checked a table that is known"))
    assert load_tokenizer(tmp_path, prove=True).fingerprint() == ours.fingerprint()


@pytest.mark.slow
def test_a_table_that_differs_in_one_place_is_not_recognised(o200k: Path) -> None:
    whole = json.loads((o200k / "tokenizer.json").read_text(encoding="utf-8"))
    vocab, pairs = whole["model"]["vocab"], whole["model"]["merges"]
    texts, merges = list(vocab), [*map(" ".join, pairs)]

    def known(vocab: Any, merges: Any) -> bool:
        raw = json.dumps({**whole, "model": {**whole["model"], "vocab": vocab, "merges": merges}}).encode()
        return byte_bpe.parse(raw)[1] is not None

    at = next(n for n, (left, _) in enumerate(pairs) if len(left) > 1)
    (left, right), following = pairs[at], merges[at + 1]
    assert known(vocab, merges)
    assert not known(vocab, [*pairs[:at], [left[:-1], left[-1] + right], *pairs[at + 1 :]])
    assert not known(vocab, [*merges[:at], following, merges[at], *merges[at + 2 :]])
    assert not known(vocab, [*merges[:at], f"{merges[at]}\n{following}", *merges[at + 2 :]])
    assert not known(vocab, merges[:-1])
    assert not known(vocab | {texts[at]: at + 1, texts[at + 1]: at}, merges)
    assert not known(vocab | {texts[1]: True}, merges)
    assert not known(vocab | {"more": "1"}, merges)


@pytest.mark.slow
def test_a_known_model_with_options_that_tiktoken_lacks_is_read_by_the_library(o200k: Path, tmp_path: Path) -> None:
    text = (o200k / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace('"single_word": false', '"single_word": true', 1))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, LibraryTokenizer)
    assert tokenizer.encode("hello world") == [24912, 2375]


def test_plain_text_is_encoded_as_by_the_library(ours: Tokenizer, library_without_tags: Library) -> None:
    texts = strings(1, STRINGS, tags=0.05)
    assert {unicodedata.category(c)[0] for text in texts for c in text} == set("LMNPSZC")
    differing = [t for t, ids in zip(texts, ids_of(library_without_tags, texts), strict=True) if ours.encode(t) != ids]
    assert differing == []


def test_control_strings_are_encoded_as_by_the_library(ours: Tokenizer, library: Library) -> None:
    texts = strings(2, STRINGS, tags=0.4)
    found = [ours.encode(text, specials=True) for text in texts]
    expected = ids_of(library, texts)
    assert [t for t, a, b in zip(texts, found, expected, strict=True) if a != b] == []
    assert {token for ids in found for token in ids} >= set(ours.control_ids.values())


def test_plain_text_never_yields_a_control_id_and_survives_a_round_trip(ours: Tokenizer) -> None:
    control = {*ours.control_ids.values(), *range(199998, 200064)}
    for text in strings(3, STRINGS, tags=0.6):
        ids = ours.encode(text)
        assert not control & set(ids), text
        assert ours.decode(ids) == text


def test_random_ids_are_decoded_as_by_the_library(ours: Tokenizer, library: Library) -> None:
    draw = random.Random(4)
    for _ in range(3000):
        ids = [draw.randrange(200_029) for _ in range(draw.randint(1, 20))]
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.streaming_decoder()
    return [*(decoder.add(token) for token in ids), decoder.finish()]


def test_a_streamed_decoding_equals_the_whole_one_in_complete_characters(ours: Tokenizer) -> None:
    for text in strings(5, 3000, tags=0.1):
        parts = streamed(ours, ours.encode(text))
        assert "".join(parts) == text
        assert "\ufffd" not in "".join(parts) or "\ufffd" in text
    draw = random.Random(6)
    for _ in range(3000):
        ids = [draw.randrange(200_064) for _ in range(draw.randint(1, 20))]
        assert "".join(streamed(ours, ids)) == ours.decode(ids)


def spec_of(name: str) -> dict[str, Any]:
    return json.loads((DATA / name / "tokenizer.json").read_text(encoding="utf-8"))


def stripping() -> dict[str, Any]:
    """Like Phi-4 (14B): control tokens strip white space on both sides. One token is a prefix of another."""
    spec = spec_of("tiny_tokenizer")
    for token in spec["added_tokens"]:
        token["lstrip"] = token["rstrip"] = token["content"] != "<|tag|>"
    spec["added_tokens"][0]["content"] = "<|end"
    return spec


def space_at_the_start_only() -> dict[str, Any]:
    """Like a Llama-style file saved by transformers 5: a space is added only at the start of a prompt."""
    spec = spec_of("tiny_sentencepiece")
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return spec | {"normalizer": None, "pre_tokenizer": spaces}


SPECS: dict[str, Callable[[], dict[str, Any]]] = {
    "tiny_tokenizer": lambda: spec_of("tiny_tokenizer"),
    "stripping": stripping,
    "disagreeing": lambda: spec_of("disagreeing"),
    "tiny_sentencepiece": lambda: spec_of("tiny_sentencepiece"),
    "space_at_the_start_only": space_at_the_start_only,
}
IN_TIKTOKEN = ("tiny_tokenizer", "stripping")


@pytest.fixture(params=SPECS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Tokenizer, Library]:
    text = json.dumps(SPECS[request.param]())
    (tmp_path / "tokenizer.json").write_text(text)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, ByteTokenizer if request.param in IN_TIKTOKEN else LibraryTokenizer)
    return request.param, tokenizer, Library.from_str(text)


def test_every_backend_encodes_and_decodes_as_the_library(pair: tuple[str, Tokenizer, Library]) -> None:
    name, tokenizer, library = pair
    control = set(tokenizer.control_ids.values())
    texts = strings(7, 2000, tags=0.4)
    for text, expected in zip(texts, ids_of(library, texts), strict=True):
        assert tokenizer.encode(text, specials=True) == expected, text
        ids = tokenizer.encode(text)
        assert not control & set(ids), text
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)
        whole = text.replace("▁", " ") if tokenizer.leading_spaces else text  # SentencePiece writes a space as ▁
        if name == "space_at_the_start_only":  # adds a space only where there is none
            whole = whole.removeprefix(" ")
        assert tokenizer.decode(ids) == whole
        assert tokenizer.decode(expected) == library.decode(expected, skip_special_tokens=False)


def test_every_backend_decodes_random_ids_as_the_library(pair: tuple[str, Tokenizer, Library]) -> None:
    """Random ids, and parts of texts with one id replaced, so that characters of several tokens are cut."""
    _, tokenizer, library = pair
    draw = random.Random(13)
    for text in strings(14, 3000, tags=0.2):
        whole = tokenizer.encode(text, specials=True)
        cut = whole[draw.randrange(len(whole)) :][: draw.randint(1, 12)]
        cut[draw.randrange(len(cut))] = draw.randrange(tokenizer.vocab_size)
        for ids in (cut, [draw.randrange(tokenizer.vocab_size + 3) for _ in range(draw.randint(1, 12))]):
            assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)
            assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_no_backend_yields_a_control_id_for_hostile_text(pair: tuple[str, Tokenizer, Library]) -> None:
    _, tokenizer, _ = pair
    control = set(tokenizer.control_ids.values())
    found = {token for text in strings(11, STRINGS, tags=0.7) for token in tokenizer.encode(text)}
    assert not control & found


def test_pieces_are_encoded_as_the_library_encodes_the_joined_text(pair: tuple[str, Tokenizer, Library]) -> None:
    _, tokenizer, library = pair
    draw, tags = random.Random(9), list(tokenizer.control_ids)
    for text in strings(10, 2000, tags=0.0):
        pieces = [draw.choice(["", text]), Control(draw.choice(tags)), text, Control(draw.choice(tags)), "\n", text]
        assert tokenizer.encode_pieces(pieces) == library.encode("".join(pieces), add_special_tokens=False).ids


def merges_agree_after(change: Callable[[dict[str, object]], None]) -> bool:
    spec = spec_of("tiny_tokenizer")
    change(spec["model"])
    return byte_bpe.merges_agree(spec)


def test_each_kind_of_disagreement_between_merges_and_ranks_is_found() -> None:
    def nothing(model: dict) -> None: ...

    def exchange_ids(model: dict) -> None:
        vocab, names = model["vocab"], [left + right for left, right in model["merges"]]
        vocab[names[3]], vocab[names[4]] = vocab[names[4]], vocab[names[3]]

    def second_way(model: dict) -> None:  # the same token from two other parts
        left, right = next(m for m in model["merges"] if len(m[0]) > 1)
        model["merges"][model["merges"].index([left, right])] = [left[0], left[1:] + right]

    def twice(model: dict) -> None:
        model["merges"].append(model["merges"][0])

    def missing_byte(model: dict) -> None:
        del model["vocab"]["Ā"]

    def two_of_one_id(model: dict) -> None:
        model["vocab"]["Ā"] = model["vocab"]["".join(model["merges"][7])]

    assert merges_agree_after(nothing)
    for change in (exchange_ids, second_way, twice, missing_byte, two_of_one_id):
        assert not merges_agree_after(change), change


def random_bpe(draw: random.Random) -> dict[str, Any]:
    """Random merges over three letters; most disagree with their ranks."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(draw.randint(1, 8)):
        left, right = draw.choice(tokens), draw.choice(tokens)
        if left + right not in tokens:
            tokens.append(left + right)
            merges.append([left, right])
    if draw.random() < 0.2:
        draw.shuffle(merges)
    spec = spec_of("tiny_tokenizer")
    letters = {char: token for token, char in enumerate(sorted(byte_bpe.SPELLING))}
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": ".+"}  # the fastest to compile
    spec["model"]["vocab"] = letters | {token: 256 + n for n, token in enumerate(tokens[3:])}
    return spec | {"added_tokens": [], "model": spec["model"] | {"merges": merges}}


def test_models_whose_merges_agree_have_the_same_ids_in_both_backends() -> None:
    """Also counts the refused models whose ids do differ, so that the check is not far too strict."""
    draw = random.Random(12)
    texts = ["".join(draw.choices("abc", k=draw.randint(1, 12))) for _ in range(200)]
    agreeing = differing = 0
    for _ in range(300):
        spec = random_bpe(draw)
        same = ByteTokenizer(spec, byte_bpe.ranks(spec))
        expected = ids_of(Library.from_str(json.dumps(spec)), texts)
        differs = [same.encode(text) for text in texts] != expected
        if byte_bpe.merges_agree(spec):
            agreeing += 1
            assert not differs, spec["model"]["merges"]
        else:
            differing += differs
    assert agreeing > 50 and differing > 50, (agreeing, differing)
