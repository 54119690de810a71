"""One-line notes of a chat about its answers and settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from phi4_mlx.terminal.amount import amount
from phi4_mlx.terminal.options import Settings
from phi4_mlx.terminal.thoughts import end_note

if TYPE_CHECKING:
    from phi4_mlx.chat.conversation import Conversation


def settings_line(settings: Settings, names: Iterable[str], longest: int) -> str:
    """The settings of these names in one line; max-tokens is shown as at most `longest`, the tokens that fit."""
    shown = {name: settings[name] or 0 for name in names}
    if shown.get("max-tokens", 0) > longest:
        shown["max-tokens"] = longest
    return ", ".join(f"{name} {value:,}" for name, value in shown.items())


def end_notes(conversation: Conversation, max_tokens: int | float | None, stopped: bool) -> Iterator[str]:
    """The notes after an answer: the reason of its end, and the number of tokens that were run again.

    Args:
        conversation: after the answer.
        max_tokens: the setting of that name, in tokens; None for none.
        stopped: True if the person has stopped it.
    """
    usage = conversation.usage
    if stopped:
        yield "stopped"
    elif usage.finish_reason == "length":
        yield f"cut at {amount(usage.answer_tokens, 'token')}{_limit(conversation, int(max_tokens or 0))}"
    elif usage.finish_reason == "max_rounds":
        yield "the last calls were not run: the model kept calling tools without an answer"
    if usage.reprefilled:
        table = f"the RoPE table for {conversation.cache.regime} texts"
        yield f"the conversation now needs {table}: {amount(usage.reprefilled, 'token')} run again"


def full_note(conversation: Conversation) -> str:
    """The note that the oldest turns are left out of the prompt."""
    return (
        f"the context of {conversation.context:,} tokens is full: from now on the oldest turns are left out of the "
        f"prompt, {conversation.dropped:,} of {len(conversation.turns):,} so far"
    )


def unanswered_note(conversation: Conversation) -> str:
    """The note that an answer has only thoughts."""
    usage = conversation.usage
    full = usage.prompt_tokens + usage.answer_tokens >= conversation.plan.most_tokens
    return end_note(usage.answer_tokens, cut=usage.finish_reason == "length", unanswered=True, full=full)


def _limit(conversation: Conversation, max_tokens: int) -> str:
    """The limit that has cut the last answer, and the way out."""
    usage, longest = conversation.usage, conversation.plan.most_tokens
    if usage.answer_tokens and usage.prompt_tokens + max_tokens <= longest:
        return "; /set max-tokens N changes the limit"
    end = f", the end of the context of {conversation.context:,}{conversation.model.config.context_note}"
    if longest < conversation.context:
        end = f", as this machine's memory holds {amount(longest, 'token')} in all"
    if conversation.overflow == "oldest":
        return f"{end}; the next question makes room"
    return f"{end}; /undo and /reset make room; a chat started with --context-overflow oldest goes on"
