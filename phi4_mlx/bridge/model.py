"""A loaded model behind the bridge: requests and events of plain types."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4_mlx.adapters.layers import put_adapter, read_adapter, remove_adapter
from phi4_mlx.agent import MAX_TOKENS, Message, call_ids
from phi4_mlx.bridge.events import BridgeEvent
from phi4_mlx.checkpoint import load
from phi4_mlx.errors import RequestError, check_number, check_whole
from phi4_mlx.generation.answer import AnswerAssembler, stream_answer, tool_grammar
from phi4_mlx.generation.memory import plan_context
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.grammar.grammars import Grammar, json_schema
from phi4_mlx.terminal.options import Settings, sampling_defaults
from phi4_mlx.tools.declarations import check_tools

TEXT_OPTIONS = (
    "max_tokens", "stop", "schema", "timeout_s", "temp", "top_p", "min_p", "top_k", "seed",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
CHAT_OPTIONS = (*TEXT_OPTIONS, "tools", "tool_choice", "strict")

Given = str | Sequence[Mapping[str, Any]]  # a text to continue, or messages to answer


class BridgeModel:
    """A loaded model and its prompt cache, which is kept from request to request; for one thread.

    Attributes:
        tokenizer: from `load`; may be used from any thread.
        context: the most tokens of a prompt and its answer.
    """

    def __init__(self, name: str, adapter_path: str, chat_format: str, revision: str, verify: bool) -> None:
        """Loads the model; arguments as for `phi4_mlx.bridge.load`."""
        self._model, self.tokenizer = load(
            name, adapter_path or None, revision=revision or None, verify=verify, chat_format=chat_format or None
        )
        self._cache = self._model.make_cache()
        self.context = self._model.config.max_position_embeddings
        self._longest = plan_context(self._model).most_tokens  # within the context and the memory

    def use_adapter(self, path: str) -> None:
        """Replaces the adapter; an empty path removes it.

        Raises:
            Phi4Error: as for `read_adapter` and `put_adapter`; or the folder holds a full fine-tuning, which could not
                be removed again.
        """
        adapter = read_adapter(Path(path)) if path else None
        if adapter is not None and adapter.kind == "full":
            raise RequestError(
                f"{path} holds the weights of a whole model, not an adapter; give it to load as adapter_path"
            )
        if adapter is None:
            remove_adapter(self._model)
        else:
            put_adapter(self._model, adapter)
        self._cache = self._model.make_cache()

    def prompt(self, given: Given, tools: Sequence[Any] | None = None) -> list[int]:
        """Ids of a plain text, or of messages and the start of an answer.

        Raises:
            RequestError: a message or a tool is malformed, or a picture or a sound cannot be read.
        """
        if isinstance(given, str):
            return self.tokenizer.encode(given)
        return self.tokenizer.apply_chat_template(given, tools=tools)

    def events(self, given: Given, options: Mapping[str, Any], cancelled: Callable[[], bool]) -> Iterator[BridgeEvent]:
        """Generates an answer.

        Args:
            given: a text to continue, or messages to answer.
            options: by the names in `TEXT_OPTIONS` or, for messages, `CHAT_OPTIONS`.
            cancelled: polled between tokens and between prefill chunks.

        Yields:
            "thought" and "token" events, a "tool_call" for each call, and a "finish".

        Raises:
            Phi4Error: an option or a message is malformed.
        """
        chat_format, is_text = self.tokenizer.chat_format, isinstance(given, str)
        defaults = sampling_defaults(chat_format.name, MAX_TOKENS)
        request = Request.of(options, TEXT_OPTIONS if is_text else CHAT_OPTIONS, defaults)
        answer = request.answer(cancelled, chat_format.reasons and not is_text)
        prompt = self.prompt(given, request.tools)
        decode_options = request.decode_options(self._longest - len(prompt))
        grammar, must_end = request.grammar()
        responses = stream_answer(
            self._model, self.tokenizer, prompt, self._cache, decode_options, answer, grammar, must_end
        )
        try:
            for response in responses:
                if response.thought:
                    yield {"event": "thought", "text": response.thought}
                if response.text:
                    yield {"event": "token", "text": response.text}
        except BaseException:  # the layers of the cache may be left at different lengths
            self._cache = self._model.make_cache()
            raise
        rest = answer.finish()
        if thought := answer.new_thought():
            yield {"event": "thought", "text": thought}
        if rest:
            yield {"event": "token", "text": rest}
        yield from _last_events(answer, given, () if grammar is None else grammar.loosened)


@dataclass(frozen=True)
class Request:
    """The options of one request.

    Attributes:
        max_tokens: limit of the answer, in tokens.
        stop: strings that end the answer before them, or None.
        schema: a JSON schema that the answer obeys, or None.
        timeout_s: seconds for the answer, or None.
        tools: in OpenAI's form.
        tool_choice: "auto", "none", "required", or one tool by name or in OpenAI's form.
        strict: True restricts calls to the tools' schemas.
        sampling: the sampling settings.
    """

    max_tokens: int
    stop: str | Sequence[str] | None
    schema: Any
    timeout_s: float | None
    tools: list[dict[str, Any]]
    tool_choice: str | Mapping[str, Any]
    strict: bool
    sampling: Sampling

    @classmethod
    def of(cls, options: Mapping[str, Any], known: Sequence[str], defaults: Settings) -> Request:
        """Checks the options, all but those that `DecodeOptions` and the sampler check; None stands for the default.

        Args:
            options: by name.
            known: the names.
            defaults: of the sampling, from `sampling_defaults`.

        Raises:
            RequestError: an option is not in `known`, or is malformed.
        """
        for name in options:
            if name not in known:
                raise RequestError(f"the option {name!r:.100} is not known; known are {', '.join(known)}")
        given = {name: value for name, value in options.items() if value is not None}
        settings: dict[str, Any] = {name.replace("-", "_"): value for name, value in defaults.items()} | given
        request = cls(
            max_tokens=settings["max_tokens"],
            stop=given.get("stop"),
            schema=given.get("schema"),
            timeout_s=given.get("timeout_s"),
            tools=check_tools(given.get("tools", [])),
            tool_choice=given.get("tool_choice", "auto"),
            strict=given.get("strict", True),
            sampling=Sampling.of(settings),
        )
        check_whole("max_tokens", request.max_tokens, 1)
        if request.timeout_s is not None:
            check_number("timeout_s", request.timeout_s, 0, 1e9)
        if request.schema is not None and (request.tools or request.stop is not None):
            raise RequestError("schema leaves no room for tool calls or a stop string; leave out one of them")
        return request

    def answer(self, cancelled: Callable[[], bool], thinks: bool) -> AnswerAssembler:
        """A new answer, whose time starts now; thoughts are separated if `thinks`, and no grammar is in force."""
        ends_at = float("inf") if self.timeout_s is None else time.monotonic() + self.timeout_s
        tools = self.tools if self.tool_choice != "none" else ()
        thinks = thinks and self.schema is None and self.tool_choice in ("auto", "none")
        return AnswerAssembler(tools, ends_at=ends_at, cancelled=cancelled, thinks=thinks)

    def decode_options(self, room: int) -> DecodeOptions:
        """The decode options; `max_tokens` is lowered to the `room` in the context, in tokens."""
        return DecodeOptions(
            max_tokens=min(self.max_tokens, max(room, 1)),
            sampler=self.sampling.sampler(),
            logits_processors=self.sampling.processors(),
            stop=self.stop,
        )

    def grammar(self) -> tuple[Grammar | None, bool]:
        """(the grammar of the answer, True if the answer must end within its tokens)."""
        if self.schema is not None:
            return json_schema(self.schema), True
        grammar = tool_grammar(self.tools, self.tool_choice, self.strict)
        return grammar, self.tool_choice not in ("auto", "none")


def _last_events(answer: AnswerAssembler, given: Given, loosened: Sequence[str]) -> Iterator[BridgeEvent]:
    """The tool calls of a finished answer, and its "finish" event."""
    finish: BridgeEvent = {"event": "finish", "reason": answer.reason, "text": answer.text}
    if answer.thought:
        finish["thought"] = answer.thought
    if not isinstance(given, str):
        message: Message = {"role": "assistant", "content": answer.text}
        finish["message"] = message
        calls = answer.calls if answer.reason not in ("cancelled", "timeout") else ()
        named = list(zip(call_ids(given), calls, strict=False))  # the ids never end
        for call_id, call in named:
            yield {"event": "tool_call", "id": call_id, "name": call.name, "arguments": call.arguments}
        if named:
            message["tool_calls"] = [call.message(call_id) for call_id, call in named]
            if answer.reason == "stop":
                finish["reason"] = "tool_calls"
        finish["complaint"] = answer.complaint or ""
        finish["loosened"] = [*loosened]
    finish["complete"] = answer.reason == "stop"
    finish["prompt_tokens"] = answer.prompt_tokens
    finish["cached_tokens"] = answer.cached_tokens
    finish["answer_tokens"] = answer.answer_tokens
    yield finish
