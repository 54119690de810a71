"""tokenizer.json -> token ids and back: through tiktoken where it can say the same, else through `tokenizers`.

Both stand behind one interface. Plain text never becomes a control token: control ids come only from `Control` pieces,
or from `encode(text, specials=True)`, which reads a text as Hugging Face does.

tiktoken merges by the rank of the token that a merge makes; tokenizer.json lists merges in order. `merges_agree` proves
that the two come to the same for a vocabulary, as they do for o200k; it takes seconds for one of that size, so that the
file's hash, or the converter's word in the manifest, stands for it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from phi4_mlx.config import read_json
from phi4_mlx.errors import ConfigError, TokenizerError

if TYPE_CHECKING:
    import tiktoken

# SHA-256 of tokenizer.json files whose merges are known to agree: Phi-4-mini-instruct (o200k).
_KNOWN_TO_AGREE = {"382cc235b56c725945e149cc25f191da667c836655efd0857b004320e90e91ea"}
# Markers that end a turn in this family; config.json alone often names only one of them.
_END_MARKERS = ("<|end|>", "<|endoftext|>", "<|im_end|>")
# White space as the `tokenizers` library strips it: Unicode's White_Space. Python's own class has \x1c to \x1f as well.
_SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"
_LEADING_SPACE = re.compile(_SPACE)


class Control(str):
    """The text of a control token, as a piece of a prompt; a plain `str` beside it is text and nothing but text."""


class ChatFormat(Protocol):
    """Messages to ids; see `phi4_mlx.chat_format`."""

    name: str

    def render(
        self,
        tokenizer: Any,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]: ...
    def extend(
        self, tokenizer: Any, ids: Sequence[int], messages: Sequence[Any], add_generation_prompt: bool = True
    ) -> list[int]: ...
    def own_words(self, tokenizer: Any, ids: Sequence[int]) -> list[bool]: ...


class StreamingDecoder(Protocol):
    """Ids in, one by one; text out as soon as it is whole characters."""

    def add(self, token: int) -> str:
        """The text that this token makes certain; may be empty."""
        ...

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never came to its end."""
        ...


class Tokenizer:
    """What the two backends share.

    Attributes:
        control_ids: the added tokens, text -> id.
        eos_ids: ids that end a turn, from generation_config.json, config.json and the family.
        vocab_size: one more than the highest id with a text.
        chat_format: renders messages; set by `load`.
    """

    vocab_size: int
    chat_format: ChatFormat

    def __init__(self, added_tokens: Sequence[Mapping[str, Any]], eos_ids: Iterable[int] = ()):
        self.control_ids: dict[str, int] = {token["content"]: token["id"] for token in added_tokens}
        self._strips = {token["content"] for token in added_tokens if token.get("rstrip")}
        markers = {self.control_ids[text] for text in _END_MARKERS if text in self.control_ids}
        self.eos_ids = frozenset(markers | set(eos_ids))

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Ids of a text.

        Args:
            text: any text; half a surrogate pair counts as U+FFFD.
            specials: reads control strings in the text as control tokens, as Hugging Face does, and drops the white
                space after those that ask for it. By default they are text like any other.

        Returns:
            The ids; nothing is added before or behind.
        """
        return self._encode_specials(text) if specials else self._encode_plain(text)

    def encode_pieces(self, pieces: Iterable[Control | str]) -> list[int]:
        """Ids of a prompt made of control tokens and texts, as Hugging Face reads the prompt's whole text.

        White space after a control token that strips it is dropped; texts side by side are one text.

        Raises:
            TokenizerError: there is no such control token.
        """
        ids: list[int] = []
        text, stripping = "", False
        for piece in [*pieces, Control("")]:
            if not isinstance(piece, Control):
                text += piece
                continue
            if stripping and (space := _LEADING_SPACE.match(text)):
                text = text[space.end() :]
            ids += self.encode(text) if text else []
            text, stripping = "", piece in self._strips
            if piece:
                ids.append(self._control_id(piece))
        return ids

    def _control_id(self, piece: str) -> int:
        if piece not in self.control_ids:
            raise TokenizerError(
                f"this tokenizer has no {piece!r}: the chat format is not its own; choose another with --chat-format"
            )
        return self.control_ids[piece]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation in the model's own chat format.

        Args:
            messages: each {"role": "system" | "user" | "assistant" | "tool", "content": text}.
            tools: OpenAI tools or flat schemas, shown to the model in the system turn.
            add_generation_prompt: ends with the start of the assistant's turn.

        Raises:
            RequestError: a message or a tool is malformed; says which.
            TokenizerError: the chat format is not known.
        """
        return self.chat_format.render(self, messages, tools, add_generation_prompt)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids: control tokens as their text, ids without text as nothing, broken characters as U+FFFD."""
        raise NotImplementedError

    def streaming_decoder(self) -> StreamingDecoder:
        """A decoder for one answer; what it gives, joined, is `decode` of all its ids."""
        raise NotImplementedError

    def _encode_plain(self, text: str) -> list[int]:
        raise NotImplementedError

    def _encode_specials(self, text: str) -> list[int]:
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """A byte-level BPE in tiktoken."""

    def __init__(self, spec: Mapping[str, Any], eos_ids: Iterable[int] = ()):
        super().__init__(spec["added_tokens"], eos_ids)
        ranks, rest = _ranks(spec)
        self._pattern = _pattern(spec) or ""
        self._ranks = ranks
        self._texts_only = rest  # entries that no merge makes: for decoding alone
        self.vocab_size = 1 + max([*ranks.values(), *rest.values(), *self.control_ids.values()])
        strips = "|".join(map(re.escape, sorted(self._strips)))
        self._stripped = re.compile(f"({strips}){_SPACE}") if strips else None

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken

        specials = self._texts_only | self.control_ids
        return tiktoken.Encoding("phi4", pat_str=self._pattern, mergeable_ranks=self._ranks, special_tokens=specials)

    def _encode_plain(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def _encode_specials(self, text: str) -> list[int]:
        if self._stripped:
            text = self._stripped.sub(r"\1", text)
        return self._encoding.encode(text, allowed_special=set(self.control_ids), disallowed_special=())

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for an id without text."""
        try:
            return self._encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return b""

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def streaming_decoder(self) -> StreamingDecoder:
        return _ByteDecoder(self)


