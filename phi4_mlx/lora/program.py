"""The command line of a run, and the commands to run next."""

from __future__ import annotations

from dataclasses import dataclass

from phi4_mlx.lora.settings import Settings
from phi4_mlx.terminal.advice import command_line

LONGEST = 300  # characters of a command that is repeated


@dataclass(frozen=True)
class Program:
    """The command line of a run.

    Attributes:
        words: its words after the command's name.
    """

    words: tuple[str, ...]

    def to_resume(self) -> str:
        """The end of "--resume goes on": a colon and the command, or "" if that is long."""
        line = command_line("lora", *self.words, *(["--resume"] if "--resume" not in self.words else []))
        return f": {line}" if len(line) <= LONGEST else ""

    def to_train(self) -> str:
        """The command that trains, after a dry run."""
        line = command_line("lora", *(word for word in self.words if word != "--dry-run"))
        return f"train with: {line}" if len(line) <= LONGEST else "train with the same command without --dry-run"

    def to_chat(self, settings: Settings) -> str:
        """The command that chats with the adapter."""
        return f"chat with it: {command_line('chat', model=settings.model, adapter_path=settings.adapter_path)}"

    def to_fuse(self, settings: Settings) -> str:
        """The command that makes a package of the adapter."""
        adapter = settings.adapter_path
        line = command_line("fuse", model=settings.base, adapter_path=adapter, save_path=f"{adapter.rstrip('/')}-fused")
        return f"make it a model of its own: {line}"
