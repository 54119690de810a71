"""The tokenizer of a checkpoint: tiktoken where it gives the ids of tokenizer.json, else the `tokenizers` library.

Both backends have one interface. Plain text never becomes a control token: control ids come only from `Control` pieces,
or from `encode(text, specials=True)`, which reads a text as Hugging Face does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any, Protocol, SupportsIndex

from phi4_mlx.errors import CheckpointError, RequestError, TokenizerError, message_of
from phi4_mlx.files.json_file import read_json
from phi4_mlx.files.manifest import read_manifest
from phi4_mlx.files.regular_file import TOKENIZER_BYTES, read_regular
from phi4_mlx.tokens import byte_bpe
from phi4_mlx.tokens.decoders import FallbackByte, FallbackDecoder, StreamingDecoder
from phi4_mlx.tokens.prompt import READS_ONLY_TEXT, MediaSettings, Medium, Prompt, slots
from phi4_mlx.tokens.white_space import WHITE_SPACE, longest_run_exceeds

# Markers that end a turn in this family; config.json often names only one of them.
_END_MARKERS = ("<|end|>", "<|endoftext|>", "<|im_end|>")
# tiktoken's pattern engine panics on a run of a million white-space characters.
_LONGEST_RUN = 500_000
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# The decoder of this family's SentencePiece-style files; _STRIP follows where encoding adds a leading space.
_SENTENCEPIECE = [
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
]  # fmt: skip
_STRIP = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
_MAX_IDS = 2**24  # far above any vocabulary; tiktoken's ids have 32 bits
_LONGEST_TOKEN = 1000  # characters; o200k's longest token has 128


class Control(str):
    """The text of a control token, as a piece of a prompt; a piece that is a plain `str` is text only."""


class ChatFormat(Protocol):
    """Messages to ids; implemented in `phi4_mlx.tokens.chat_format`."""

    name: str
    reasons: bool

    def render(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> Prompt: ...
    def render_open(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> Prompt: ...
    def append(
        self,
        tokenizer: Tokenizer,
        ids: list[int],
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
    ) -> None: ...
    def length(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> int: ...
    def own_words(self, tokenizer: Tokenizer, ids: Sequence[int]) -> list[bool]: ...


class Tokenizer:
    """The interface and the common part of the two backends.

    Attributes:
        control_ids: the added tokens, text -> id.
        eos_ids: ids that end a turn, from generation_config.json, config.json and the family.
        vocab_size: one more than the highest id with a text.
        leading_spaces: number of spaces that decoding removes from the start of a text; 1 if encoding adds one.
        chat_format: renders messages; set by `load`.
        media: what the model reads beside text; None for text alone; set by `load`.
    """

    chat_format: ChatFormat
    media: MediaSettings | None = None
    leading_spaces = 0

    def __init__(
        self, added_tokens: Sequence[Mapping[str, Any]], texts: Mapping[int, bytes], eos_ids: Iterable[int] = ()
    ):
        self.control_ids: dict[str, int] = {token["content"]: token["id"] for token in added_tokens}
        self._texts = {**texts, **{token: text.encode() for text, token in self.control_ids.items()}}
        self._strips_left = {token["content"] for token in added_tokens if token.get("lstrip")}
        self._strips_right = {token["content"] for token in added_tokens if token.get("rstrip")}
        self.vocab_size = 1 + max(self._texts, default=-1)
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        markers = {self.control_ids[text] for text in _END_MARKERS if text in self.control_ids}
        self.eos_ids = frozenset(markers | set(eos_ids))

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Encodes a text.

        Args:
            text: any text; half a surrogate pair counts as U+FFFD.
            specials: reads control strings in the text as control tokens, as Hugging Face does, and removes the white
                space beside a token with lstrip or rstrip. By default control strings are ordinary text.

        Returns:
            Token ids [T], without a start or end token.

        Raises:
            RequestError: the text contains more than 500,000 consecutive white-space characters.
        """
        return self._encode_specials(text) if specials else self._encode_plain(text, at_start=True)

    def encode_pieces(self, pieces: Iterable[Control | str | Medium]) -> Prompt:
        """Encodes a prompt of control tokens, texts and media to the ids that Hugging Face gives for its whole text.

        White space beside a control token with lstrip or rstrip is removed; adjacent texts are joined.

        Args:
            pieces: in the order of the prompt.

        Returns:
            Token ids [T], with a medium's slots in its place.

        Raises:
            RequestError: as in `encode`; or there is a medium, and the model reads only text.
            TokenizerError: the tokenizer lacks one of the control tokens.
        """
        ids = Prompt()
        texts: list[str] = []
        before: Control | Medium | None = None
        for piece in [*pieces, None]:
            if isinstance(piece, str) and not isinstance(piece, Control):
                texts.append(piece)
                continue
            text = "".join(texts)
            if before in self._strips_right:
                text = text.lstrip(WHITE_SPACE)
            if piece in self._strips_left:
                text = text.rstrip(WHITE_SPACE)
            ids += self._encode_plain(text, at_start=before is None) if text else []
            if isinstance(piece, Control):
                ids.append(self._control_id(piece))
            elif piece is not None:
                ids += slots(piece, self._media_settings(piece).token(piece.kind))
            texts, before = [], piece
        return ids

    def parts(self, text: str) -> list[Control | str]:
        """Splits a trusted text at its control strings: the leftmost first, and the longest at one place."""
        texts_and_controls = self._control.split(text)  # text, control, text, control, ..., text
        return [Control(part) if n % 2 else part for n, part in enumerate(texts_and_controls)]

    def _control_id(self, piece: str) -> int:
        if piece not in self.control_ids:
            raise TokenizerError(
                f"this tokenizer lacks {piece!r}, which the chat format uses; choose another with --chat-format"
            )
        return self.control_ids[piece]

    def _media_settings(self, medium: Medium) -> MediaSettings:
        if self.media is None:
            raise RequestError(f"the prompt has {medium.kind} input, and this model {READS_ONLY_TEXT}")
        return self.media

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Encodes a conversation in the model's own chat format.

        Args:
            messages: each {"role": "system" | "user" | "assistant" | "tool", "content": text or parts}; see
                `phi4_mlx.tokens.messages.check_messages`.
            tools: OpenAI tools or flat schemas, shown to the model in the system turn.
            add_generation_prompt: ends with the start of the assistant's turn.

        Returns:
            Token ids [T].

        Raises:
            RequestError: a message or a tool is malformed; names it.
            TokenizerError: the tokenizer lacks a control token of the format.
        """
        return self.chat_format.render(self, messages, tools, add_generation_prompt)

    def token_bytes(self, token: SupportsIndex) -> bytes:
        """The bytes of a token's text; empty for an id without text."""
        return self._texts.get(index(token), b"")  # a scalar of MLX equals its number but hashes differently

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Decodes ids to text: control tokens as their own text, ids without text as nothing, bad UTF-8 as U+FFFD.

        Args:
            ids: [T], a list, or an array of MLX or NumPy.
        """
        decoder = self.streaming_decoder()
        return "".join(map(decoder.add, ids)) + decoder.finish()

    def streaming_decoder(self) -> StreamingDecoder:
        """A decoder for one answer; its texts, joined, equal `decode` of all the ids."""
        return StreamingDecoder(self.token_bytes)

    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary: the text of each id, the control tokens and the end-of-turn ids."""
        ids = sorted(self._texts)
        texts = [self._texts[token] for token in ids]
        marks = sorted(self.control_ids.values()), sorted(self.eos_ids)
        return hashlib.sha256(repr((ids, [*map(len, texts)], marks)).encode() + b"".join(texts)).hexdigest()

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        """Ids of plain text; `at_start` if no control token precedes it."""
        raise NotImplementedError

    def _encode_specials(self, text: str) -> list[int]:
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """A byte-level BPE in tiktoken."""

    def __init__(self, spec: Mapping[str, Any], ranks: Mapping[bytes, int], eos_ids: Iterable[int] = ()):
        import tiktoken

        try:
            pattern = byte_bpe.pattern(spec) or ""
            self._encoding = tiktoken.Encoding("phi4", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})
        except ValueError as error:
            raise TokenizerError(f"tokenizer.json: its pattern cannot be read: {error}") from None
        self.encode("")  # fails now if the pattern matches an empty text
        texts = {rank: data for data, rank in ranks.items()}
        # A re-upload may list an ordinary token, such as U+FFFD's, among the added ones; it stays ordinary.
        added_tokens = [token for token in spec["added_tokens"] if token["id"] not in texts]
        for entry, rank in spec["model"]["vocab"].items():
            if rank not in texts:  # no merge makes it: it is decoded, but never encoded
                texts[rank] = byte_bpe.token_bytes(entry)
        super().__init__(added_tokens, texts, eos_ids)

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        if longest_run_exceeds(text, _LONGEST_RUN):
            raise RequestError(
                f"the text has more than {_LONGEST_RUN:,} consecutive white-space characters; shorten that run"
            )
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise TokenizerError(f"tokenizer.json: tiktoken cannot use its pattern: {error}") from None

    def _encode_specials(self, text: str) -> list[int]:
        return [*self.encode_pieces(self.parts(text))]  # a list: a slot in it has no medium