class _ByteDecoder:
    def __init__(self, tokenizer: ByteTokenizer):
        self._bytes_of = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        return self._utf8.decode(self._bytes_of(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class LibraryTokenizer(Tokenizer):
    """Any other tokenizer.json, such as Phi-3.5-mini's SentencePiece-style BPE, through the `tokenizers` library.

    Plain text goes through a second copy that has no added tokens, and no way to make one by merging.
    """

    def __init__(self, spec: Mapping[str, Any], eos_ids: Iterable[int] = ()):
        from tokenizers import Tokenizer as Library

        super().__init__(spec["added_tokens"], eos_ids)
        try:
            self._library = Library.from_str(json.dumps(spec))
            self._plain = Library.from_str(json.dumps(_without_control(spec, set(self.control_ids))))
        except Exception as error:  # the library raises nothing more specific
            raise TokenizerError(f"tokenizer.json cannot be read: {' '.join(str(error).split())}") from None
        self.vocab_size = 1 + max(self._library.get_vocab(with_added_tokens=True).values())

    def _encode_plain(self, text: str) -> list[int]:
        return list(self._plain.encode(_whole(text), add_special_tokens=False).ids)

    def _encode_specials(self, text: str) -> list[int]:
        return list(self._library.encode(_whole(text), add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        known = [token for token in ids if 0 <= token < self.vocab_size]
        return self._library.decode(known, skip_special_tokens=False)

    def streaming_decoder(self) -> StreamingDecoder:
        return _LibraryDecoder(self)


class _LibraryDecoder:
    """Decodes the newest tokens behind those before them, since what a token says may depend on where it stands."""

    def __init__(self, tokenizer: LibraryTokenizer):
        self._decode = tokenizer.decode
        self._given: list[int] = []  # the last tokens whose text is out
        self._held: list[int] = []  # tokens that may yet be half a character

    def add(self, token: int) -> str:
        self._held.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        if text:
            self._given, self._held = self._held, []
        return text

    def finish(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        return self._decode(self._given + self._held)[len(self._decode(self._given)) :]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads tokenizer.json, and the end-of-turn ids from generation_config.json and config.json.

    Raises:
        TokenizerError: a file is missing or damaged.
    """
    path = folder / "tokenizer.json"
    try:
        raw = path.read_bytes()
        spec = json.loads(raw)
    except FileNotFoundError:
        raise TokenizerError(f"{path} does not exist; vocab.json and merges.txt alone will not do") from None
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from None
    try:
        _check_added_tokens(spec)
        eos_ids = _eos_ids(folder)
        agree = _is_byte_bpe(spec) and (_known_to_agree(folder, raw) or merges_agree(spec))
        return ByteTokenizer(spec, eos_ids) if agree else LibraryTokenizer(spec, eos_ids)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise TokenizerError(f"{path} is not laid out as a tokenizer: {type(error).__name__} {error}") from None


def merges_agree(spec: Mapping[str, Any]) -> bool:
    """Whether merging by the rank of the merged token does what the list of merges does.

    It does when the list makes each of its tokens once, in the order of their ids, and each token's own bytes come
    down, under the merges before its own, to the very two parts that its merge names.

    Args:
        spec: a parsed tokenizer.json of byte-level BPE.
    """
    vocab, merges = spec["model"]["vocab"], _merges(spec)
    made = [vocab.get(left + right) for left, right in merges]
    if None in made or any(a >= b for a, b in pairwise(made)):
        return False
    alphabet = {chr(c) for c in _byte_of_char()}
    if not alphabet <= vocab.keys() or max(vocab[c] for c in alphabet) >= min(made, default=len(vocab)):
        return False  # a byte without a token, or one that outranks a merge
    ranks = {c: vocab[c] for c in alphabet}
    ranks.update((left + right, rank) for (left, right), rank in zip(merges, made, strict=True))
    return all(
        left in ranks and right in ranks and _parts(left + right, ranks, rank) == [left, right]
        for (left, right), rank in zip(merges, made, strict=True)
    )


def _parts(token: str, ranks: Mapping[str, int], below: int) -> list[str]:
    """What the characters of a token merge into under the ranks below its own, lowest first, leftmost first."""
    parts = list(token)
    while len(parts) > 2:
        pairs = [ranks.get(a + b, below) for a, b in pairwise(parts)]
        rank = min(pairs)
        if rank >= below:
            break
        at = pairs.index(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _ranks(spec: Mapping[str, Any]) -> tuple[dict[bytes, int], dict[str, int]]:
    """Bytes -> id of what merges can make, and text -> id of what they cannot."""
    vocab = spec["model"]["vocab"]
    made = {left + right for left, right in _merges(spec)} | {chr(c) for c in _byte_of_char()}
    control = {token["content"] for token in spec["added_tokens"]}
    reached = [token for token in vocab if token in made]
    # One translation of all tokens together, parted by a character that no byte is written as.
    parted = "\u2028".join(reached).translate(_byte_of_char()).split("\u2028")
    ranks = {text.encode("latin-1"): vocab[token] for token, text in zip(reached, parted, strict=True)}
    rest = {token: rank for token, rank in vocab.items() if token not in made and token not in control}
    return ranks, rest


def _byte_of_char() -> dict[int, int]:
    """Code point -> byte, in byte-level BPE's spelling: printable Latin-1 as itself, the rest from U+0100 on.

    Source: `bytes_to_unicode` in the GPT-2 release.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {byte: byte for byte in printable} | {0x100 + n: byte for n, byte in enumerate(others)}


def _merges(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges as pairs; older files write each as one string with a space."""
    merges = spec["model"]["merges"]
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges]  # type: ignore[misc]


def _is_byte_bpe(spec: Mapping[str, Any]) -> bool:
    """Whether tiktoken can express the file: every setting stands as Phi-4-mini's file has it."""
    model = spec["model"]
    plain = (
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    )
    control = [token["content"] for token in spec["added_tokens"]]
    return (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(setting) for setting in plain)
        and not spec.get("normalizer")
        and _pattern(spec) is not None
        and (spec.get("decoder") or {}).get("type") == "ByteLevel"
        and not any(
            token.get(flag) for token in spec["added_tokens"] for flag in ("lstrip", "single_word", "normalized")
        )
        and not any(a != b and b.startswith(a) for a in control for b in control)
    )


def _pattern(spec: Mapping[str, Any]) -> str | None:
    """The pattern that parts a text into pieces, where the pieces are all that is kept."""
    steps = (spec.get("pre_tokenizer") or {}).get("pretokenizers") or []
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = steps
    if split.get("behavior") != "Removed" or not split.get("invert"):
        return None
    if byte_level.get("add_prefix_space") or byte_level.get("use_regex", True):
        return None
    return split["pattern"].get("Regex")


def _known_to_agree(folder: Path, raw: bytes) -> bool:
    """Whether the file's hash is a known one, or the one that our converter has checked."""
    digest = hashlib.sha256(raw).hexdigest()
    if digest in _KNOWN_TO_AGREE:
        return True
    try:
        return read_json(folder / "manifest.json").get("tokenizer_merges_agree") == digest
    except ConfigError:
        return False


def _without_control(spec: Mapping[str, Any], control: set[str]) -> dict[str, Any]:
    """The same tokenizer, with no way to make a control token out of text."""
    model = dict(spec["model"])
    if isinstance(model.get("vocab"), dict):
        keep = model.get("unk_token")
        model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in control or t == keep}
    if "merges" in model:
        model["merges"] = [list(pair) for pair in _merges(spec) if "".join(pair) not in control]
    return {**spec, "model": model, "added_tokens": []}


def _check_added_tokens(spec: Any) -> None:
    tokens = spec.get("added_tokens") if isinstance(spec, dict) else None
    if not isinstance(tokens, list) or not isinstance(spec.get("model"), dict):
        raise TokenizerError("tokenizer.json holds no model with added_tokens; it is no tokenizer of this family")
    for token in tokens:
        if (
            type(token["id"]) is not int
            or token["id"] < 0
            or not isinstance(token["content"], str)
            or not token["content"]
        ):
            raise TokenizerError(f"tokenizer.json: added token {token!r:.100} has no id and text")


def _eos_ids(folder: Path) -> set[int]:
    """`eos_token_id` of both files; either may be absent, a number or a list."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).exists():
            continue
        value = read_json(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise TokenizerError(f"{folder / name}: eos_token_id {value!r} is neither a token id nor a list of them")
        found.update(ids)
    return found


def _whole(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, as tiktoken has it; no UTF-8 can hold one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
