"""Attaching pictures and sounds to the next question: by commands, and by paths in the typed line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from phi4_mlx.terminal.advice import command_line
from phi4_mlx.terminal.amount import amount
from phi4_mlx.terminal.typed_paths import find_paths

if TYPE_CHECKING:
    from phi4_mlx.chat.session import Chat


def check_takes_media(chat: Chat, way_out: str = "") -> None:
    """Refuses media for a model that reads only text.

    Args:
        chat: the chat.
        way_out: the end of the message.

    Raises:
        RequestError: the model does; names one to use.
    """
    from phi4_mlx.tokens.media.media_file import check_reads_media

    check_reads_media(chat.conversation.tokenizer, chat.model_name, way_out)


def attach_file(chat: Chat, path: str, kind: Literal["image", "audio"]) -> None:
    """Reads a file and attaches its media to the next question, with a note of what they cost.

    Args:
        chat: the chat.
        path: the file; that of a PDF may be followed by its pages.
        kind: "image", also for a PDF, or "audio".

    Raises:
        RequestError: the model reads only text, or the file cannot be read.
    """
    from phi4_mlx.tokens.media.audio import Audio
    from phi4_mlx.tokens.media.media_file import SPEECH_S, media_of_file

    check_takes_media(chat)

    def tell(price: str) -> None:
        chat.screen.status("")
        chat.screen.note(f"{price}; goes with the next question")
        chat.screen.status(f"reading {path} ...")

    try:
        found = media_of_file(path, kind, chat.conversation.tokenizer, tell)
    finally:
        chat.screen.status("")
    chat.pending += found
    for each in found:
        if isinstance(each.medium, Audio) and each.medium.seconds > SPEECH_S:
            transcribe = command_line("transcribe", path)
            chat.screen.note(f"the model transcribes at most {SPEECH_S} s at once; `{transcribe}` takes any length")


def attach_typed(chat: Chat, typed: str) -> str:
    """Attaches the files whose paths are in a line; returns the question without them.

    A path before the text is taken out of it; a later one is replaced by "image 2" or "audio 1", its number in the
    question. A path in backticks stays text.

    Raises:
        RequestError: the model reads only text, or a file cannot be read; none is attached.
    """
    before = [*chat.pending]
    text, at = "", 0
    try:
        for found in find_paths(typed, lambda path: _kind_of(path) is not None):
            check_takes_media(chat, "; a path in backticks stays text")
            kind: Literal["image", "audio"] = "audio" if _kind_of(found.path) == "audio" else "image"
            attach_file(chat, found.path, kind)
            text += typed[at : found.start]
            at = found.end
            if text.strip():
                text += f"{kind} {sum(each.kind == kind for each in chat.pending)}"
    except BaseException:
        chat.pending[:] = before
        raise
    return (text + typed[at:]).strip() if at else typed


def _kind_of(path: str) -> str | None:
    """As `kind_of`, which a line without paths does not import."""
    from phi4_mlx.tokens.media.media_file import kind_of

    return kind_of(path)


def show_pending(chat: Chat) -> None:
    """Lists what goes with the next question, numbered for /drop."""
    for number, each in enumerate(chat.pending, 1):
        chat.screen.write(f"{number}  {each.price}\n")
    whole = sum(each.tokens for each in chat.pending)
    chat.screen.note(f"{amount(whole, 'token')} go with the next question" if chat.pending else "nothing is attached")


def show_lost(chat: Chat) -> None:
    """Names the files that are gone or have changed since they were attached."""
    media = [each for turn in chat.conversation.turns for each in turn.media] + chat.pending
    for lost in (each for each in media if each.medium is None):
        chat.screen.note(f"{lost.path} is gone or has changed since; its question is read without it")
