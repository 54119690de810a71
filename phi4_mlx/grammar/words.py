"""A tokenizer as llguidance has it, and how an answer that is held to a grammar comes to its end.

llguidance says what may come next and not how far the end is, so the way there is walked on a copy of its state, from
what is forced to what looks nearest to an end. It knows how JSON is written; any other grammar it gets through by luck.
"""

from __future__ import annotations

import weakref
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.grammar.way_out import Paths
from phi4_mlx.tokens.tokenizer import FallbackByte, Tokenizer


class Words:
    """A tokenizer as llguidance has it, made in 0.6 s for 200,000 tokens.

    Attributes:
        library: llguidance's own.
        size: one more than the highest id.
        eos: ids that end a turn.
        end: the one of them that is put where nothing else may follow.
        paths: finds ways to the end of an answer.
    """

    def __init__(self, tokenizer: Tokenizer):
        if not tokenizer.eos_ids:
            raise RequestError("this tokenizer has no token that ends a turn, and an answer could not end")
        self.size = tokenizer.vocab_size
        self.eos = sorted(tokenizer.eos_ids)
        end = tokenizer.control_ids.get("<|end|>")
        self.end = end if end in self.eos else self.eos[0]
        texts = [bytes(tokenizer.token_bytes(token)) for token in range(self.size)]
        # Some vocabularies list control strings as ordinary entries; no text becomes one.
        controls = {n for n, text in enumerate(texts) if text.startswith(b"<|") and text.endswith(b"|>")}
        controls |= {*tokenizer.control_ids.values(), *self.eos}
        single = [token for token, text in enumerate(texts) if len(text) == 1 and token not in controls]
        single.sort(key=lambda token: not isinstance(tokenizer.token_bytes(token), FallbackByte))  # last one counts
        of_byte = {texts[token][0]: token for token in single}
        self.paths = Paths([b"" if n in controls else text for n, text in enumerate(texts)], of_byte, self.end)

        from llguidance import LLTokenizer

        wrapper: Any = _Wrapper(tokenizer, texts, sorted(controls), of_byte)
        self.library = LLTokenizer(wrapper, n_vocab=self.size, eos_token=self.eos)


class _Wrapper:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], of_byte: dict[int, int]):
        self._tokenizer = weakref.proxy(tokenizer)  # which is the key that all this is kept by
        self.eos_token_id = min(tokenizer.eos_ids)
        self.tokens, self.special_token_ids = tokens, special
        self._of_byte = of_byte

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that comes within an answer: without the space that some tokenizers put at a start."""
        data = text.encode()
        for before in ("", "\n"):
            ids: list[int] = self._tokenizer.encode(before + text)
            for start in range(min(3, len(ids))):
                if b"".join(self.tokens[token] for token in ids[start:]) == data:
                    return ids[start:]
        return [self._of_byte[byte] for byte in data]


_known: weakref.WeakKeyDictionary[Tokenizer, Words] = weakref.WeakKeyDictionary()


def words_of(tokenizer: Tokenizer) -> Words:
    """The words of a tokenizer, made once."""
    if tokenizer not in _known:
        _known[tokenizer] = Words(tokenizer)
    return _known[tokenizer]