class LibraryTokenizer(Tokenizer):
    """Any other BPE, such as Phi-3.5-mini's SentencePiece-style one, in the `tokenizers` library.

    Plain text is encoded by a second copy that has no added tokens and cannot make one by merging.
    """

    def __init__(self, spec: Mapping[str, Any], eos_ids: Iterable[int] = ()):
        for setting in ("continuing_subword_prefix", "end_of_word_suffix"):
            if spec["model"].get(setting):
                raise TokenizerError(
                    f"tokenizer.json: {setting} {spec['model'][setting]!r:.60} is not of this family; it must be empty"
                )
        decoder = spec.get("decoder") or {}
        steps = decoder.get("decoders")
        self._byte_level = decoder.get("type") == "ByteLevel"
        if not self._byte_level and steps not in (_SENTENCEPIECE, _SENTENCEPIECE + _STRIP):
            raise TokenizerError(f"tokenizer.json: decoder {decoder.get('type')!r} is not one of this family's")
        self.leading_spaces = int(steps == _SENTENCEPIECE + _STRIP)
        bytes_of = byte_bpe.token_bytes if self._byte_level else _sentencepiece_bytes
        texts = {token: bytes_of(entry) for entry, token in spec["model"]["vocab"].items()}
        super().__init__(spec["added_tokens"], texts, eos_ids)
        # The library decodes an added token like any other entry.
        self._texts |= {token: bytes_of(text) for text, token in self.control_ids.items()}
        plain = _without_control(spec, set(self.control_ids))
        self._library = _library(spec)
        self._plain = self._plain_inside = _library(plain)
        before = spec.get("pre_tokenizer") or {}
        if before.get("prepend_scheme") == "first":  # only text at the start of a prompt gets a space
            self._plain_inside = _library({**plain, "pre_tokenizer": {**before, "prepend_scheme": "never"}})
        for text, token in self.control_ids.items():
            if self._library.token_to_id(text) != token:
                raise TokenizerError(
                    f"tokenizer.json: added token {text!r} has id {token}, which is not the next free id"
                )

    def streaming_decoder(self) -> StreamingDecoder:
        """As `Tokenizer`."""
        if self._byte_level:
            return StreamingDecoder(self.token_bytes)
        return FallbackDecoder(self.token_bytes, drop_space=self.leading_spaces == 1)

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        return _library_ids(self._plain if at_start else self._plain_inside, text)

    def _encode_specials(self, text: str) -> list[int]:
        return _library_ids(self._library, text)


