"""A tokenizer's vocabulary in llguidance's form, made once for each tokenizer."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.grammar.way_out import Paths
from phi4_mlx.tokens.decoders import FallbackByte
from phi4_mlx.tokens.tokenizer import Tokenizer


class Vocabulary:
    """A tokenizer for llguidance, made in 0.6 s for 200,000 tokens.

    Attributes:
        library: llguidance's own tokenizer.
        size: one more than the highest id.
        eos: ids that end a turn, ascending.
        end: the id of `eos` that is added where nothing else may follow.
        paths: finds ways to the end of an answer.

    Raises:
        RequestError: the tokenizer has no token that ends a turn.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.size = tokenizer.vocab_size
        self.eos = sorted(token for token in tokenizer.eos_ids if token < self.size)
        if not self.eos:
            raise RequestError("this tokenizer has no token that ends a turn, so an answer could not end")
        end = tokenizer.control_ids.get("<|end|>")
        self.end = end if end in self.eos else self.eos[0]
        texts = [bytes(tokenizer.token_bytes(token)) for token in range(self.size)]
        # Some vocabularies list control strings as ordinary entries, although text never becomes one.
        controls = {n for n, text in enumerate(texts) if text.startswith(b"<|") and text.endswith(b"|>")}
        controls |= {*tokenizer.control_ids.values(), *self.eos}
        single = [token for token, text in enumerate(texts) if len(text) == 1 and token not in controls]
        # Where two tokens are the same byte, the last counts: the one that is not a fallback byte.
        single.sort(key=lambda token: not isinstance(tokenizer.token_bytes(token), FallbackByte))
        of_byte = {texts[token][0]: token for token in single}
        self.paths = Paths([b"" if n in controls else text for n, text in enumerate(texts)], of_byte, self.end)

        from llguidance import LLTokenizer

        wrapper: Any = _Wrapper(tokenizer, texts, sorted(controls), of_byte, self.eos[0])
        self.library = LLTokenizer(wrapper, n_vocab=self.size, eos_token=self.eos)


class _Wrapper:
    """The interface that llguidance requires of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], of_byte: dict[int, int], end: int
    ):
        self._tokenizer = weakref.proxy(tokenizer)  # `_known` must not keep its own key alive
        self.eos_token_id = end
        self.tokens, self.special_token_ids = tokens, special
        self._of_byte = of_byte

    def __call__(self, text: str) -> list[int]:
        """Ids of text inside an answer, without the space that some tokenizers add at the start of a text."""
        data = text.encode()
        for before in ("", "\n"):
            ids: list[int] = self._tokenizer.encode(before + text)
            for start in range(min(3, len(ids))):
                if b"".join(self.tokens[token] for token in ids[start:]) == data:
                    return ids[start:]
        return [self._of_byte[byte] for byte in data]


_known: weakref.WeakKeyDictionary[Tokenizer, Vocabulary] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer, made at its first use.

    Raises:
        RequestError: the tokenizer has no token that ends a turn.
    """
    with _making:
        if tokenizer not in _known:
            _known[tokenizer] = Vocabulary(tokenizer)
        return _known[tokenizer]
