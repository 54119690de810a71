"""Loading a tokenizer, its end-of-turn ids, edge cases, and files that are not a tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer as Library

from phi4_mlx.errors import Phi4Error, RequestError, TokenizerError
from phi4_mlx.tokens import byte_bpe
from phi4_mlx.tokens.decoders import FallbackByte
from phi4_mlx.tokens.tokenizer import ByteTokenizer, Control, LibraryTokenizer, Tokenizer, load_tokenizer
from tests.conftest import DATA


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "tiny_tokenizer", tmp_path / "tokenizer"))


def change(folder: Path, edit: Callable[[dict[str, Any]], None], name: str = "tokenizer.json") -> Path:
    spec = json.loads((folder / name).read_text(encoding="utf-8"))
    edit(spec)
    (folder / name).write_text(json.dumps(spec))
    return folder


def test_control_strings_are_tokens_only_when_asked_for() -> None:
    tokenizer = load_tokenizer(DATA / "tiny_tokenizer")
    control = tokenizer.control_ids
    assert tokenizer.encode("<|user|>\n hi<|end|>", specials=True) == [
        control["<|user|>"], *tokenizer.encode("hi"), control["<|end|>"],
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("<|end|><|system|>")) == "<|end|><|system|>"
    assert not set(control.values()) & set(tokenizer.encode("<|end|><|system|>"))


@pytest.mark.parametrize("name", ["tiny_tokenizer", "disagreeing", "tiny_sentencepiece"])
@pytest.mark.parametrize("specials", [False, True])
def test_edges_of_text(name: str, specials: bool) -> None:
    tokenizer = load_tokenizer(DATA / name)
    assert tokenizer.encode("", specials=specials) == [] and tokenizer.decode([]) == ""
    halves = {"\ud83d": "\ufffd", "a\udc00b": "a\ufffdb", "\ud83d\ude00": "😀"}  # JSON may write a pair as halves
    for text, same in {"a\x00b": "a\x00b", "\x00": "\x00", "  a  ": "  a  ", **halves}.items():
        assert tokenizer.decode(tokenizer.encode(text, specials=specials)) == same
    assert tokenizer.decode([10**9, -1, 2**70, tokenizer.vocab_size]) == ""
    decoder = tokenizer.streaming_decoder()
    assert [decoder.add(token) for token in (10**9, *tokenizer.encode("\x00a"))][-1].endswith("a")


def test_too_much_white_space_is_an_error_instead_of_a_panic() -> None:
    tokenizer = load_tokenizer(DATA / "tiny_tokenizer")
    assert tokenizer.decode(tokenizer.encode("\t " * 250_000 + "x")) == "\t " * 250_000 + "x"
    for specials in (False, True):
        with pytest.raises(RequestError, match=r"500,000 consecutive white-space characters"):
            tokenizer.encode("x" + " " * 500_001 + "x", specials=specials)


def test_entries_that_no_merge_makes_are_only_decoded(folder: Path) -> None:
    """Phi-4-mini's numbered fillers, and an entry in byte-level spelling."""

    def add(spec: dict[str, Any]) -> None:
        spec["model"]["vocab"] |= {"<|endoftext7|>": 600, "ĠgrÃ¶ÃŁer": 610}

    tokenizer = load_tokenizer(change(folder, add))
    assert isinstance(tokenizer, ByteTokenizer) and tokenizer.vocab_size == 611
    assert tokenizer.decode([600, 605, 610]) == "<|endoftext7|> größer"
    for specials in (False, True):
        assert not {600, 610} & set(tokenizer.encode("<|endoftext7|> größer", specials=specials))


def test_an_ordinary_token_among_the_added_ones_stays_ordinary(folder: Path) -> None:
    """Some re-uploads of Phi-4-mini list U+FFFD as a special token, in byte-level spelling."""
    before = load_tokenizer(folder)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    text = "".join(spec["model"]["merges"][9])
    odd = {**spec["added_tokens"][0], "content": text, "id": spec["model"]["vocab"][text]}
    tokenizer = load_tokenizer(change(folder, lambda spec: spec["added_tokens"].insert(0, odd)))
    assert tokenizer.control_ids == before.control_ids
    assert tokenizer.encode("The quick brown fox") == before.encode("The quick brown fox")


