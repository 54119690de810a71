"""Functions for programs outside Python: Swift with PythonKit, or any program that can start a process.

The functions take and return plain types and raise nothing. They return events: dicts whose "event" is "finish" or,
with "code" and "message", "error". Models and streams are numbers; `next_event` takes the events of a stream one by
one, and the last one is a "finish" or an "error". Each function has a twin, `..._json`, from JSON text to JSON text.

MLX runs on one thread, one request after another, because its arrays belong to the thread that made them. Importing
this module imports only the standard library and starts nothing.

`python -m phi4_mlx.bridge --jsonl` serves the same functions over standard input and output; see
`phi4_mlx.bridge.__main__`.
"""

from __future__ import annotations

import inspect
import json
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phi4_mlx.bridge.events import LAST, BridgeEvent, error_event, refusal
from phi4_mlx.bridge.worker import Stream, Worker
from phi4_mlx.terminal.version import __version__

if TYPE_CHECKING:
    from phi4_mlx.bridge.model import Given

WORKER = Worker()


def version() -> str:
    """The version of phi4_mlx."""
    return __version__


def load(
    name: str, adapter_path: str = "", chat_format: str = "", revision: str = "", verify: bool = False
) -> BridgeEvent:
    """Loads a model.

    Args:
        name: a folder, a Hub id ("owner/name"), or "demo".
        adapter_path: a folder with an adapter to put on the model; see also `use_adapter`.
        chat_format: overrides the recognised chat format.
        revision: a commit, branch or tag of the Hub repository.
        verify: checks every file against the package's manifest of hashes.

    Returns:
        A "finish" with "model", the model's number, and "context", in tokens; or an "error".
    """
    return WORKER.call(lambda: WORKER.load(name, adapter_path, chat_format, revision, verify))


def unload(model: int) -> BridgeEvent:
    """Cancels the requests of a model and frees it."""
    WORKER.cancel_all(model)
    return WORKER.call(lambda: WORKER.unload(model))


def use_adapter(model: int, path: str = "") -> BridgeEvent:
    """Replaces the LoRA adapter of a model, or removes it, after the requests under way.

    Args:
        model: from `load`.
        path: a folder in the layout of mlx-lm or PEFT; "" removes the adapter.
    """

    def replace() -> BridgeEvent:
        WORKER.model(model).use_adapter(path)
        return {"event": "finish"}

    return WORKER.call(replace)


def count_tokens(
    model: int, text: str = "", messages: Sequence[Mapping[str, Any]] = (), tools: Sequence[Mapping[str, Any]] = ()
) -> BridgeEvent:
    """Counts the tokens of a text, or of messages as a prompt, without waiting for the requests under way.

    Pictures and sounds in the messages count too, so a message with one alone tells what it costs.

    Args:
        model: from `load`.
        text: a plain text, if there are no messages.
        messages: as for `chat`.
        tools: as for `chat`.

    Returns:
        A "finish" with "tokens"; or an "error".
    """
    try:
        found = WORKER.model(model)
        return {"event": "finish", "tokens": len(found.prompt(messages, tools) if messages else found.prompt(text))}
    except Exception as error:
        return error_event(error)


def chat(model: int, messages: Sequence[Mapping[str, Any]], **options: Any) -> BridgeEvent:
    """Answers messages; returns when the answer is complete.

    Args:
        model: from `load`.
        messages: in OpenAI's form. A content is a text or a list of parts: {"type": "text", "text": ...}, or
            {"type": "image" or "audio"} with the file's "path", its bytes in "base64", or a data: "url".
        options: max_tokens (1,024), temp, top_p, min_p, top_k, seed, repetition_penalty, presence_penalty,
            frequency_penalty, stop, timeout_s; schema, a JSON schema that the answer obeys; tools, in OpenAI's form,
            tool_choice ("auto", "none", "required", or a name), strict (True: calls obey the tools' schemas). Where the
            authors of a model advise other defaults, those hold; see `phi4_mlx.terminal.options.ADVISED`.

    Returns:
        A "finish" with "reason" ("stop", "length", "tool_calls", "cancelled", "timeout"), "text", "thought" (the
        thoughts before it, if a reasoning model had any), "message" (to append to the messages, without thoughts; its
        "tool_calls", if any, are to be answered by messages with the role "tool"), "complaint" (why a tool call
        was left as text, or ""), "loosened" (a list: what of the tools' schemas was not enforced), "complete" (False if
        the answer was cut or forced to its end), "prompt_tokens", "cached_tokens", "answer_tokens"; or an "error".
    """
    return _last(_start(model, messages, options))


