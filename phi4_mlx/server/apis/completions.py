"""OpenAI's /v1/completions: parses its JSON into an `Ask`, and formats answers and streams.

Source: https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.apis.answer import FINISH_REASONS, ChunkAnswer
from phi4_mlx.server.apis.body import (
    API_SAMPLING,
    demands_format,
    read_max_tokens,
    read_model,
    read_priority,
    read_response_format,
    read_sampling,
    read_stop,
)
from phi4_mlx.server.apis.fields import Fields, read_body, shown
from phi4_mlx.server.apis.wire import Ask, Delta, End, finite, token_text
from phi4_mlx.server.engine.protocol import TokenLogprob
from phi4_mlx.server.limits import ANSWERS_LIMIT, PROMPTS_LIMIT, TOP_LOGPROBS_LIMIT

DEFAULT_MAX_TOKENS = 16  # OpenAI's default if max_tokens is absent; null asks for as many as fit


def parse(body: Any, vocabulary: int, defaults: Sampling = API_SAMPLING, media: bool = False) -> Ask:
    """Parses a body.

    Args:
        body: the result of `json.loads`.
        vocabulary: the number of token ids.
        defaults: of the sampling settings.
        media: not used; prompts are text or token ids.

    Raises:
        WireError: the body is malformed, exceeds a limit, or asks for something that is not supported; names the field.
    """
    fields = read_body(body)
    fields.forbid("this model only continues a text; it does not fill gaps", "suffix")
    n = fields.integer("n", 1, 1, ANSWERS_LIMIT)
    if fields.get("best_of") not in (None, n):  # the server returns every answer it generates
        fields.ignore("best_of")
    echo = fields.boolean("echo", False)
    top_logprobs = _top_logprobs(fields)
    if echo and top_logprobs is not None:
        fields.refuse("logprobs", "does not work with echo: there are no log-probabilities of the prompt's tokens")
    prompts = _read_prompts(fields, vocabulary)
    if len(prompts) * n > PROMPTS_LIMIT:
        fields.refuse("prompt", f"times n asks for {len(prompts) * n:,} answers; at most {PROMPTS_LIMIT} at once")
    return Ask(
        model=read_model(fields),
        prompts=prompts,
        response_format=read_response_format(fields),
        strict=demands_format(fields),
        sampling=read_sampling(fields, vocabulary, defaults),
        max_tokens=read_max_tokens(fields) if "max_tokens" in fields.values else DEFAULT_MAX_TOKENS,
        stop=read_stop(fields),
        n=n,
        priority=read_priority(fields),
        stream=fields.boolean("stream", False),
        include_usage=fields.child("stream_options").boolean("include_usage", False),
        top_logprobs=top_logprobs,
        echo=echo,
        ignored=fields.ignored.paths(),  # last, when all else is read
    )


def _top_logprobs(fields: Fields) -> int | None:
    """The number of alternatives; some clients send true or false, as for chat completions."""
    if isinstance(fields.get("logprobs"), bool):
        return 0 if fields.get("logprobs") else None
    return fields.integer("logprobs", None, 0, TOP_LOGPROBS_LIMIT)


def _read_prompts(fields: Fields, vocabulary: int) -> list[str | list[int]]:
    """The prompts: one text or list of ids, or a list of either."""
    fields.need("prompt")
    value = fields.get("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not value:
        fields.refuse("prompt", f"must be text, token ids, or a list of either, not {shown(value)}")
    if len(value) > PROMPTS_LIMIT:
        fields.refuse("prompt", f"must be at most {PROMPTS_LIMIT} prompts, not {len(value):,}")
    for prompt in value:
        if not isinstance(prompt, (str, list)) or type(prompt) is not type(value[0]):
            fields.refuse("prompt", f"must be all text or all token ids, but contains {shown(prompt)}")
        if not prompt:
            fields.refuse("prompt", "must not be empty")
        if isinstance(prompt, list):
            _check_ids(fields, prompt, vocabulary)
    return value


def _check_ids(fields: Fields, ids: Iterable[Any], vocabulary: int) -> None:
    for token in ids:
        if type(token) is not int or not 0 <= token < vocabulary:
            fields.refuse("prompt", f"must have token ids from 0 to {vocabulary - 1:,}, not {shown(token)}")


@dataclass
class CompletionAnswer(ChunkAnswer):
    """Answers as a text_completion, or as a stream of text_completion chunks.

    Attributes:
        prompt_texts: the prompts as text, for an `Ask` with echo.
    """

    prompt_texts: Sequence[str] = ()

    id_prefix = "cmpl-"
    chunk_object = "text_completion"

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.ask.n * len(self.ask.prompts)
        self._echoes = [self.prompt_texts[index // self.ask.n] if self.ask.echo else "" for index in range(count)]
        self._tokens = [_TokenList() for _ in range(count)]

    def body(self, items: Iterable[Delta | End]) -> JsonObject:
        """A text_completion."""
        answers = self.collect(items, len(self._echoes))
        choices = [
            self._choice(index, echo + answer.text, answer.logprobs, FINISH_REASONS[answer.end.reason])
            for index, (echo, answer) in enumerate(zip(self._echoes, answers, strict=True))
        ]
        return {**self.head(self.chunk_object), "choices": choices, "usage": self.usage(answers)}

    def opening(self) -> bytes:
        """The prompts, if the client asked for their echo."""
        return b"".join(self.event(self._choice(index, echo)) for index, echo in enumerate(self._echoes) if echo)

    def chunk(self, item: Delta | End) -> bytes:
        """A chunk with text, or one with the finish reason."""
        if isinstance(item, End):
            self.ends.append(item)
            return self.event(self._choice(item.index, "", reason=FINISH_REASONS[item.reason]))
        if not item.text and (self.ask.top_logprobs is None or not item.logprobs):
            return b""
        return self.event(self._choice(item.index, item.text, item.logprobs))

    def _choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob] = (), reason: str | None = None
    ) -> JsonObject:
        tokens = None if self.ask.top_logprobs is None else self._tokens[index].add(logprobs)
        return {"index": index, "text": text, "logprobs": tokens, "finish_reason": reason}


class _TokenList:
    """An answer's tokens in the form of completions: four lists, among them each token's offset in the text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # in characters

    def add(self, tokens: Sequence[TokenLogprob]) -> JsonObject:
        """The lists for the next tokens."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(token.text))
        return {
            "tokens": [token_text(token.text) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {token_text(text): finite(logprob) for text, logprob in (*token.top, (token.text, token.logprob))}
                for token in tokens
            ],
            "text_offset": offsets,
        }
