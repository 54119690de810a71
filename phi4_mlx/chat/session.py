"""A chat session: one conversation with one model, shown in a terminal or a pipe."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from phi4_mlx.chat.tools import Doorkeeper, shown_call, shown_result
from phi4_mlx.terminal.amount import amount
from phi4_mlx.terminal.options import LONG_PREFILL, LoadArguments
from phi4_mlx.terminal.screen import Screen, StopButton

if TYPE_CHECKING:
    from phi4_mlx.agent import AgentEvent
    from phi4_mlx.chat.conversation import Conversation
    from phi4_mlx.generation.options import DecodeOptions
    from phi4_mlx.generation.speculate import Mode
    from phi4_mlx.grammar.grammars import Grammar
    from phi4_mlx.models.model import LanguageModel
    from phi4_mlx.tokens.tokenizer import Tokenizer


def load_shown(screen: Screen, name: str, options: LoadArguments) -> tuple[LanguageModel, Tokenizer]:
    """Loads a model, with a status line on the screen meanwhile.

    Args:
        screen: shows the status.
        name: a folder, a Hub id or "demo".
        options: the keyword arguments of `load`.

    Raises:
        Phi4Error: the model cannot be loaded.
    """
    from phi4_mlx.checkpoint import load

    screen.status(f"loading {name} ...")
    try:
        return load(name, **options)
    finally:
        screen.status("")


class Chat:
    """A conversation, the settings of its answers, and the screen that shows them.

    Args:
        screen: where answers and notes go.
        conversation: with the loaded model.
        model_name: the name that the model was loaded by.
        settings: the sampling options of `SAMPLING` by name.
        person: True if a person is at the terminal, who may stop an answer and is shown notes.
        speculate: as for `make_proposer`.
        draft: the model that guesses tokens, or None.
        grammar: the grammar of every answer, or None.
        approve: asked before each call of a tool; None runs all.
        warn: shows a line beside the answers, which may go to a pipe, where no person is shown notes.

    Attributes:
        settings: change them with `set`.
        defaults: the settings at the start.
        saved_as: the file that holds this conversation, which /save may therefore replace; or None.
    """

    def __init__(
        self,
        screen: Screen,
        conversation: Conversation,
        model_name: str,
        settings: dict[str, int | float | None],
        *,
        person: bool,
        speculate: Mode = "off",
        draft: LanguageModel | None = None,
        grammar: Grammar | None = None,
        approve: Doorkeeper | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.screen, self.conversation, self.model_name = screen, conversation, model_name
        self.settings, self.defaults = settings, dict(settings)
        self.grammar, self.approve = grammar, approve
        self.saved_as: Path | None = None
        self._speculate: Mode = speculate
        self._draft = draft
        self._person = person
        self._warn = screen.note if person or warn is None else warn
        self._options: DecodeOptions | None = None

    def switch_model(self, name: str) -> None:
        """Continues the conversation with another model.

        Args:
            name: a folder, a Hub id or "demo".

        Raises:
            Phi4Error: the model cannot be loaded; the current one stays.
        """
        self.conversation.switch(*load_shown(self.screen, name, LoadArguments()))
        self.model_name, self._options = name, None

    def set(self, name: str, value: int | float | None) -> None:
        """Changes a sampling option, from the next answer on."""
        self.settings[name] = value
        self._options = None

    def greet(self) -> None:
        """Shows the model, its context, and how to get help."""
        self.screen.write(f"{self.model_name}, context {self.conversation.context:,} tokens\n")
        self.screen.note("/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.")
        if rescued_file().exists():
            self.screen.note("A conversation whose terminal was closed was saved: /load brings it back.")
        self.screen.end_paragraph()

    def answer(self, question: str) -> None:
        """Asks the model and shows the answer. A person's Ctrl-C stops it; the part shown so far stays a turn.

        Raises:
            RequestError: the question is empty, or the context is full.
        """
        stop, dropped_before = StopButton(), self.conversation.dropped
        with stop if self._person else contextlib.nullcontext():
            options = dataclasses.replace(
                self.decode_options(),
                prompt_progress_callback=lambda done, total: self._show_progress(done, total, stop.pressed),
            )
            events = self.conversation.ask(question, options, grammar=self.grammar, approve=self.approve)
            try:
                with contextlib.closing(events):
                    self._show(events, stop)
            except KeyboardInterrupt:
                if not stop.at_once:
                    raise
            finally:
                self.screen.status("")
        if self.conversation.dropped and not dropped_before:
            self._say_full()
        if self._person:
            self._explain_end(stop.pressed)

    def _show(self, events: Iterator[AgentEvent], stop: StopButton) -> None:
        """Shows an answer and its calls as they arrive, until the person stops it."""
        from phi4_mlx.agent import ToolResult
        from phi4_mlx.generation.stream import GenerationResponse

        answer = self.screen.answer()
        try:
            for event in events:
                stop.at_once = not isinstance(event, (GenerationResponse, ToolResult))
                if isinstance(event, GenerationResponse):
                    answer.add(event.text)
                elif isinstance(event, ToolResult):
                    self.screen.note(f"= {shown_result(event.text)}")
                else:
                    answer.finish()
                    answer = self.screen.answer()
                    self.screen.note(shown_call(event))
                if stop.pressed:
                    break
        finally:
            answer.finish()

    def _show_progress(self, done: int, total: int, stopped: bool) -> None:
        from phi4_mlx.chat.conversation import Interrupted

        begun = self.conversation.usage.answer_tokens > 0  # a re-prefill, in the middle of a line of the answer
        if total > LONG_PREFILL and not begun:
            self.screen.status(f"reading {done:,} of {total:,} tokens ..." if done < total and not stopped else "")
        if stopped:
            raise Interrupted

    def decode_options(self) -> DecodeOptions:
        """The options of every answer, made once for all answers under the same settings, so that a seed continues."""
        if self._options is None:
            from phi4_mlx.generation.options import DecodeOptions
            from phi4_mlx.generation.sampling import Sampling
            from phi4_mlx.generation.speculate import make_proposer

            sampling, conversation = Sampling.of(self.settings), self.conversation
            max_tokens = self.settings["max-tokens"]
            assert isinstance(max_tokens, int)
            self._options = DecodeOptions(
                max_tokens=max_tokens,
                sampler=sampling.sampler(),
                logits_processors=sampling.processors(),
                proposer=make_proposer(
                    self._speculate,
                    conversation.model,
                    self._draft,
                    seeded=sampling.seeded,
                    rewindable=conversation.cache.rewindable,
                ),
            )
        return self._options

    def _explain_end(self, stopped: bool) -> None:
        usage = self.conversation.usage
        if stopped:
            self.screen.note("stopped")
        elif usage.finish_reason == "length":
            self.screen.note(f"cut at {amount(usage.answer_tokens, 'token')}{self._limit()}")
        elif usage.finish_reason == "max_rounds":
            self.screen.note("the last calls were not run: the model kept calling tools without an answer")
        if usage.reprefilled:
            table = f"the RoPE table for {self.conversation.cache.regime} texts"
            self.screen.note(f"the conversation now needs {table}: {amount(usage.reprefilled, 'token')} run again")
        self.screen.end_paragraph()

    def _say_full(self) -> None:
        """Says that turns are left out; once, although more follow."""
        conversation = self.conversation
        self._warn(
            f"the context of {conversation.context:,} tokens is full: from now on the oldest turns are left out of the "
            f"prompt, {conversation.dropped:,} of {len(conversation.turns):,} so far"
        )

    def _limit(self) -> str:
        """The limit that has cut the last answer, and the way out, for the note."""
        conversation, max_tokens = self.conversation, self.settings["max-tokens"]
        usage = conversation.usage
        assert isinstance(max_tokens, int)
        if usage.answer_tokens and usage.prompt_tokens + max_tokens <= conversation.context:
            return "; /set max-tokens N changes the limit"
        end = f", the end of the context of {conversation.context:,}"
        if conversation.overflow == "oldest":
            return f"{end}; the next question makes room"
        return f"{end}; /undo and /reset make room; a chat started with --context-overflow oldest goes on"

    def rescue(self) -> str:
        """Saves the conversation where the next chat finds it; returns a sentence that says so."""
        from phi4_mlx.chat import transcript

        if not self.conversation.turns:
            return "the conversation had no turns"
        path = rescued_file()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        transcript.save(path, self.model_name, self.conversation.system, self.conversation.turns, replace=True)
        return f"/load in the next chat brings the conversation back, from {path}"

    def leave(self) -> None:
        """Ends the chat on purpose: the rescued file of a conversation that was loaded from it is removed."""
        if self.saved_as == rescued_file():
            rescued_file().unlink(missing_ok=True)


def rescued_file() -> Path:
    """The file for the conversation of a terminal that was closed."""
    from phi4_mlx.terminal.line_editor import state_folder

    return state_folder() / "rescued.json"
