"""For programs that are not Python's own: Swift by PythonKit, or anything that can start a process.

Functions here take and return plain types alone, and raise nothing: what they return are events, dicts whose "event" is
"finish" or, with "code" and "message", "error". Each has a twin, `..._json`, from a JSON text to a JSON text. A stream
is a number; `next_event` takes its events one by one, and the last one is a "finish" or an "error". Models are numbers
too. All that MLX does runs on one thread, request after request: what it makes on one thread is not for others.

`python -m phi4_mlx.bridge --jsonl` is the same over standard input and output; see `phi4_mlx.bridge.__main__`.

Importing this imports the standard library and starts nothing.
"""

from __future__ import annotations

import inspect
import json
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from phi4_mlx.bridge.worker import LAST, Event, Stream, Worker, error_event

WORKER = Worker()


def version() -> str:
    """The version of phi4_mlx; "" in a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("phi4-mlx")
    except PackageNotFoundError:
        return ""


def load(name: str, adapter_path: str = "", chat_format: str = "", revision: str = "", verify: bool = False) -> Event:
    """Loads a model.

    Args:
        name: a folder, a Hub id ("owner/name"), or "demo".
        adapter_path: a folder with an adapter to put on it; see `use_adapter` too.
        chat_format: overrides the recognised one.
        revision: of the Hub id.
        verify: checks every file against the package's hashes.

    Returns:
        A "finish" with "model", a number, and "context", tokens; or an "error".
    """
    options = {"adapter_path": adapter_path, "chat_format": chat_format, "revision": revision}
    given: dict[str, Any] = {"verify": verify, **{key: value for key, value in options.items() if value}}
    return WORKER.only(lambda: WORKER.load(name, given))


def unload(model: int) -> Event:
    """Cancels what is under way with a model, and forgets it."""
    WORKER.cancel_all(model)
    return WORKER.only(lambda: WORKER.unload(model))


def use_adapter(model: int, path: str = "") -> Event:
    """Puts a LoRA adapter on a model, in the place of another; without a path, takes it off.

    What is under way ends first.

    Args:
        model: from `load`.
        path: a folder in mlx-lm's layout or PEFT's.
    """


    def put() -> Event:
        WORKER.model(model).use_adapter(path)
        return {"event": "finish"}

    return WORKER.only(put)


def count_tokens(model: int, text: str = "", messages: Sequence[Any] = (), tools: Sequence[Any] = ()) -> Event:
    """How many tokens a text is, or a prompt of messages; does not wait for what is under way.

    Returns:
        A "finish" with "tokens"; or an "error".
    """
    try:
        held = WORKER.model(model)
        return {"event": "finish", "tokens": len(held.prompt(messages, tools) if messages else held.prompt(text))}
    except Exception as error:
        return error_event(error)


def chat(model: int, messages: Sequence[Any], **options: Any) -> Event:
    """Answers messages, and returns when the answer is whole.

    Args:
        model: from `load`.
        messages: in OpenAI's form.
        options: max_tokens (1,024), temp, top_p, min_p, top_k, seed, repetition_penalty, presence_penalty,
            frequency_penalty, stop, timeout_s; schema, a JSON schema that the answer obeys; tools, in OpenAI's form,
            tool_choice ("auto", "none", "required", a name), strict (True: calls obey the tools' schemas).

    Returns:
        A "finish" with "reason" ("stop", "length", "tool_calls", "cancelled", "timeout"), "text", "message" (what to
        append to the messages; with "tool_calls" whose results are messages of the role "tool"), "complaint" (what
        looks like a call and is none, or ""), "prompt_tokens", "cached_tokens", "answer_tokens"; or an "error".
    """
    return _last(_start(model, messages, options))


def complete(model: int, prompt: str, **options: Any) -> Event:
    """Goes on with a text, as `chat` without what belongs to messages."""
    return _last(_start(model, prompt, options))


def start_chat(model: int, messages: Sequence[Any], **options: Any) -> int:
    """As `chat`, streamed: a stream for `next_event`."""
    return _start(model, messages, options).number


def start_complete(model: int, prompt: str, **options: Any) -> int:
    """As `complete`, streamed: a stream for `next_event`."""
    return _start(model, prompt, options).number


def next_event(stream: int, timeout_s: float = -1.0) -> Event:
    """The next event of a stream: "token" with "text"; "tool_call" with "id", "name" and "arguments"; the last one.

    Args:
        stream: from `start_chat` or `start_complete`; forgotten with its last event.
        timeout_s: how long to wait for it; below 0, until it comes. A "wait" event says that it has not come yet.
    """
    held = WORKER.streams.get(stream) if isinstance(stream, int) else None
    if held is None:
        return refusal(f"there is no stream {stream!r:.100}: it has ended, or never was")
    try:
        event: Event = held.events.get(timeout=None if timeout_s < 0 else timeout_s)
    except queue.Empty:
        return {"event": "wait"}
    if event["event"] in LAST:
        WORKER.streams.pop(stream, None)
    return event


def chat_events(model: int, messages: Sequence[Any], **options: Any) -> Iterator[Event]:
    """As `chat`, streamed: an iterator; leaving it early cancels."""
    return _events(_start(model, messages, options))


def complete_events(model: int, prompt: str, **options: Any) -> Iterator[Event]:
    """As `complete`, streamed: an iterator; leaving it early cancels."""
    return _events(_start(model, prompt, options))


def cancel(stream: int) -> bool:
    """Ends a stream at its next token; from any thread. False if there is no such stream (any more)."""
    held = WORKER.streams.get(stream) if isinstance(stream, int) else None
    if held is not None:
        held.cancelled = True
    return held is not None


def answer(stream: Stream, model: Any, given: Any, options: dict[str, Any]) -> Iterable[Event]:
    """The work of an answer to messages, or to a text; for the worker."""
    return WORKER.model(model).events(given, options, lambda: stream.cancelled)


def refusal(message: str) -> Event:
    """The error of a request that cannot be served."""
    return {"event": "error", "code": "request", "message": " ".join(message.split())}


def _start(model: Any, given: Any, options: dict[str, Any]) -> Stream:
    return WORKER.start(lambda stream: answer(stream, model, given, options), model)


def _last(stream: Stream) -> Event:
    try:
        return stream.last()
    finally:  # after a KeyboardInterrupt too
        stream.cancelled = True
        WORKER.streams.pop(stream.number, None)


def _events(stream: Stream) -> Iterator[Event]:
    try:
        event: Event = {"event": ""}
        while event["event"] not in LAST:
            event = stream.events.get()
            yield event
    finally:
        stream.cancelled = True
        WORKER.streams.pop(stream.number, None)


# JSON in, JSON out: the arguments as an object, and what the function returns.


def load_json(arguments: str) -> str:
    """`load`, from JSON to JSON."""
    return _json(load, arguments)


def unload_json(arguments: str) -> str:
    """`unload`, from JSON to JSON."""
    return _json(unload, arguments)


def use_adapter_json(arguments: str) -> str:
    """`use_adapter`, from JSON to JSON."""
    return _json(use_adapter, arguments)


def count_tokens_json(arguments: str) -> str:
    """`count_tokens`, from JSON to JSON."""
    return _json(count_tokens, arguments)


def chat_json(arguments: str) -> str:
    """`chat`, from JSON to JSON."""
    return _json(chat, arguments)


def complete_json(arguments: str) -> str:
    """`complete`, from JSON to JSON."""
    return _json(complete, arguments)


def start_chat_json(arguments: str) -> str:
    """`start_chat`, from JSON to JSON; an "error" if the arguments are no such."""
    return _json(start_chat, arguments)


def start_complete_json(arguments: str) -> str:
    """`start_complete`, from JSON to JSON; an "error" if the arguments are no such."""
    return _json(start_complete, arguments)


def next_event_json(arguments: str) -> str:
    """`next_event`, from JSON to JSON."""
    return _json(next_event, arguments)


def cancel_json(arguments: str) -> str:
    """`cancel`, from JSON to JSON."""
    return _json(cancel, arguments)


def _json(function: Callable[..., Any], arguments: str) -> str:
    try:
        given = json.loads(arguments)
        if not isinstance(given, dict):
            raise TypeError(f"the arguments of {function.__name__} must be a JSON object")
        inspect.signature(function).bind(**given)
        result = function(**given)
    except (TypeError, ValueError, RecursionError) as error:  # no JSON, or other arguments than the function's
        result = refusal(f"{function.__name__}: {error}")
    return json.dumps(result)
