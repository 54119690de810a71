"""The tokenizer of a model of mlx-lm behind the interface of ours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, SupportsIndex

from phi4_mlx.errors import RequestError, message_of
from phi4_mlx.tokens.prompt import Prompt
from phi4_mlx.tokens.tokenizer import Tokenizer


class ComparatorTokenizer(Tokenizer):
    """mlx-lm's tokenizer, with ours' methods.

    Args:
        wrapper: a `TokenizerWrapper` from `mlx_lm.load`.
    """

    def __init__(self, wrapper: Any):
        self._wrapper = wrapper
        added = [{"content": str(token), "id": number} for number, token in wrapper.added_tokens_decoder.items()]
        super().__init__(added, {}, wrapper.eos_token_ids)
        self.vocab_size = len(wrapper.get_vocab())
        self.start_id = wrapper.bos_token_id
        self.chat_format = _Template(wrapper)

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """See `Tokenizer.encode`; with `specials`, a text begins with the model's start token, if it has one."""
        if not specials:
            ids = self._wrapper.encode(text, add_special_tokens=False, split_special_tokens=True)
        else:
            begun = bool(self._wrapper.bos_token) and text.startswith(self._wrapper.bos_token)
            ids = self._wrapper.encode(text, add_special_tokens=not begun)
        return list(ids)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """See `Tokenizer.decode`."""
        text: str = self._wrapper.decode([index(token) for token in ids], skip_special_tokens=False)
        return text

    def streaming_decoder(self) -> Any:
        """See `Tokenizer.streaming_decoder`."""
        return _Streaming(self._wrapper.detokenizer)

    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary, the chat template and the ids that end a turn."""
        parts = [sorted(self._wrapper.get_vocab().items()), self._wrapper.chat_template, sorted(self.eos_ids)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _Streaming:
    """mlx-lm's streaming detokenizer as a `StreamingDecoder`."""

    def __init__(self, detokenizer: Any):
        self._detokenizer = detokenizer
        detokenizer.reset()

    def add(self, token: int) -> str:
        """The text that a token makes final."""
        self._detokenizer.add_token(token)
        return str(self._detokenizer.last_segment)

    def finish(self) -> str:
        """The rest of the text."""
        self._detokenizer.finalize()
        return str(self._detokenizer.last_segment)


class _Template:
    """A chat template of Hugging Face as a `ChatFormat`, as far as an evaluation uses it; a model may have none."""

    name = "template"

    def __init__(self, wrapper: Any):
        self._wrapper = wrapper
        self.reasons = bool(wrapper.has_thinking)

    def render(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """See `ChatFormat.render`."""
        return self._ids(messages, tools=tools or None, add_generation_prompt=add_generation_prompt)

    def render_open(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """See `ChatFormat.render_open`."""
        return self._ids(messages, add_generation_prompt=False, continue_final_message=True)

    def append(self, tokenizer: Tokenizer, ids: list[int], messages: Any, add_generation_prompt: bool = True) -> None:
        """A template renders whole conversations alone."""
        raise RequestError("the chat template of a comparator cannot continue a conversation")

    def length(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> int:
        """See `ChatFormat.length`."""
        return len(self._ids(messages, add_generation_prompt=False))

    def own_words(self, tokenizer: Tokenizer, ids: Sequence[int]) -> list[bool]:
        """A template does not tell turns apart."""
        raise RequestError("the chat template of a comparator does not tell turns apart")

    def _ids(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Prompt:
        if not self._wrapper.has_chat_template:
            raise RequestError("the model has no chat template; --no-apply-chat-template asks in plain text")
        try:
            return Prompt(self._wrapper.apply_chat_template([dict(each) for each in messages], **options))
        except Exception as error:  # a template may raise anything
            raise RequestError(f"the chat template of the model refuses the messages: {message_of(error)}") from None
