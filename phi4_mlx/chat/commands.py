"""The commands of the chat: a word after a slash."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from phi4_mlx.chat.attachments import attach_file, check_takes_media, show_lost, show_pending
from phi4_mlx.chat.session import Chat, rescued_file
from phi4_mlx.chat.tools import shown_tool
from phi4_mlx.errors import Phi4Error, RequestError
from phi4_mlx.files.atomic import sweep
from phi4_mlx.terminal.amount import amount, size
from phi4_mlx.terminal.options import SAMPLING
from phi4_mlx.terminal.suggestion import path_suggestion, suggestion
from phi4_mlx.terminal.typed_paths import local_path

if TYPE_CHECKING:
    from phi4_mlx.chat.conversation import Turn
    from phi4_mlx.tokens.tokenizer import Tokenizer


CACHE_SUFFIX = ".cache.safetensors"


class Leave(Exception):
    """The person leaves the chat."""


class Command(NamedTuple):
    """A command of the chat.

    Attributes:
        words: the words after its name, for /help.
        explanation: its effect, for /help.
        do: called with the chat and the text after the command's name.
    """

    words: str
    explanation: str
    do: Callable[[Chat, str], None]


def is_command(typed: str) -> bool:
    """True if a line is a command: `/word` is, `/etc/hosts` and a slash after a space are not."""
    return re.match(r"/[a-z]*(\s|$)", typed) is not None


def obey(chat: Chat, typed: str) -> None:
    """Runs a command.

    Args:
        chat: the chat.
        typed: the line, from its slash on.

    Raises:
        RequestError: the command is unknown, or it fails.
        Leave: the command was /quit.
    """
    name, rest = (part.strip() for part in re.split(r"(?=\s|$)", typed[1:], maxsplit=1))
    if name not in COMMANDS:
        near = suggestion(f"/{name}", [f"/{each}" for each in COMMANDS])
        advice = "; /help lists them; a space before the slash makes it a message"
        raise RequestError(f"/{name} is not a command{near or advice}")
    if rest and not COMMANDS[name].words:
        raise RequestError(f"/{name} takes nothing after it, not {rest!r:.100}; leave that out")
    try:
        COMMANDS[name].do(chat, rest)
        chat.screen.end_paragraph()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RequestError(f"/{name} {rest}: {reason}") from None


def _help(chat: Chat, rest: str) -> None:
    width = max(len(f"/{name} {command.words}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        chat.screen.write(f"{f'/{name} {command.words}':{width}}  {command.explanation}\n")
    chat.screen.note("Enter sends; Alt-Enter, or \\ before Enter, begins a new line; Ctrl-C stops an answer.")


def _system(chat: Chat, rest: str) -> None:
    if rest:
        chat.conversation.system = None if rest == "-" else rest
    chat.screen.note(f"system prompt: {chat.conversation.system or 'none'}")


def _reset(chat: Chat, rest: str) -> None:
    chat.conversation.turns.clear()
    chat.pending.clear()
    chat.conversation.forget_cache()
    chat.saved_as = None
    chat.screen.note("a new conversation")


def _undo(chat: Chat, rest: str) -> None:
    turns = chat.conversation.turns
    if rest and turns and not (rest.isascii() and rest.isdigit() and len(rest) < 10 and 1 <= int(rest) <= len(turns)):
        raise RequestError(f"/undo takes back 1 to {amount(len(turns), 'turn')}, not {rest!r:.100}")
    for _ in range(int(rest) if rest and turns else 1):
        chat.screen.note(f"taken back: {_asked(_take_back(chat))}")


def _retry(chat: Chat, rest: str) -> None:
    before = _take_back(chat)
    turns = chat.conversation.turns
    length = len(turns)
    try:
        if chat.settings["temp"] == 0:
            chat.screen.note("temp is 0: only a change since then can change the answer; /set temp 0.7 lets it vary")
        chat.answer(before.question, before.media)
    finally:
        if len(turns) == length:  # stopped before its first token: the old answer stays
            turns.append(before)


def _take_back(chat: Chat) -> Turn:
    """Removes the last turn and returns it."""
    conversation = chat.conversation
    if not conversation.turns:
        raise RequestError("there is no turn yet")
    taken = conversation.turns.pop()
    if conversation.dropped >= len(conversation.turns):  # nothing of the cached prompt is left
        conversation.dropped = 0
    return taken


def _save(chat: Chat, rest: str) -> None:
    from phi4_mlx.chat import transcript

    if not rest:
        raise RequestError("/save needs the name of a file")
    path = _json_file(_named(rest))
    conversation = chat.conversation
    for name in ("*.json", _cache_file(Path("*.json")).name):
        sweep(path.parent, name)  # a chat that was killed may have saved under another name
    transcript.save(path, chat.model_name, conversation.system, conversation.turns, replace=path == chat.saved_as)
    chat.saved_as = path
    chat.screen.note(f"saved {amount(len(conversation.turns), 'turn')} to {path}{_save_cache(chat, path)}")


def _load(chat: Chat, rest: str) -> None:
    from phi4_mlx.chat import transcript

    if not rest and not rescued_file().exists():
        raise RequestError("/load needs the name of a file that /save wrote; no closed terminal has left one")
    path = rescued_file()
    if rest:
        path = _json_file(_named(rest))
        if not path.exists():
            path = Path(_named(rest)).absolute()  # a file that was renamed
        if not path.exists():
            near = path_suggestion(f"{_named(rest)}.json", _is_conversation)
            raise RequestError(f"{path} does not exist{path_suggestion(_named(rest), _is_conversation) or near}")
    conversation = chat.conversation
    conversation.system, conversation.turns = transcript.load(path, conversation.tokenizer)
    conversation.dropped = 0
    chat.saved_as = path
    chat.screen.note(f"loaded {amount(len(conversation.turns), 'turn')} from {path}{_load_cache(chat, path)}")
    if conversation.turns:
        chat.screen.note(f"the last question was: {_asked(conversation.turns[-1])}")
    show_lost(chat)


def _is_conversation(path: str) -> bool:
    """True if a path may be that of a saved conversation."""
    return not path.endswith(CACHE_SUFFIX) and not os.path.isdir(path)


def _save_cache(chat: Chat, path: Path) -> str:
    """Writes the prompt cache beside a conversation that is already saved; returns the result, for the note."""
    from phi4_mlx.generation.prompt_cache_file import save_prompt_cache

    conversation, beside = chat.conversation, _cache_file(path)
    cache = conversation.cache
    beside.unlink(missing_ok=True)  # it may hold a turn that was taken back
    conversation.drop_other_tokens()
    if not cache.offset:
        return ""
    drawn = json.dumps([_replies(turn) for turn in conversation.turns])
    metadata = {"replies": drawn, "dropped": str(conversation.dropped)}
    try:
        nbytes = save_prompt_cache(beside, cache, conversation.model, conversation.tokenizer, metadata)
    except (Phi4Error, OSError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        return f"; the prompt cache is not saved, and /load will prefill again: {reason}"
    return f", its prompt cache to {beside.name}, {size(nbytes)}"


def _load_cache(chat: Chat, path: Path) -> str:
    """Reads the prompt cache that `_save_cache` wrote, if it fits; returns the result, for the note."""
    from phi4_mlx.generation.prompt_cache_file import load_prompt_cache

    conversation, beside = chat.conversation, _cache_file(path)
    if not beside.exists():
        return ""
    try:
        model, tokenizer = conversation.model, conversation.tokenizer
        cache, metadata = load_prompt_cache(beside, model, tokenizer, return_metadata=True)
        made, ours = cache.options, conversation.cache_options
        if (made.kv_bits, made.max_kv_size) != (ours.kv_bits, ours.max_kv_size):
            raise RequestError(f"{beside} was made with another --kv-bits or --max-kv-size than this chat")
    except Phi4Error as error:
        return f"; the next prompt is prefilled again: {error}"
    conversation.cache, conversation.dropped = cache, int(metadata.get("dropped", 0))
    replies = json.loads(metadata.get("replies", "[]"))
    for at, (turn, drawn) in enumerate(zip(conversation.turns, replies, strict=False)):  # a file may have been edited
        conversation.turns[at] = _as_drawn(tokenizer, turn, drawn)
    return f", with the prompt cache of {amount(conversation.cache.offset, 'token')}"


def _replies(turn: Turn) -> list[list[int]]:
    """The ids of the model's replies in a turn."""
    return [*(each.ids for each in turn.rounds), [*turn.ids]]