def load_tokenizer(folder: Path, prove: bool = False) -> Tokenizer:
    """Reads tokenizer.json, and the end-of-turn ids from generation_config.json and config.json.

    Args:
        folder: the checkpoint's.
        prove: checks that tiktoken merges as the file says, even if the manifest records that it does. The converter,
            which writes that record, needs this.

    Raises:
        TokenizerError: a file is missing or damaged.
        ConfigError: generation_config.json or config.json is damaged.
    """
    path = folder / "tokenizer.json"
    try:
        raw = read_regular(path, TOKENIZER_BYTES)
        spec, merged = byte_bpe.parse(raw)
    except FileNotFoundError:
        raise TokenizerError(f"{path} does not exist; vocab.json and merges.txt are not enough") from None
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from None
    eos_ids = _eos_ids(folder)
    try:
        if not merged:  # else its hash is known
            _check_ids(spec)
        _check_added_tokens(spec)
        agree = merged or (not prove and _recorded_to_agree(folder, raw))
        if _tiktoken_can_express(spec) and (agree or byte_bpe.merges_agree(spec)):
            return ByteTokenizer(spec, byte_bpe.ranks(spec, merged), eos_ids)
        return LibraryTokenizer(json.loads(raw) if merged else spec, eos_ids)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, RecursionError) as error:
        raise TokenizerError(f"{path} does not have a tokenizer's layout: {type(error).__name__} {error}") from None


