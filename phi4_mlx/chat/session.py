"""A chat under way: one conversation with one model, as a person in a terminal or a pipe sees it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.chat.tools import Doorkeeper, shown_call, shown_result
from phi4_mlx.terminal.options import LONG_PREFILL
from phi4_mlx.terminal.screen import Screen, StopButton

if TYPE_CHECKING:
    from phi4_mlx.agent import Event
    from phi4_mlx.chat.conversation import Conversation
    from phi4_mlx.generation.options import DecodeOptions
    from phi4_mlx.generation.speculate import Mode
    from phi4_mlx.grammar.grammars import Grammar
    from phi4_mlx.models.model import LanguageModel


class Chat:
    """A conversation, how its answers are drawn, and where they are shown.

    Attributes:
        screen: where answers and notes go.
        settings: the sampling options by name; change them with `set`.
        conversation: the turns.
        model_name: what the person called the model.
        saved_as: the file that /save may replace, because it holds this conversation.
        grammar: what every answer must obey, or None.
        approve: asked before a call of a tool is run; None runs all.
        cache_options: those of `make_cache`.
        speculate: how tokens are guessed ahead, as `make_proposer` takes it.
        draft: the model that guesses them, or None.
    """

    conversation: Conversation
    model_name: str
    grammar: Grammar | None = None
    approve: Doorkeeper | None = None
    speculate: Mode = "off"
    draft: LanguageModel | None = None

    def __init__(self, screen: Screen, settings: dict[str, Any], person: bool) -> None:
        self.screen = screen
        self.settings = settings
        self.defaults = dict(settings)
        self.saved_as: Path | None = None
        self.cache_options: dict[str, Any] = {}  # kv_bits and max_kv_size, before models are imported
        self._person = person
        self._options: DecodeOptions | None = None

    def load_model(self, name: str | None, **options: Any) -> None:
        """Loads a model; a conversation that is under way goes on with it.

        Args:
            name: a folder, a Hub id or "demo"; None for the default model.
            options: those of `phi4_mlx.load`.

        Raises:
            Phi4Error: the model cannot be loaded; the one before stays.
        """
        from phi4_mlx.chat.conversation import Conversation
        from phi4_mlx.checkpoint import load
        from phi4_mlx.hub import DEFAULT_MODEL
        from phi4_mlx.models.cache import CacheOptions

        name = DEFAULT_MODEL if name is None else name
        self.screen.status(f"loading {name} ...")
        try:
            model, tokenizer = load(name, **options)
        finally:
            self.screen.status("")
        if hasattr(self, "conversation"):
            self.conversation.switch(model, tokenizer)
        else:
            self.conversation = Conversation(model, tokenizer, cache_options=CacheOptions(**self.cache_options))
        self.model_name, self._options = name, None

    def load_draft(self, name: str) -> None:
        """Loads the model that guesses tokens, from the next answer on."""
        from phi4_mlx.checkpoint import load

        self.draft, self._options = load(name)[0], None

    def set(self, name: str, value: Any) -> None:
        """Changes a sampling option, from the next answer on."""
        self.settings[name] = value
        self._options = None

    def greet(self) -> None:
        """Says who is there, and how to find out more."""
        self.screen.write(f"{self.model_name}, context {self.conversation.context:,} tokens\n")
        self.screen.note("/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.")
        if rescued_file().exists():
            self.screen.note("A conversation whose terminal was closed is kept: /load brings it back.")
        self.screen.end_paragraph()

    def answer(self, question: str) -> None:
        """Asks the model and shows the answer; a person's Ctrl-C stops it, and what was said stays said.

        Raises:
            RequestError: the question is empty, or the context is full.
        """
        stop = StopButton()
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
        if self._person:
            self._explain_end(stop.pressed)

    def _show(self, events: Iterator[Event], stop: StopButton) -> None:
        """Shows an answer as it comes, and the calls in it, until the person stops it."""
        from phi4_mlx.agent import ToolResult
        from phi4_mlx.generation.stream import GenerationResponse

        add, finish = self.screen.answer()
        try:
            for event in events:
                stop.at_once = not isinstance(event, (GenerationResponse, ToolResult))
                if isinstance(event, GenerationResponse):
                    add(event.text)
                elif isinstance(event, ToolResult):
                    self.screen.note(f"= {shown_result(event.text)}")
                else:
                    finish()
                    add, finish = self.screen.answer()
                    self.screen.note(shown_call(event))
                if stop.pressed:
                    break
        finally:
            finish()

    def _show_progress(self, done: int, total: int, stopped: bool) -> None:
        from phi4_mlx.chat.conversation import Interrupted

        begun = self.conversation.usage.answer_tokens > 0  # a re-prefill, in the middle of a line of the answer
        if total > LONG_PREFILL and not begun:
            self.screen.status(f"reading {done:,} of {total:,} tokens ..." if done < total and not stopped else "")
        if stopped:
            raise Interrupted

    def decode_options(self) -> DecodeOptions:
        """The options of every answer, made once for its settings: a seed must not start again at each answer."""
        if self._options is None:
            from phi4_mlx.generation.options import DecodeOptions
            from phi4_mlx.generation.sampling import Sampling
            from phi4_mlx.generation.speculate import make_proposer

            sampling, conversation = Sampling.of(self.settings), self.conversation
            self._options = DecodeOptions(
                max_tokens=self.settings["max-tokens"],
                sampler=sampling.sampler(),
                logits_processors=sampling.processors(),
                proposer=make_proposer(
                    self.speculate,
                    conversation.model,
                    self.draft,
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
            self.screen.note(f"cut at {usage.answer_tokens:,} tokens; /set max-tokens N changes the limit")
        elif usage.finish_reason == "max_rounds":
            self.screen.note("the last calls were not run: the model went on calling without an answer")
        if usage.reprefilled:
            self.screen.note(f"{usage.reprefilled:,} tokens were run again, under the RoPE table for long texts")
        self.screen.end_paragraph()

    def rescue(self) -> str:
        """Keeps the conversation where the next chat finds it; says so."""
        from phi4_mlx.chat import transcript

        if not self.conversation.turns:
            return "nothing had been said"
        path = rescued_file()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        transcript.save(path, self.model_name, self.conversation.system, self.conversation.turns, replace=True)
        return f"/load in the next chat brings the conversation back, from {path}"

    def leave(self) -> None:
        """The person leaves on purpose: a rescued conversation that was brought back needs no rescue any more."""
        if self.saved_as == rescued_file():
            rescued_file().unlink(missing_ok=True)


def rescued_file() -> Path:
    """Where a conversation is kept whose terminal was closed."""
    from phi4_mlx.terminal.line_editor import state_folder

    return state_folder() / "rescued.json"