def _as_drawn(tokenizer: Tokenizer, turn: Turn, drawn: list[list[int]]) -> Turn:
    """The turn with the ids that the model drew, if they decode to its text; else the turn unchanged."""
    if [tokenizer.decode(ids) for ids in drawn] != [tokenizer.decode(ids) for ids in _replies(turn)]:
        return turn
    *before, last = drawn
    rounds = (replace(each, ids=ids) for each, ids in zip(turn.rounds, before, strict=True))
    return replace(turn, ids=tuple(last), rounds=tuple(rounds))


def _cache_file(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".json") + CACHE_SUFFIX)


def _named(rest: str) -> str:
    """A name as it was typed: with spaces in it, or quoted as in a shell; ~ is the home folder."""
    try:
        words = shlex.split(rest)
    except ValueError:  # a lone apostrophe, as in it's
        words = []
    return os.path.expanduser(words[0] if len(words) == 1 else rest)


def _json_file(name: str) -> Path:
    """The file of a conversation, which has the ending .json unless its name has another one."""
    path = Path(name).absolute()
    if not name or name.endswith("/") or path.is_dir():
        raise RequestError(f"{name!r:.200} is not the name of a file; give one")
    return path if path.suffix else path.with_name(f"{path.name}.json")


def _set(chat: Chat, rest: str) -> None:
    name, _, value = " ".join(rest.split()).partition(" ")
    if not rest:
        for known in SAMPLING:
            _show_setting(chat, known)
        return
    if name not in SAMPLING:
        known_names = f"; these can: {', '.join(SAMPLING)}"
        raise RequestError(f"{name!r:.100} cannot be set{suggestion(name, SAMPLING) or known_names}")
    if not value:
        return _show_setting(chat, name)
    try:
        chat.set(name, chat.defaults[name] if value == "-" else SAMPLING[name].parse(value))
    except argparse.ArgumentTypeError as error:
        raise RequestError(f"{name}: {error}") from None
    current = chat.settings[name]
    chat.screen.note(f"{name} is {'not set' if current is None else current}")


