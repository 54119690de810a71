"""OpenAI's /v1/completions: its JSON -> `Ask`, and answers -> its JSON and its stream.

Source: https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from phi4_mlx.server.apis.body import (
    ANSWERS_LIMIT,
    TOP_LOGPROBS_LIMIT,
    Fields,
    read_body,
    read_max_tokens,
    read_model,
    read_response_format,
    read_sampling,
    read_stop,
    shown,
)
from phi4_mlx.server.apis.wire import (
    DONE,
    FINISH,
    Answer,
    Ask,
    Delta,
    End,
    Usage,
    WireError,
    error_body,
    finite,
    sse,
    token_text,
)
from phi4_mlx.server.engine.protocol import TokenLogprob

PROMPTS_LIMIT = 128  # in one request, each counted as often as it is answered
DEFAULT_MAX_TOKENS = 16  # OpenAI's, for a body that says nothing; null asks for as many as fit


def parse(body: Any, vocabulary: int) -> Ask:
    """What a body asks for.

    Args:
        body: as `json.loads` made it.
        vocabulary: how many token ids there are.

    Raises:
        WireError: it asks for what is malformed, too much, or not done here; says which field.
    """
    fields = read_body(body)
    fields.forbid("the model goes on where a text ends, and fills no gaps", "suffix")
    n = fields.whole("n", 1, 1, ANSWERS_LIMIT)
    if fields.whole("best_of", n, 1, ANSWERS_LIMIT) != n:
        fields.refuse("best_of", f"must be n, which is {n}; every answer that is drawn is given")
    echo = fields.boolean("echo", False)
    top_logprobs = fields.whole("logprobs", None, 0, TOP_LOGPROBS_LIMIT)
    if echo and top_logprobs is not None:
        fields.refuse("logprobs", "cannot be had with echo: only an answer's tokens are measured, not the prompt's")
    prompts = _read_prompts(fields, vocabulary)
    if len(prompts) * n > PROMPTS_LIMIT:
        fields.refuse("prompt", f"times n asks for {len(prompts) * n:,} answers; at most {PROMPTS_LIMIT} at once")
    return Ask(
        model=read_model(fields),
        prompts=prompts,
        response_format=read_response_format(fields),
        sampling=read_sampling(fields, vocabulary),
        max_tokens=read_max_tokens(fields) if "max_tokens" in fields.values else DEFAULT_MAX_TOKENS,
        stop=read_stop(fields),
        n=n,
        stream=fields.boolean("stream", False),
        include_usage=fields.child("stream_options").boolean("include_usage", False),
        top_logprobs=top_logprobs,
        echo=echo,
    )


def _read_prompts(fields: Fields, vocabulary: int) -> list[str | list[int]]:
    """One text, several, one list of ids, or several."""
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
            fields.refuse("prompt", f"must be all text or all token ids, and holds {shown(prompt)}")
        if not prompt:
            fields.refuse("prompt", "must not be empty")
        if isinstance(prompt, list):
            wrong = next((it for it in prompt if type(it) is not int or not 0 <= it < vocabulary), None)
            if wrong is not None or None in prompt:
                fields.refuse("prompt", f"must hold token ids from 0 to {vocabulary - 1:,}, not {shown(wrong)}")
    return value


class CompletionAnswer(Answer):
    """Answers as text_completion, whole or in a stream of the same.

    `prompt_texts` are the prompts as text, for an Ask that wants their echo.
    """

    def __init__(self, *args: Any, prompt_texts: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self._id = self.make_id("cmpl-")
        count = self.ask.n * len(self.ask.prompts)
        self._echoes = [prompt_texts[index // self.ask.n] if self.ask.echo else "" for index in range(count)]
        self._tokens = [_TokenList() for _ in range(count)]
        self._ends: list[End] = []

    def whole(self, items: Iterable[Delta | End]) -> dict[str, Any]:
        """A text_completion."""
        texts = [[echo] for echo in self._echoes]
        logprobs: list[list[TokenLogprob]] = [[] for _ in texts]
        ends = [End(index) for index in range(len(texts))]
        for item in items:
            if isinstance(item, End):
                ends[item.index] = item
            else:
                texts[item.index].append(item.text)
                logprobs[item.index] += item.logprobs
        choices = [
            self._choice(end.index, "".join(texts[end.index]), logprobs[end.index], FINISH[end.reason]) for end in ends
        ]
        return {**self._head(), "choices": choices, "usage": Usage.of(ends, self.ask.n).openai()}

    def opening(self) -> bytes:
        """The prompts, if their echo was asked for."""
        return b"".join(self._event(index, echo) for index, echo in enumerate(self._echoes) if echo)

    def chunk(self, item: Delta | End) -> bytes:
        """More text, or the reason of the end."""
        if isinstance(item, End):
            self._ends.append(item)
            return self._event(item.index, "", reason=FINISH[item.reason])
        if not item.text and (self.ask.top_logprobs is None or not item.logprobs):
            return b""
        return self._event(item.index, item.text, item.logprobs)

    def closing(self) -> bytes:
        """The count of tokens, if it was asked for, and the end."""
        usage = Usage.of(self._ends, self.ask.n).openai()
        told = sse({**self._head(), "choices": [], "usage": usage}) if self.ask.include_usage else b""
        return told + DONE

    def failure(self, error: WireError) -> bytes:
        """An error in the place of a chunk; the client raises it, and no end follows."""
        return sse(error_body(error))

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self.created, "model": self.ask.model}

    def _choice(self, index: int, text: str, logprobs: Iterable[TokenLogprob], reason: str | None) -> dict[str, Any]:
        told = None if self.ask.top_logprobs is None else self._tokens[index].json(logprobs)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}

    def _event(self, index: int, text: str, logprobs: Iterable[TokenLogprob] = (), reason: str | None = None) -> bytes:
        event = {**self._head(), "choices": [self._choice(index, text, logprobs, reason)]}
        return sse({**event, "usage": None} if self.ask.include_usage else event)


class _TokenList:
    """An answer's tokens in the old form: four lists, with the place in the text where each token begins."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # in characters

    def json(self, logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
        """The tokens that follow those of the calls before."""
        tokens = list(logprobs)
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