def test_a_stream_withholds_an_incomplete_character() -> None:
    tokenizer = load_tokenizer(DATA / "tiny_tokenizer")
    ids = tokenizer.encode("☃")
    decoder = tokenizer.streaming_decoder()
    assert len(ids) == 3 and [decoder.add(token) for token in ids] == ["", "", "☃"]
    assert [decoder.add(token) for token in ids[:2]] == ["", ""] and decoder.finish() == "\ufffd"


def test_a_stream_withholds_a_run_of_byte_tokens_until_it_ends() -> None:
    """The next byte may make the run invalid UTF-8; an id without text does not end it."""
    tokenizer = load_tokenizer(DATA / "tiny_sentencepiece")
    texts = {token: tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}
    byte = {data: token for token, data in texts.items() if isinstance(data, FallbackByte)}
    e4, bd, a0, ff = (byte[bytes([value])] for value in (0xE4, 0xBD, 0xA0, 0xFF))
    (q,) = (token for token, data in texts.items() if data == b"q" and token not in byte.values())
    for ids, texts in (
        ([e4, bd, 10**9, a0, q, q], ["", "", "", "", "你q", "q", ""]),
        ([e4, bd, a0, ff, q], ["", "", "", "", "\ufffd\ufffd\ufffd\ufffdq", ""]),
        ([q, e4, bd, a0], ["q", "", "", "", "你"]),
        ([q, e4, bd], ["q", "", "", "\ufffd\ufffd"]),
        ([byte[b" "], byte[b" "], q], ["", "", " q", ""]),  # encoding adds the first space
    ):
        decoder = tokenizer.streaming_decoder()
        assert [*(decoder.add(token) for token in ids), decoder.finish()] == texts
        assert tokenizer.decode(ids) == "".join(texts)


def test_an_added_token_is_decoded_as_the_library_decodes_it(tmp_path: Path) -> None:
    """Like any other entry: U+2581 is a space, and `<0x4a>` is a byte."""
    shutil.copytree(DATA / "tiny_sentencepiece", tmp_path, dirs_exist_ok=True)

    def add(spec: dict[str, Any]) -> None:
        spec["added_tokens"] += [
            {**spec["added_tokens"][-1], "content": text, "id": 485 + n} for n, text in enumerate(("▁<b>▁", "<0x4a>"))
        ]

    change(tmp_path, add)
    tokenizer, library = load_tokenizer(tmp_path), Library.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.decode([485]) == "<b> " and tokenizer.decode([486, 485]) == "J <b> "
    for ids in ([485], [486, 485]):
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["tiny_tokenizer", "tiny_sentencepiece"])
@pytest.mark.parametrize(
    "made",
    [mx.array, np.array, lambda ids: [*map(mx.array, ids)], lambda ids: [*map(np.array, ids)], lambda ids: iter(ids)],
)
def test_ids_may_come_from_mlx_and_numpy(name: str, made: Callable[[list[int]], Any]) -> None:
    tokenizer = load_tokenizer(DATA / name)
    ids = tokenizer.encode("The fox ☃.")
    decoder = tokenizer.streaming_decoder()
    assert "".join(map(decoder.add, made(ids))) + decoder.finish() == tokenizer.decode(made(ids)) == "The fox ☃."
    assert [*map(tokenizer.token_bytes, made(ids))] == [*map(tokenizer.token_bytes, ids)]


@pytest.mark.parametrize("ids", [[1.0], ["1"], mx.array([[1, 2]]), np.array([1.5])])
def test_values_that_are_not_ids_are_refused(ids: Any) -> None:
    with pytest.raises(TypeError):
        load_tokenizer(DATA / "tiny_tokenizer").decode(ids)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, set()),
        ({"eos_token_id": [3, 4]}, {"eos_token_id": 5}, {3, 4, 5}),
        ({"eos_token_id": 3}, {"eos_token_id": None}, {3}),
        ({}, {"eos_token_id": [7]}, {7}),
    ],
)
def test_end_of_turn_ids_come_from_both_files_and_the_family(
    folder: Path, generation: Any, config: Any, expected: set[int]
) -> None:
    (folder / "generation_config.json").unlink()
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    tokenizer = load_tokenizer(folder)
    family = {tokenizer.control_ids["<|end|>"], tokenizer.control_ids["<|endoftext|>"]}
    assert tokenizer.eos_ids == family | expected


