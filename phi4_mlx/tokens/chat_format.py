"""Chat formats: messages to token ids, one class for each format of the family.

A format is a sequence of control tokens and texts. The tokenizer encodes each text as text, so `<|end|>` typed by a
user never becomes a control token. Chat templates are not executed: a format is recognised and implemented here.

Source: the `chat_template` in each model's tokenizer_config.json.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from phi4_mlx.errors import ConfigError, RequestError, TokenizerError
from phi4_mlx.files.json_file import JsonObject, read_json
from phi4_mlx.files.regular_file import read_regular
from phi4_mlx.tokens.messages import ROLES, check_media_count, check_messages
from phi4_mlx.tokens.prompt import Medium, Prompt, places_of
from phi4_mlx.tokens.tokenizer import Control, Tokenizer
from phi4_mlx.tools.declarations import tools_text
from phi4_mlx.tools.json_text import json_text
from phi4_mlx.tools.markup import CALLS_CLOSE, CALLS_OPEN, TOOLS_CLOSE, TOOLS_OPEN

Message = Mapping[str, Any]
Pieces: TypeAlias = "Iterator[Control | str | Medium]"


class ChatFormat:
    """Phi-4-mini-instruct and its base: `<|role|>text<|end|>`, without line breaks.

    Attributes:
        name: the format's name on the command line.
        roles: the roles that a message may have.
        end: the control token that ends a turn.
        after_end: the text between `end` and the next turn.
        reasons: True if the model thinks in its answer before it gives the result.
    """

    name = "phi4-mini"
    roles: tuple[str, ...] = ROLES
    end = Control("<|end|>")
    after_end = ""
    reasons = False

    def render(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Renders a conversation.

        Args:
            tokenizer: encodes the texts and the control tokens.
            messages: as for `check_messages`.
            tools: as for `flat_tool`; they go in the first system turn, which is added if there is none.
            add_generation_prompt: ends with the start of the assistant's turn instead of the end of the text.

        Returns:
            Token ids [T].

        Raises:
            RequestError: a message or a tool is malformed, or this format does not support it; names it.
            TokenizerError: the tokenizer lacks a control token of this format.
        """
        checked = self._checked(tokenizer, messages)
        if tools and any(message.get("tools") for message in checked):
            raise RequestError("tools are given twice: as an argument, and in a system message")
        return tokenizer.encode_pieces(self._conversation(tokenizer, checked, tools or (), add_generation_prompt))

    def render_open(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Prompt:
        """Renders a conversation up to the text of its last message, which more text may follow.

        Args:
            tokenizer: as in `render`.
            messages: as in `render`.

        Returns:
            Token ids [T].

        Raises:
            RequestError: as in `render`.
            TokenizerError: as in `render`.
        """
        pieces = list(self._conversation(tokenizer, self._checked(tokenizer, messages), (), add_generation_prompt=True))
        ends = [at for at, piece in enumerate(pieces) if isinstance(piece, Control) and piece == self.end]
        return tokenizer.encode_pieces(pieces[: ends[-1]])

    def append(
        self, tokenizer: Tokenizer, ids: list[int], messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> None:
        """Continues a conversation in place, in time that does not depend on its length.

        Args:
            tokenizer: as in `render`.
            ids: a prompt and the reply generated for it [T]; the reply is closed here if it lacks its end marker. A
                `Prompt` if there are media.
            messages: the messages after the reply.
            add_generation_prompt: as in `render`.

        Raises:
            RequestError: as in `render`.
            TokenizerError: as in `render`.
        """
        new = [*self._turns(self._checked(tokenizer, messages)), *self._close(add_generation_prompt)]
        encoded = tokenizer.encode_pieces([self.end, self.after_end, *new])
        if encoded.media and not isinstance(ids, Prompt):
            raise RequestError("messages with media can only be appended to a Prompt, as apply_chat_template returns")
        check_media_count([place.medium for place in (*places_of(ids), *encoded.places)])
        while ids and ids[-1] in tokenizer.eos_ids:
            ids.pop()
        ids += encoded

    def length(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> int:
        """The tokens that messages take in a conversation.

        A prompt is encoded piece by piece between its control tokens, so the lengths of its messages add up.

        Args:
            tokenizer: as in `render`.
            messages: as in `render`.

        Raises:
            RequestError: as in `render`.
            TokenizerError: as in `render`.
        """
        return len(tokenizer.encode_pieces(self._turns(self._checked(tokenizer, messages))))

    def own_words(self, tokenizer: Tokenizer, ids: Sequence[int]) -> list[bool]:
        """Marks the ids that the model generates: the assistant's turns, each with its end marker.

        A turn is found by its control tokens, which text never becomes.

        Args:
            tokenizer: as in `render`.
            ids: a rendered conversation [T], whole or cut.

        Returns:
            True for each id [T] in an assistant's turn.
        """
        prompt = list(self._close(add_generation_prompt=True))
        last = max(at for at, piece in enumerate(prompt) if isinstance(piece, Control))
        opening = tokenizer.encode_pieces(prompt[: last + 1])
        (end,) = tokenizer.encode_pieces([self.end])
        own, at, speaking = [False] * len(ids), 0, False
        while at < len(ids):
            if ids[at] == opening[0] and list(ids[at : at + len(opening)]) == opening:
                at, speaking = at + len(opening), True
            else:
                own[at], speaking = speaking, speaking and ids[at] != end
                at += 1
        return own

    def _checked(self, tokenizer: Tokenizer, messages: Any) -> list[JsonObject]:
        checked = check_messages(messages, tokenizer.media)
        for index, message in enumerate(checked):
            if message["role"] not in self.roles:
                known = ", ".join(self.roles)
                raise RequestError(
                    f"message {index} has role {message['role']!r}; the chat format {self.name} supports {known}"
                )
        return checked

    def _conversation(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any], add_generation_prompt: bool
    ) -> Pieces:
        if tools and all(message["role"] != "system" for message in messages):
            messages = [{"role": "system", "content": ""}, *messages]
        for message in messages:
            if message["role"] == "system":
                yield from self._turn(message, tools)
                tools = ()  # the first system turn alone shows them
            else:
                yield from self._turn(message)
        yield from self._close(add_generation_prompt)

    def _turns(self, messages: Sequence[Message]) -> Pieces:
        for message in messages:
            yield from self._turn(message)

    def _turn(self, message: Message, tools: Sequence[Any] = ()) -> Pieces:
        yield Control(f"<|{message['role']}|>")
        yield from _content(message)
        yield from _tools(message, tools)
        yield from _tool_calls(message)
        yield self.end

    def _close(self, add_generation_prompt: bool) -> Pieces:
        yield Control("<|assistant|>" if add_generation_prompt else "<|endoftext|>")


class Phi4MiniReasoning(ChatFormat):
    """Phi-4-mini-reasoning: as Phi-4-mini, with a fixed system line to which the caller's is appended."""

    name = "phi4-mini-reasoning"
    reasons = True
    SYSTEM = "Your name is Phi, an AI math expert developed by Microsoft."

    def _conversation(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any], add_generation_prompt: bool
    ) -> Pieces:
        yield from (Control("<|system|>"), self.SYSTEM)
        for message in messages:
            if message["role"] == "system":
                yield " "
                yield from _content(message)
                yield from _tools(message)
        yield from _tools({}, tools)
        yield self.end
        yield from self._turns([message for message in messages if message["role"] != "system"])
        yield from self._close(add_generation_prompt)


class Phi4MiniFlashReasoning(ChatFormat):
    """Phi-4-mini-flash-reasoning: the turns of Phi-4-mini-instruct, and answers that begin with `<think>`."""

    name = "phi4-mini-flash-reasoning"
    reasons = True


class Phi35Mini(ChatFormat):
    """Phi-3.5-mini: a line break after each role and each end."""

    name = "phi3.5-mini"
    roles = ("system", "user", "assistant")
    after_end = "\n"

    def _turn(self, message: Message, tools: Sequence[Any] = ()) -> Pieces:
        _refuse_tools(self.name, message, tools)
        if message["role"] == "system" and not message["content"]:
            return
        yield Control(f"<|{message['role']}|>")
        yield "\n"
        yield from _content(message)
        yield self.end
        yield self.after_end

    def _close(self, add_generation_prompt: bool) -> Pieces:
        yield Control("<|assistant|>" if add_generation_prompt else "<|endoftext|>")
        if add_generation_prompt:
            yield "\n"


class Phi4(ChatFormat):
    """Phi-4 (14B): `<|im_start|>role<|im_sep|>text<|im_end|>`."""

    name = "phi4"
    roles = ("system", "user", "assistant")
    end = Control("<|im_end|>")

    def _turn(self, message: Message, tools: Sequence[Any] = ()) -> Pieces:
        _refuse_tools(self.name, message, tools)
        yield from (Control("<|im_start|>"), message["role"], Control("<|im_sep|>"), *_content(message), self.end)

    def _close(self, add_generation_prompt: bool) -> Pieces:
        if add_generation_prompt:
            yield from (Control("<|im_start|>"), "assistant", Control("<|im_sep|>"))


class Phi4Reasoning(Phi4):
    """Phi-4-reasoning and -plus (14B): as Phi-4, with a fixed system message.

    The stock template drops the caller's; here it is appended, as in Phi-4-mini-reasoning.
    """

    name = "phi4-reasoning"
    reasons = True
    SYSTEM = (
        "You are Phi, a language model trained by Microsoft to help users. Your role as an assistant involves "
        "thoroughly exploring questions through a systematic thinking process before providing the final precise and "
        "accurate solutions. This requires engaging in a comprehensive cycle of analysis, summarizing, exploration, "
        "reassessment, reflection, backtracing, and iteration to develop well-considered thinking process. Please "
        "structure your response into two main sections: Thought and Solution using the specified format: <think> "
        "{Thought section} </think> {Solution section}. In the Thought section, detail your reasoning process in "
        "steps. Each step should include detailed considerations such as analysing questions, summarizing relevant "
        "findings, brainstorming new ideas, verifying the accuracy of the current steps, refining any errors, and "
        "revisiting previous steps. In the Solution section, based on various attempts, explorations, and reflections "
        "from the Thought section, systematically present the final solution that you deem correct. The Solution "
        "section should be logical, accurate, and concise and detail necessary steps needed to reach the conclusion. "
        "Now, try to solve the following question through the above guidelines:"
    )

    def _conversation(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any], add_generation_prompt: bool
    ) -> Pieces:
        _refuse_tools(self.name, {}, tools)
        yield from (Control("<|im_start|>"), "system", Control("<|im_sep|>"))
        yield from tokenizer.parts(self.SYSTEM)  # <think> in this text is a control token
        for message in messages:
            if message["role"] == "system":
                yield from (" ", *_content(message))
        yield self.end
        yield from self._turns([message for message in messages if message["role"] != "system"])
        yield from self._close(add_generation_prompt)


