"""A model as the bridge keeps it: requests of plain types in, events of plain types out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi4_mlx.adapters.layers import put_adapter, read_adapter, remove_adapter
from phi4_mlx.agent import call_ids
from phi4_mlx.checkpoint import load
from phi4_mlx.errors import RequestError, check_number, check_whole
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.generation.stream import stream_generate
from phi4_mlx.grammar.constraint import Constraint
from phi4_mlx.grammar.grammars import Grammar, json_schema, tool_calls
from phi4_mlx.tools.calls import ToolCallParser
from phi4_mlx.tools.declarations import check_tools

SAMPLER = ("temp", "top_p", "min_p", "top_k", "seed")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
CALLS = ("tools", "tool_choice", "strict")
OPTIONS = ("max_tokens", "stop", "schema", "timeout_s", *SAMPLER, *PENALTIES)
MAX_TOKENS = 1024

Event = dict[str, Any]


class Stopped(Exception):
    """Raised in the middle of a prefill: the caller has cancelled, or time is up."""


class BridgeModel:
    """A loaded model, and the cache that goes on from one request to the next; for one thread.

    Attributes:
        tokenizer: what `load` returned; for any thread.
        context: how many tokens a prompt and its answer may come to.
    """

    def __init__(self, name: str, **options: Any):
        """As `phi4_mlx.load`."""
        self._model, self.tokenizer = load(name, **options)
        self._cache = self._model.make_cache()
        self.context = self._model.config.max_position_embeddings

    def use_adapter(self, path: str) -> None:
        """Puts an adapter on, in the place of another; none for an empty path.

        Raises:
            Phi4Error: as `load_adapter`; or it is a full fine-tuning, which could not be taken off again.
        """
        adapter = read_adapter(Path(path)) if path else None
        if adapter is not None and adapter.kind == "full":
            raise RequestError(f"{path} holds a whole model's weights, no adapter; give it to load as adapter_path")
        if adapter is None:
            remove_adapter(self._model)
        else:
            put_adapter(self._model, adapter)
        self._cache = self._model.make_cache()

    def prompt(self, given: str | Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """Ids of a text as it stands, or of messages and the start of an answer.

        Raises:
            RequestError: a message or a tool is malformed.
        """
        if isinstance(given, str):
            return self.tokenizer.encode(given)
        return self.tokenizer.apply_chat_template(given, tools=tools)

    def events(self, given: Any, options: Mapping[str, Any], cancelled: Callable[[], bool]) -> Iterator[Event]:
        """Draws an answer.

        Args:
            given: a text to go on with, or messages.
            options: by the names in `OPTIONS`, and for messages in `CALLS`.
            cancelled: asked between tokens and between chunks of a prefill.

        Yields:
            "token" events, a "tool_call" for each call, and a "finish".

        Raises:
            Phi4Error: an option or a message is malformed.
        """
        answer = _Answer(self.tokenizer, given, options, cancelled)
        prompt = self.prompt(given, answer.tools)
        answer.prompt_tokens = len(prompt)
        kwargs = answer.generation(self._model.config.vocab_size, self.context - len(prompt))
        new = self._cache.reuse(prompt)
        answer.cached_tokens = len(prompt) - len(new)
        try:
            yield from answer.draw(stream_generate(self._model, self.tokenizer, new, cache=self._cache, **kwargs))
        except Stopped:
            pass
        except BaseException:  # the layers of the cache may be left at different lengths
            self._cache = self._model.make_cache()
            raise
        yield from answer.end()


class _Answer:
    """One answer under way."""

    def __init__(self, tokenizer: Any, given: Any, options: Mapping[str, Any], cancelled: Callable[[], bool]):
        known = OPTIONS if isinstance(given, str) else (*OPTIONS, *CALLS)
        for name in options:
            if name not in known:
                raise RequestError(f"the option {name!r:.100} is not known; known are {', '.join(known)}")
        self._options = {name: value for name, value in options.items() if value is not None}
        self._tokenizer, self._given, self._cancelled = tokenizer, given, cancelled
        self.tools = check_tools(self._options.get("tools", []))
        self._choice = self._options.get("tool_choice", "auto")
        self._parser = ToolCallParser(self.tools if self._choice != "none" else ())
        self._ends_at = float("inf")
        if (timeout_s := self._options.get("timeout_s")) is not None:
            check_number("timeout_s", timeout_s, 0, 1e9)
            self._ends_at = time.monotonic() + timeout_s
        self._text: list[str] = []
        self._reason = ""
        self.prompt_tokens = self.cached_tokens = self._tokens = 0

    def generation(self, vocab_size: int, room: int) -> dict[str, Any]:
        """What `stream_generate` takes for the options; an answer is no longer than the context has room for."""
        given = self._options
        max_tokens = given.get("max_tokens", MAX_TOKENS)
        check_whole("max_tokens", max_tokens, 1)
        max_tokens = min(max_tokens, max(room, 1))
        grammar, bounded = self._grammar()
        sampling = Sampling.of(given)
        return {
            "max_tokens": max_tokens,
            "sampler": sampling.sampler(),
            "logits_processors": sampling.processors(),
            "stop": given.get("stop"),
            "logits_mask": grammar
            and Constraint(grammar, self._tokenizer, vocab_size, max_tokens if bounded else None),
            "prompt_progress_callback": self._watch,
        }

    def _grammar(self) -> tuple[Grammar | None, bool]:
        """What the answer must obey, and whether it has to come to its end within its tokens."""
        schema, strict = self._options.get("schema"), self._options.get("strict", True)
        if schema is not None:
            if self.tools or "stop" in self._options:
                raise RequestError("schema leaves no room for calls of tools or a stop string; leave out one of them")
            return json_schema(schema), True
        if self._choice in ("auto", "none"):
            held = self.tools and self._choice == "auto" and strict
            return tool_calls(self.tools) if held else None, False
        return tool_calls(self.tools, self._choice), True

    def _watch(self, done: int, total: int) -> None:
        if self._stopped():
            raise Stopped

    def _stopped(self) -> bool:
        late = time.monotonic() >= self._ends_at
        self._reason = "cancelled" if self._cancelled() else "timeout" if late else ""
        return bool(self._reason)

    def draw(self, responses: Iterator[Any]) -> Iterator[Event]:
        """The text as it comes."""
        if self._stopped():  # while it waited for its turn
            return
        for response in responses:
            self._tokens = response.generation_tokens
            yield from self._say(self._parser.add(response.text))
            if response.finish_reason:
                self._reason = response.finish_reason
            elif self._stopped():
                return

    def end(self) -> Iterator[Event]:
        """What was held back, the calls, and how it ended."""
        yield from self._say(self._parser.finish())
        calls = self._parser.calls if self._reason not in ("cancelled", "timeout") else ()
        finish: Event = {"event": "finish", "reason": self._reason, "text": "".join(self._text)}
        if not isinstance(self._given, str):
            finish["message"] = message = {"role": "assistant", "content": finish["text"]}
            ids = call_ids(self._given)
            named = [(next(ids), call) for call in calls]
            for name, call in named:
                yield {"event": "tool_call", "id": name, "name": call.name, "arguments": call.arguments}
            if calls:
                message["tool_calls"] = [call.message(name) for name, call in named]
                finish["reason"] = "tool_calls"
            finish["complaint"] = self._parser.error or ""
        counts = {"prompt": self.prompt_tokens, "cached": self.cached_tokens, "answer": self._tokens}
        yield {**finish, **{f"{name}_tokens": count for name, count in counts.items()}}

    def _say(self, text: str) -> Iterator[Event]:
        if text:
            self._text.append(text)
            yield {"event": "token", "text": text}