def _show_setting(chat: Chat, name: str) -> None:
    current = chat.settings[name]
    shown = "-" if current is None else str(current)
    chat.screen.write(f"{name:18}  {shown:8}  {SAMPLING[name].explanation}\n")


def _tools(chat: Chat, rest: str) -> None:
    for declared in chat.conversation.toolbox.declarations:
        chat.screen.write(f"{shown_tool(declared)}\n")
    if not chat.conversation.toolbox:
        chat.screen.note("there are none; --tools FILE.py adds a file's functions, --mcp COMMAND a server's")


def _stats(chat: Chat, rest: str) -> None:
    conversation, usage = chat.conversation, chat.conversation.usage
    kept = amount(len(conversation.turns[conversation.dropped :]), "turn")
    left_out = f", without the oldest {conversation.dropped:,}" if conversation.dropped else ""
    length, full = len(conversation.ids()), ""
    if length >= conversation.context and conversation.overflow == "oldest":  # older turns came back
        full = "; the next question leaves out the oldest"
    lines = [
        f"model        {chat.model_name}, chat format {conversation.tokenizer.chat_format.name}",
        f"context      {length:,} of {conversation.context:,} tokens, in {kept}{left_out}{full}",
    ]
    if usage.answer_tokens:
        new = usage.prompt_tokens - usage.cached_tokens
        lines += [
            f"last prompt  {amount(usage.prompt_tokens, 'token')}: {usage.cached_tokens:,} from the cache, {new:,} run "
            f"at {usage.prompt_tps:,.0f} tokens/s",
            f"last answer  {amount(usage.answer_tokens, 'token')} at {usage.answer_tps:,.1f} tokens/s",
            f"memory       {size(1e9 * usage.peak_memory)} at the peak, {size(conversation.cache.nbytes)} of cache",
        ]
    if conversation.model.boundary is not None:
        run_again = f"; {amount(usage.reprefilled, 'token')} run again for it" if usage.reprefilled else ""
        lines.append(f"RoPE table   {conversation.cache.regime}{run_again}")
    chat.screen.write("\n".join(lines) + "\n")