def complete(model: int, prompt: str, **options: Any) -> BridgeEvent:
    """Continues a plain text; as `chat`, without tools and "message"."""
    return _last(_start(model, prompt, options))


def start_chat(model: int, messages: Sequence[Mapping[str, Any]], **options: Any) -> int:
    """As `chat`, streamed; returns a stream's number for `next_event`."""
    return _start(model, messages, options).number


def start_complete(model: int, prompt: str, **options: Any) -> int:
    """As `complete`, streamed; returns a stream's number for `next_event`."""
    return _start(model, prompt, options).number


def next_event(stream: int, timeout_s: float = -1.0) -> BridgeEvent:
    """The next event of a stream.

    "thought" and "token" have "text"; "tool_call" has "id", "name" and "arguments"; the last one is as in `chat`.

    Args:
        stream: from `start_chat` or `start_complete`; its number ends with its last event.
        timeout_s: seconds to wait; below 0, until the event comes. If none came in time, a "wait" event is returned.
    """
    found = WORKER.stream(stream)
    if found is None:
        return refusal(f"there is no stream {stream!r:.100}: it has ended, or never was")
    try:
        event = found.events.get(timeout=None if timeout_s < 0 else timeout_s)
    except queue.Empty:
        return {"event": "wait"}
    if event["event"] in LAST:
        WORKER.forget(found)
    return event


def chat_events(model: int, messages: Sequence[Mapping[str, Any]], **options: Any) -> Iterator[BridgeEvent]:
    """As `chat`, streamed; returns an iterator, and leaving it early cancels the request."""
    return _events(_start(model, messages, options))


def complete_events(model: int, prompt: str, **options: Any) -> Iterator[BridgeEvent]:
    """As `complete`, streamed; returns an iterator, and leaving it early cancels the request."""
    return _events(_start(model, prompt, options))


def cancel(stream: int) -> bool:
    """Ends a stream at its next token, from any thread; returns False if it has ended or never was."""
    found = WORKER.stream(stream)
    if found is None:
        return False
    found.cancelled = True
    return True


def answer(stream: Stream, model: object, given: Given, options: Mapping[str, Any]) -> Iterable[BridgeEvent]:
    """Work for the worker: the events of an answer to messages or to a text."""
    return WORKER.model(model).events(given, options, lambda: stream.cancelled)


def _start(model: int, given: Given, options: Mapping[str, Any]) -> Stream:
    return WORKER.start(lambda stream: answer(stream, model, given, options), model)


def _last(stream: Stream) -> BridgeEvent:
    try:
        return stream.last()
    finally:  # after a KeyboardInterrupt too
        stream.cancelled = True
        WORKER.forget(stream)


def _events(stream: Stream) -> Iterator[BridgeEvent]:
    try:
        while True:
            event = stream.events.get()
            yield event
            if event["event"] in LAST:
                return
    finally:
        stream.cancelled = True
        WORKER.forget(stream)


def _from_json(function: Callable[..., Any]) -> Callable[[str], str]:
    """The JSON twin of a function: takes the arguments as a JSON object, returns the result as JSON."""

    def twin(arguments: str) -> str:
        try:
            given = json.loads(arguments)
            if not isinstance(given, dict):
                raise TypeError(f"the arguments of {function.__name__} must be a JSON object")
            inspect.signature(function).bind(**given)
            result = function(**given)
        except (TypeError, ValueError, RecursionError) as error:  # not JSON, or not the function's arguments
            result = refusal(f"{function.__name__}: {error}")
        return json.dumps(result)

    twin.__name__ = twin.__qualname__ = f"{function.__name__}_json"
    twin.__doc__ = f"""`{function.__name__}`, from JSON to JSON; an "error" if the arguments do not fit."""
    return twin


load_json = _from_json(load)
unload_json = _from_json(unload)
use_adapter_json = _from_json(use_adapter)
count_tokens_json = _from_json(count_tokens)
chat_json = _from_json(chat)
complete_json = _from_json(complete)
start_chat_json = _from_json(start_chat)
start_complete_json = _from_json(start_complete)
next_event_json = _from_json(next_event)
cancel_json = _from_json(cancel)
