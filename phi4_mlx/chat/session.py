"""A chat session: one conversation with one model, shown in a terminal or a pipe."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phi4_mlx.chat.notes import end_notes, full_note, settings_line, unanswered_note
from phi4_mlx.chat.tools import Doorkeeper, shown_call, shown_result
from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.options import LONG_PREFILL, Settings, advised, sampling_defaults
from phi4_mlx.terminal.screen import Screen, StopButton

if TYPE_CHECKING:
    from phi4_mlx.agent import AgentEvent
    from phi4_mlx.chat.conversation import Conversation
    from phi4_mlx.generation.options import DecodeOptions
    from phi4_mlx.generation.speculate import Mode
    from phi4_mlx.grammar.grammars import Grammar
    from phi4_mlx.models.model import LanguageModel
    from phi4_mlx.tokens.media.media_file import MediaFile
    from phi4_mlx.tokens.tokenizer import Tokenizer


MAX_TOKENS = 2048  # of an answer, where the model's authors advise none


def load_shown(
    screen: Screen, name: str, load: Callable[[], tuple[LanguageModel, Tokenizer]]
) -> tuple[LanguageModel, Tokenizer]:
    """Loads a model, with a status line on the screen meanwhile.

    Args:
        screen: shows the status.
        name: of the model, for the status.
        load: loads it.

    Raises:
        Phi4Error: the model cannot be loaded.
    """
    screen.status(f"loading {name} ...")
    try:
        return load()
    finally:
        screen.status("")


def _load_other(name: str) -> tuple[LanguageModel, Tokenizer]:
    from phi4_mlx.checkpoint import load
    from phi4_mlx.ranks.launch import launched

    if launched() is not None:
        raise RequestError("the ranks hold one model until the chat ends; start it again with another --model")
    return load(name)


class Chat:
    """A conversation, the settings of its answers, and the screen that shows them.

    Args:
        screen: where answers and notes go.
        conversation: with the loaded model.
        model_name: the name that the model was loaded by.
        given: the sampling options of `SAMPLING` that were given, by name; the others have the model's defaults.
        person: True if a person is at the terminal, who may stop an answer and is shown notes.
        speculate: as for `make_proposer`.
        draft: the model that guesses tokens, or None.
        grammar: the grammar of every answer, or None.
        approve: asked before each call of a tool; None runs all.
        warn: shows a line beside the answers, which may go to a pipe, where no person is shown notes.

    Attributes:
        settings: the value of each option of `SAMPLING`; change them with `set`.
        defaults: the settings at the start, and after `switch_model`.
        pending: the pictures and sounds that go with the next question.
        saved_as: the file that holds this conversation, which /save may therefore replace; or None.
    """

    def __init__(
        self,
        screen: Screen,
        conversation: Conversation,
        model_name: str,
        given: Settings,
        *,
        person: bool,
        speculate: Mode = "off",
        draft: LanguageModel | None = None,
        grammar: Grammar | None = None,
        approve: Doorkeeper | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.screen, self.conversation, self.model_name = screen, conversation, model_name
        self._given = {option: value for option, value in given.items() if value is not None}
        self.defaults = self._defaults()
        self.settings = {**self.defaults}
        self.grammar, self.approve = grammar, approve
        self.pending: list[MediaFile] = []
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
        model, tokenizer = load_shown(self.screen, name, lambda: _load_other(name))
        pending = [each.switched(self.conversation.tokenizer, tokenizer) for each in self.pending]
        self.conversation.switch(model, tokenizer)
        self.pending = pending
        changed = {option: value for option, value in self.settings.items() if value != self.defaults[option]}
        self.defaults = self._defaults()
        self.settings = self.defaults | changed
        self.model_name, self._options = name, None

    def _defaults(self) -> Settings:
        """The settings of the options that were given, and the model's own."""
        return sampling_defaults(self.conversation.tokenizer.chat_format.name, MAX_TOKENS) | self._given

    def set(self, name: str, value: int | float | None) -> None:
        """Changes a sampling option, from the next answer on."""
        self.settings[name] = value
        self._options = None

    def greet(self) -> None:
        """Shows the model, its context, the settings that its authors advise, and how to get help."""
        self.screen.write(f"{self.model_name}, context {self.conversation.context:,} tokens\n")
        if names := advised(self.conversation.tokenizer.chat_format.name):
            shown = settings_line(self.settings, names, self.conversation.plan.most_tokens)
            self.screen.note(f"{shown}; /set changes them.")
        self.screen.note("/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.")
        if self.conversation.tokenizer.media is not None:
            self.screen.note("Drag a picture or a sound into the line, or name one: /image FILE, /audio FILE, /record.")
        if rescued_file().exists():
            self.screen.note("A conversation whose terminal was closed was saved: /load brings it back.")
        self.screen.end_paragraph()

    def answer(self, question: str, media: Sequence[MediaFile] | None = None) -> None:
        """Asks the model and shows the answer. A person's Ctrl-C stops it; the part shown so far stays a turn.

        Args:
            question: the text.
            media: the pictures and sounds before it; None for the pending ones, of which none is left after the turn.

        Raises:
            RequestError: the question is empty, or the context is full.
        """
        stop, dropped_before, unanswered = StopButton(), self.conversation.dropped, False
        attached, turns_before = self.pending if media is None else media, len(self.conversation.turns)
        with stop if self._person else contextlib.nullcontext():
            options = dataclasses.replace(
                self.decode_options(),
                prompt_progress_callback=lambda done, total: self._show_progress(done, total, stop.pressed),
            )
            events = self.conversation.ask(question, options, attached, grammar=self.grammar, approve=self.approve)
            try:
                with contextlib.closing(events):
                    unanswered = self._show(events, stop)
            except KeyboardInterrupt:
                if not stop.at_once:
                    raise
            finally:
                self.screen.status("")
                if media is None and len(self.conversation.turns) > turns_before:
                    self.pending.clear()
        if self.conversation.dropped and not dropped_before:
            self._warn(full_note(self.conversation))  # once, although more turns follow
        if self._person:
            for note in end_notes(self.conversation, self.settings["max-tokens"], stop.pressed):
                self.screen.note(note)
            self.screen.end_paragraph()
        elif unanswered:
            self._warn(unanswered_note(self.conversation))

    def _show(self, events: Iterator[AgentEvent], stop: StopButton) -> bool:
        """Shows an answer and its calls as they arrive, until the person stops it; True if it has only thoughts."""
        from phi4_mlx.agent import ToolResult
        from phi4_mlx.generation.stream import GenerationResponse

        answer = self.screen.answer()
        try:
            for event in events:
                stop.at_once = not isinstance(event, (GenerationResponse, ToolResult))
                if isinstance(event, GenerationResponse):
                    answer.think(event.thought)
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
        return answer.unanswered

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