@pytest.mark.parametrize("value", ["2", -1, 1.5, True, [None], {"a": 1}])
def test_malformed_end_of_turn_ids_are_refused(folder: Path, value: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(TokenizerError, match="eos_token_id"):
        load_tokenizer(folder)


def fall_back(**fields: Any) -> Callable[[dict[str, Any]], None]:
    def edit(spec: dict[str, Any]) -> None:
        for name, value in fields.items():
            where = spec["model"] if name in spec["model"] else spec
            where[name] = value

    return edit


def single_word(spec: dict[str, Any]) -> None:
    spec["added_tokens"][3]["single_word"] = True


def normalized(spec: dict[str, Any]) -> None:
    spec["added_tokens"][3]["normalized"] = True


def with_a_space(spec: dict[str, Any]) -> None:
    spec["added_tokens"][3]["content"] = "<|end|> "


def isolated(spec: dict[str, Any]) -> None:
    spec["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Isolated", "invert": False}


def isolated_outside(spec: dict[str, Any]) -> None:
    spec["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Isolated"


def add_prefix_space(spec: dict[str, Any]) -> None:
    spec["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


@pytest.mark.parametrize(
    "edit",
    [
        fall_back(dropout=0.1), fall_back(unk_token="!"), fall_back(byte_fallback=True), fall_back(ignore_merges=True),
        fall_back(normalizer={"type": "NFC"}), fall_back(pre_tokenizer=None), single_word, normalized, with_a_space,
        isolated, isolated_outside, add_prefix_space,
    ],
)  # fmt: skip
def test_settings_that_tiktoken_lacks_need_the_library(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    assert isinstance(load_tokenizer(folder), ByteTokenizer)
    assert isinstance(load_tokenizer(change(folder, edit)), LibraryTokenizer)


@pytest.mark.parametrize("name", ["disagreeing", "tiny_sentencepiece"])
@pytest.mark.parametrize("specials", [False, True])
def test_a_prompt_is_neither_cut_nor_padded(name: str, specials: bool, tmp_path: Path) -> None:
    shutil.copytree(DATA / name, tmp_path, dirs_exist_ok=True)
    text = "The quick brown fox<|end|>"
    expected = load_tokenizer(tmp_path).encode(text, specials=specials)
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "x"}  # fmt: skip
    for setting in ({"truncation": cut, "padding": None}, {"truncation": None, "padding": fill}):
        change(tmp_path, lambda spec, setting=setting: spec.update(setting))
        assert load_tokenizer(tmp_path).encode(text, specials=specials) == expected


def test_merges_written_as_strings_are_the_same(folder: Path) -> None:
    expected = load_tokenizer(folder).encode("The quick brown fox")
    change(folder, lambda spec: spec["model"].update(merges=[" ".join(pair) for pair in spec["model"]["merges"]]))
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, ByteTokenizer) and tokenizer.encode("The quick brown fox") == expected


def record(folder: Path, digest: str | None = None) -> None:
    """A manifest that says of tokenizer.json, or of the file with this hash, that its merges agree."""
    raw = (folder / "tokenizer.json").read_bytes()
    entry = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    manifest = {"files": {"tokenizer.json": entry}, "tokenizer_merges_agree": digest or entry["sha256"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_converters_record_replaces_the_check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(spec: Any) -> bool:
        raise AssertionError("checked again")

    monkeypatch.setattr(byte_bpe, "merges_agree", checked)
    record(folder)
    assert isinstance(load_tokenizer(folder), ByteTokenizer)
    record(folder, "0" * 64)
    with pytest.raises(AssertionError, match="checked again"):
        load_tokenizer(folder)
    change(folder, lambda manifest: manifest.pop("files"), "manifest.json")  # not a manifest of ours
    with pytest.raises(AssertionError, match="checked again"):
        load_tokenizer(folder)


def test_prove_ignores_the_record(tmp_path: Path) -> None:
    shutil.copy(DATA / "disagreeing" / "tokenizer.json", tmp_path)
    record(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    assert isinstance(load_tokenizer(tmp_path, prove=True), LibraryTokenizer)


def test_a_missing_control_token_is_named() -> None:
    with pytest.raises(TokenizerError, match=r"<\|im_start\|>.*--chat-format"):
        load_tokenizer(DATA / "tiny_tokenizer").encode_pieces([Control("<|im_start|>")])


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"{}", b"null", b"[" * 100_000, b"\xff\xfe", b'{"model": {}, "added_tokens": []}',
        b'{"model": {"type": "BPE", "vocab": [], "merges": []}, "added_tokens": []}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a"]]}, "added_tokens": []}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [{"id": -1, "content": "x"}]}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [{"id": 1}]}',
        b'{"model": {"type": "Unigram"}, "added_tokens": []}',
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_tokenizer_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(Phi4Error, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ({"content": "\ud800"}, "lacks an id or a text"), ({"content": ""}, "lacks an id or a text"),
        ({"id": -1}, "lacks an id or a text"), ({"id": "500"}, "lacks an id or a text"),
        ({"id": 300}, "'<new>' has id 300; that id or text is taken"),
        ({"content": "<|end|>"}, "has id 500; that id or text is taken"),
        ({"content": "a"}, "'a' has id 500; that id or text is taken"),
    ],
)  # fmt: skip
def test_malformed_added_tokens_are_refused(folder: Path, token: dict[str, Any], message: str) -> None:
    change(folder, lambda spec: spec["added_tokens"].append({"content": "<new>", "id": 500} | token))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(folder)


def test_no_merge_and_no_character_makes_a_control_token(tmp_path: Path) -> None:
    shutil.copytree(DATA / "tiny_sentencepiece", tmp_path, dirs_exist_ok=True)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    merged = "".join(spec["model"]["merges"][3])
    for text in (merged, "q"):
        token = {**spec["added_tokens"][-1], "content": text, "id": spec["model"]["vocab"][text]}
        change(tmp_path, lambda spec, token=token: spec["added_tokens"].append(token))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, LibraryTokenizer)
    text = f"{merged} q quick {merged}"
    assert not set(tokenizer.control_ids.values()) & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_pattern_that_cannot_be_read_is_one_line(folder: Path) -> None:
    change(folder, lambda spec: spec["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("}))
    with pytest.raises(TokenizerError, match="its pattern cannot be read"):
        load_tokenizer(folder)


def test_a_pattern_that_matches_an_empty_text_is_an_error_instead_of_a_panic(folder: Path) -> None:
    """When it is loaded, or when it meets a text in which it does so."""

    def load(pattern: str) -> Tokenizer:
        change(folder, lambda spec: spec["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": pattern}))
        return load_tokenizer(folder)

    for pattern in ("", "a*"):
        with pytest.raises(TokenizerError, match="tiktoken cannot use its pattern"):
            load(pattern)
    tokenizer = load("(?=b)")
    with pytest.raises(TokenizerError, match="tiktoken cannot use its pattern"):
        tokenizer.encode("b")


def test_an_added_token_with_another_id_in_the_library_is_refused(tmp_path: Path) -> None:
    shutil.copytree(DATA / "tiny_sentencepiece", tmp_path, dirs_exist_ok=True)
    change(tmp_path, lambda spec: spec["added_tokens"][-1].update(id=900))
    with pytest.raises(TokenizerError, match="has id 900"):
        load_tokenizer(tmp_path)


def test_a_decoder_of_another_family_is_named(tmp_path: Path) -> None:
    shutil.copytree(DATA / "tiny_sentencepiece", tmp_path, dirs_exist_ok=True)
    change(tmp_path, lambda spec: spec["decoder"]["decoders"].pop())
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("a")) == " a"  # without a space to remove
    change(tmp_path, lambda spec: spec["decoder"]["decoders"].reverse())
    with pytest.raises(TokenizerError, match="decoder 'Sequence' is not one of this family's"):
        load_tokenizer(tmp_path)
    change(tmp_path, lambda spec: spec.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}))
    with pytest.raises(TokenizerError, match="decoder 'WordPiece' is not one of this family's"):
        load_tokenizer(tmp_path)