_ALL = (ChatFormat(), Phi4MiniReasoning(), Phi4MiniFlashReasoning(), Phi35Mini(), Phi4(), Phi4Reasoning())
CHAT_FORMATS: dict[str, ChatFormat] = {chat_format.name: chat_format for chat_format in _ALL}

# SHA-256 of a chat template -> the format that renders the same ids.
_KNOWN_TEMPLATES = {
    "febf589225c9728ab791f52e8897d7607a823d45368f0a4c92fa68997b40cce9": "phi4-mini",  # Phi-4-mini-instruct
    "cbb504cb43fec3f8877d709d9f7a729441e56f41cb4fddd382675fab35de7fe1": "phi4-mini-reasoning",
    "78d976a442bcde2f0be15aafbb8e3050e1104f86732266f68403251b89982a90": "phi3.5-mini",
    "fe4120415a3858b873955c92ce3a103a95bc97c2cb00b72e62659aaf0f891ee5": "phi4",
}


def recognise(folder: Path, tokenizer: Tokenizer) -> ChatFormat:
    """Recognises the chat format of a checkpoint by its template, or else by its control tokens.

    Args:
        folder: the checkpoint's.
        tokenizer: the checkpoint's.

    Raises:
        TokenizerError: the format is not one of the family's.
        ConfigError: a file that may contain the template is damaged.
    """
    template = chat_template(folder)
    name = _KNOWN_TEMPLATES.get(hashlib.sha256(template.encode(errors="replace")).hexdigest())
    if name is None:
        control = tokenizer.control_ids.keys()
        if {"<|im_start|>", "<|im_sep|>", "<|im_end|>"} <= control:
            name = Phi4Reasoning.name if Phi4Reasoning.SYSTEM in template else Phi4.name
        elif {"<|user|>", "<|assistant|>", "<|end|>"} <= control:
            mini = Phi4MiniReasoning if Phi4MiniReasoning.SYSTEM in template else ChatFormat
            name = mini.name if TOOLS_OPEN in control else Phi35Mini.name
    if name is None:
        raise TokenizerError(
            f"{folder}: its chat format is unknown; choose one of {', '.join(CHAT_FORMATS)} with --chat-format"
        )
    return CHAT_FORMATS[name]