def _model(chat: Chat, rest: str) -> None:
    if rest:
        chat.switch_model(_named(rest))
        show_lost(chat)
    chat.screen.note(f"model: {chat.model_name}")


def _image(chat: Chat, rest: str) -> None:
    _attach(chat, rest, "image")


def _audio(chat: Chat, rest: str) -> None:
    _attach(chat, rest, "audio")


def _attach(chat: Chat, rest: str, kind: Literal["image", "audio"]) -> None:
    """Attaches files to the next question; without a name, lists what is attached."""
    if not rest:
        return show_pending(chat)
    for path in _files(rest):
        attach_file(chat, local_path(path), kind)


def _files(rest: str) -> list[str]:
    """The names of several files as a shell reads them, if all are there; else one name, which pages may follow."""
    try:
        words = shlex.split(rest)
    except ValueError:
        words = []
    there = [os.path.exists(local_path(word)) for word in words]
    if len(words) > 1 and there[0]:
        return words if all(there) else [" ".join(words)]
    return [_named(rest)]


def _record(chat: Chat, rest: str) -> None:
    from phi4_mlx.chat.microphone import record
    from phi4_mlx.terminal.line_editor import state_folder

    check_takes_media(chat)
    begun = False

    def show(seconds: float) -> None:
        nonlocal begun
        if not begun:
            chat.screen.note("recording; Enter ends it, Ctrl-C drops it")
        begun = True
        chat.screen.status(f"{amount(int(seconds), 'second')} ...")

    try:
        path = record(state_folder() / "recordings", show)
    finally:
        chat.screen.status("")
    attach_file(chat, str(path), "audio")


def _drop(chat: Chat, rest: str) -> None:
    count = len(chat.pending)
    if not count:
        raise RequestError("nothing is attached to the next question")
    if not rest:
        chat.pending.clear()
    elif rest.isascii() and rest.isdigit() and len(rest) < 10 and 1 <= int(rest) <= count:
        del chat.pending[int(rest) - 1]
    else:
        raise RequestError(f"/drop takes a number from 1 to {count}, or none for all, not {rest!r:.100}")
    show_pending(chat)


def _quit(chat: Chat, rest: str) -> None:
    raise Leave


def _asked(turn: Turn) -> str:
    """A question on one line, after the names of its media."""
    return _shortened(" ".join([*(f"[{each.name}]" for each in turn.media), turn.question]))


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:60] + " ..."


COMMANDS = {
    "help": Command("", "show this list", _help),
    "system": Command("[TEXT]", "show or set the system prompt; - removes it", _system),
    "reset": Command("", "begin a new conversation; the system prompt stays", _reset),
    "undo": Command("[N]", "take back the last question and its answer, or the last N", _undo),
    "retry": Command("", "ask the last question again; the answer varies if temp is above 0", _retry),
    "save": Command("FILE", "save the conversation to a new file or its own, its prompt cache beside it", _save),
    "load": Command("[FILE]", "load a saved conversation; without a name, the one of a closed terminal", _load),
    "image": Command("[FILE [PAGES]]", "ask about a picture or the pages of a PDF with the next question", _image),
    "audio": Command("[FILE]", "ask about a sound with the next question", _audio),
    "record": Command("", "record a sound with the microphone, for the next question", _record),
    "drop": Command("[N]", "take back what is attached to the next question, or number N of it", _drop),
    "set": Command("[NAME VALUE]", "show or set temp, top-p, max-tokens and others; - restores one", _set),
    "stats": Command("", "show tokens, speeds and memory", _stats),
    "tools": Command("", "list the tools that the model may call", _tools),
    "model": Command("[NAME]", "show the model, or continue with another one", _model),
    "quit": Command("", "leave, as Ctrl-D does", _quit),
}
COMPLETED_WORDS = [
    *(f"/{name} " if command.words else f"/{name}" for name, command in COMMANDS.items()),
    *(f"/set {name} " for name in SAMPLING),
]
COMPLETED_PATHS: dict[str, Callable[[str], bool]] = {
    "/image": lambda name: True,
    "/audio": lambda name: True,
    "/save": _is_conversation,
    "/load": _is_conversation,
    "/model": lambda name: False,  # a folder
}