def _tiktoken_can_express(spec: Mapping[str, Any]) -> bool:
    """True if tiktoken can split the text, and `ByteTokenizer` can find the control tokens in it."""
    return byte_bpe.pattern(spec) is not None and not any(
        token.get("single_word") or token.get("normalized") or token["content"] != token["content"].strip()
        for token in spec["added_tokens"]
    )


def _recorded_to_agree(folder: Path, raw: bytes) -> bool:
    """True if our converter recorded for exactly this file that its merges agree."""
    try:
        recorded = read_manifest(folder).get("tokenizer_merges_agree")
    except CheckpointError:
        return False
    return recorded == hashlib.sha256(raw).hexdigest()


def _check_ids(spec: Any) -> None:
    for text, number in spec["model"]["vocab"].items():
        if type(number) is not int or not 0 <= number < _MAX_IDS or len(text) > _LONGEST_TOKEN:
            raise TokenizerError(
                f"tokenizer.json: {text!r:.60} has id {number!r:.40}; ids are whole numbers below {_MAX_IDS:,}, and "
                f"texts have at most {_LONGEST_TOKEN:,} characters"
            )


def _check_added_tokens(spec: Any) -> None:
    tokens = spec.get("added_tokens") if isinstance(spec, dict) else None
    if not isinstance(tokens, list) or not isinstance(spec.get("model"), dict):
        raise TokenizerError("tokenizer.json lacks model or added_tokens; it is not a tokenizer of this family")
    ids: dict[str, int] = dict(spec["model"]["vocab"])
    texts = {token: text for text, token in ids.items()}
    for token in tokens:
        text, number = token["content"], token["id"]
        is_id = type(number) is int and 0 <= number < _MAX_IDS
        is_text = isinstance(text, str) and 0 < len(text) <= _LONGEST_TOKEN and text == _whole(text)
        if not is_id or not is_text:
            raise TokenizerError(f"tokenizer.json: added token {token!r:.100} lacks an id or a text")
        if ids.setdefault(text, number) != number or texts.setdefault(number, text) != text:
            raise TokenizerError(f"tokenizer.json: added token {text!r:.60} has id {number}; that id or text is taken")


def _eos_ids(folder: Path) -> set[int]:
    """`eos_token_id` of both files; it may be absent, a number or a list."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if not os.path.lexists(folder / name):
            continue
        value = read_json(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token < _MAX_IDS for token in ids):
            raise TokenizerError(f"{folder / name}: eos_token_id {value!r:.60} is neither a token id nor a list of ids")
        found.update(ids)
    return found


def _library(spec: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer as Library

    # Both settings are for training batches, and would cut or pad a prompt.
    text = json.dumps({**spec, "truncation": None, "padding": None})
    with _library_errors():
        return Library.from_str(text)


def _library_ids(library: Any, text: str) -> list[int]:
    with _library_errors():
        return list(library.encode(_whole(text), add_special_tokens=False).ids)


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """Reports what the library cannot read, or cannot work with."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):  # the library has no more specific class
            raise
        raise TokenizerError(f"tokenizer.json cannot be used: {message_of(error)}") from None


def _is_panic(error: BaseException) -> bool:
    """True for a panic of Rust's: a BaseException, which no module exports."""
    return type(error).__name__ == "PanicException"


def _sentencepiece_bytes(entry: str) -> bytes:
    byte = _BYTE_FALLBACK.fullmatch(entry)
    return FallbackByte([int(byte[1], 16)]) if byte else entry.replace("\u2581", " ").encode(errors="replace")


def _without_control(spec: Mapping[str, Any], control: set[str]) -> dict[str, Any]:
    """The same tokenizer, unable to make a control token from text."""
    model = spec["model"]
    keep = control - {model.get("unk_token")}
    vocab = {text: token for text, token in model["vocab"].items() if text not in keep}
    merges = [[a, b] for a, b in byte_bpe.merge_pairs(spec) if not {a, b, a + b} & control]
    return {**spec, "model": {**model, "vocab": vocab, "merges": merges}, "added_tokens": []}


def _whole(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, as in tiktoken; UTF-8 cannot encode one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