def recognise_flash(folder: Path, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of a Phi-4-mini-flash-reasoning checkpoint, whose template is that of Phi-4-mini-instruct.

    Args:
        folder: the checkpoint's.
        tokenizer: the checkpoint's.

    Raises:
        TokenizerError, ConfigError: as for `recognise`.
    """
    found = recognise(folder, tokenizer)
    return CHAT_FORMATS[Phi4MiniFlashReasoning.name] if found.name == ChatFormat.name else found


def chat_template(folder: Path) -> str:
    """The text of a checkpoint's chat template, or an empty string.

    Args:
        folder: the checkpoint's.

    Raises:
        ConfigError: a file that may contain the template is damaged.
    """
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if os.path.lexists(path):
        try:
            return read_regular(path).decode("utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{path} is not text: {error}") from None
    template = read_json(config).get("chat_template") if os.path.lexists(config) else None
    if isinstance(template, list):  # several templates by name, as transformers writes them
        named = (each.get("template") for each in template if isinstance(each, dict) and each.get("name") == "default")
        template = next(named, None)
    return template if isinstance(template, str) else ""


def _content(message: Message) -> Sequence[str | Medium]:
    """The content of a checked message, in pieces."""
    content = message["content"]
    return [content] if isinstance(content, str) else content


def _tools(message: Message, tools: Sequence[Any] = ()) -> Pieces:
    """The given tools, or else those in "tools" of a system message, as in the stock template."""
    text: str | None = tools_text(tools) if tools else None
    if text is None and message.get("role") == "system" and message.get("tools") is not None:
        given = message["tools"]
        text = given if isinstance(given, str) else tools_text(given)
    if text is not None:
        yield from (Control(TOOLS_OPEN), text, Control(TOOLS_CLOSE))


def _tool_calls(message: Message) -> Pieces:
    if message.get("tool_calls"):
        yield from (Control(CALLS_OPEN), json_text(message["tool_calls"]), Control(CALLS_CLOSE))


def _refuse_tools(name: str, message: Message, tools: Sequence[Any]) -> None:
    if tools or message.get("tools") or message.get("tool_calls"):
        raise RequestError(f"the chat format {name} does not support tools; only Phi-4-mini was trained to call them")
