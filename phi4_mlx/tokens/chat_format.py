"""Messages <-> token ids, one small class for each way of the family to write a conversation.

A format lays out control tokens and texts; the tokenizer encodes each text as text, so that `<|end|>` typed by a user
stays what it is. No template of a checkpoint is ever executed: it is recognised, and written anew here.

Source: the `chat_template` in each model's tokenizer_config.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi4_mlx.errors import ConfigError, RequestError, TokenizerError
from phi4_mlx.files.json_file import read_json
from phi4_mlx.tokens.tokenizer import Control, Tokenizer
from phi4_mlx.tools.declarations import tools_text
from phi4_mlx.tools.json_text import json_text

Message = Mapping[str, Any]
Pieces = Iterator[Control | str]

ROLES = ("system", "user", "assistant", "tool")


class ChatFormat:
    """Phi-4-mini-instruct and its base: `<|role|>text<|end|>`, and no line breaks."""

    name = "phi4-mini"
    roles: tuple[str, ...] = ROLES
    end = Control("<|end|>")

    def render(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation.

        Args:
            tokenizer: encodes the texts and knows the control tokens.
            messages: each with "role" and "content"; an assistant's may have "tool_calls" in OpenAI's form.
            tools: as for `flat_tool`; they go in the first system turn, which is made if there is none.
            add_generation_prompt: ends with the start of the assistant's turn instead of the end of the text.

        Raises:
            RequestError: a message or a tool is malformed, or this format has no place for it; says which.
            TokenizerError: the tokenizer lacks a control token of this format.
        """
        checked = self._checked(messages)
        if tools and any(message.get("tools") for message in checked):
            raise RequestError("tools are given twice: as an argument, and in a system message")
        return tokenizer.encode_pieces(self._conversation(tokenizer, checked, tools or (), add_generation_prompt))

    def extend(
        self,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation that goes on.

        Args:
            tokenizer: as in `render`.
            ids: a prompt and the reply drawn for it, as drawn; closed here if it was cut before its end marker.
            messages: what is new.
            add_generation_prompt: as in `render`.
        """
        held = list(ids)
        while held and held[-1] in tokenizer.eos_ids:
            held.pop()
        new = [*self._turns(self._checked(messages)), *self._close(add_generation_prompt)]
        return [*held, *tokenizer.encode_pieces([self.end, *self._after_end(), *new])]

    def own_words(self, tokenizer: Tokenizer, ids: Sequence[int]) -> list[bool]:
        """Which ids of a conversation are for the model to say: the assistant's turns, each with its end marker.

        A turn is known by its control tokens, and no text makes those.

        Args:
            tokenizer: as in `render`.
            ids: a conversation as rendered, whole or cut.
        """
        prompt = list(self._close(add_generation_prompt=True))
        last = max(at for at, piece in enumerate(prompt) if isinstance(piece, Control))
        opening = tokenizer.encode_pieces(prompt[: last + 1])
        end = tokenizer.encode_pieces([self.end])[0]
        own, at, speaking = [False] * len(ids), 0, False
        while at < len(ids):
            if ids[at] == opening[0] and list(ids[at : at + len(opening)]) == opening:
                at, speaking = at + len(opening), True
            else:
                own[at], speaking = speaking, speaking and ids[at] != end
                at += 1
        return own

    def _checked(self, messages: Any) -> list[dict[str, Any]]:
        checked = check_messages(messages)
        for index, message in enumerate(checked):
            if message["role"] not in self.roles:
                known = ", ".join(self.roles)
                raise RequestError(
                    f"message {index} has role {message['role']!r}; the format {self.name} knows {known}"
                )
        return checked

    def _conversation(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any], add_generation_prompt: bool
    ) -> Pieces:
        if tools and all(message["role"] != "system" for message in messages):
            messages = [{"role": "system", "content": ""}, *messages]
        for message in messages:
            shown, tools = (tools, ()) if message["role"] == "system" else ((), tools)
            yield from self._turn(message, shown)
        yield from self._close(add_generation_prompt)

    def _turns(self, messages: Sequence[Message]) -> Pieces:
        for message in messages:
            yield from self._turn(message)

    def _turn(self, message: Message, tools: Sequence[Any] = ()) -> Pieces:
        yield Control(f"<|{message['role']}|>")
        yield message["content"]
        yield from _tools(message, tools)
        yield from _tool_calls(message)
        yield self.end

    def _after_end(self) -> Pieces:
        """What stands between an end marker and the next turn."""
        yield from ()

    def _close(self, add_generation_prompt: bool) -> Pieces:
        yield Control("<|assistant|>" if add_generation_prompt else "<|endoftext|>")


class Phi4MiniReasoning(ChatFormat):
    """Phi-4-mini-reasoning: as Phi-4-mini, behind a system line of its own that the caller's is joined to."""

    name = "phi4-mini-reasoning"
    SYSTEM = "Your name is Phi, an AI math expert developed by Microsoft."

    def _conversation(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any], add_generation_prompt: bool
    ) -> Pieces:
        yield from (Control("<|system|>"), self.SYSTEM)
        for message in messages:
            if message["role"] == "system":
                yield " " + message["content"]
                yield from _tools(message)
        yield from _tools({}, tools)
        yield self.end
        yield from self._turns([message for message in messages if message["role"] != "system"])
        yield from self._close(add_generation_prompt)


class Phi35Mini(ChatFormat):
    """Phi-3.5-mini: a line break after each role and each end."""

    name = "phi3.5-mini"
    roles = ("system", "user", "assistant")

    def _turn(self, message: Message, tools: Sequence[Any] = ()) -> Pieces:
        _refuse_tools(self.name, message, tools)
        if message["role"] == "system" and not message["content"]:
            return
        yield Control(f"<|{message['role']}|>")
        yield "\n" + message["content"]
        yield self.end
        yield "\n"

    def _after_end(self) -> Pieces:
        yield "\n"

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
        yield from (Control("<|im_start|>"), message["role"], Control("<|im_sep|>"), message["content"], self.end)

    def _close(self, add_generation_prompt: bool) -> Pieces:
        if add_generation_prompt:
            yield from (Control("<|im_start|>"), "assistant", Control("<|im_sep|>"))


class Phi4Reasoning(Phi4):
    """Phi-4-reasoning and -plus (14B): as Phi-4, behind a system message of its own.

    The stock template drops the caller's; here it is joined, as Phi-4-mini-reasoning does it.
    """

    name = "phi4-reasoning"
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
        yield from tokenizer.parts(self.SYSTEM)  # <think> is a control token here, and this text may hold it
        yield from (" " + message["content"] for message in messages if message["role"] == "system")
        yield self.end
        yield from self._turns([message for message in messages if message["role"] != "system"])
        yield from self._close(add_generation_prompt)


CHAT_FORMATS: dict[str, ChatFormat] = {
    chat_format.name: chat_format
    for chat_format in (ChatFormat(), Phi4MiniReasoning(), Phi35Mini(), Phi4(), Phi4Reasoning())
}

# SHA-256 of chat templates that have been compared with the format.
_KNOWN_TEMPLATES = {
    "febf589225c9728ab791f52e8897d7607a823d45368f0a4c92fa68997b40cce9": "phi4-mini",  # Phi-4-mini-instruct
    "cbb504cb43fec3f8877d709d9f7a729441e56f41cb4fddd382675fab35de7fe1": "phi4-mini-reasoning",
    "78d976a442bcde2f0be15aafbb8e3050e1104f86732266f68403251b89982a90": "phi3.5-mini",
    "fe4120415a3858b873955c92ce3a103a95bc97c2cb00b72e62659aaf0f891ee5": "phi4",
}


def recognise(folder: Path, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of a checkpoint: by its template, else by the control tokens that only one format has.

    Raises:
        TokenizerError: it is none of the family's.
        ConfigError: a file that may hold the template is damaged.
    """
    template = _template(folder)
    name = _KNOWN_TEMPLATES.get(hashlib.sha256(template.encode(errors="replace")).hexdigest())
    if name is None:
        control = tokenizer.control_ids.keys()
        if {"<|im_start|>", "<|im_sep|>", "<|im_end|>"} <= control:
            name = Phi4Reasoning.name if Phi4Reasoning.SYSTEM in template else Phi4.name
        elif {"<|user|>", "<|assistant|>", "<|end|>"} <= control:
            mini = Phi4MiniReasoning if Phi4MiniReasoning.SYSTEM in template else ChatFormat
            name = mini.name if "<|tool|>" in control else Phi35Mini.name
    if name is None:
        raise TokenizerError(
            f"{folder}: its chat format is not known; name one of {', '.join(CHAT_FORMATS)} with --chat-format"
        )
    return CHAT_FORMATS[name]


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages, each known to have a role and a text.

    Raises:
        RequestError: there are none, or one is malformed; says which, and how.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError(f"messages must be a list with at least one message, not {messages!r:.100}")
    return [_checked(index, message) for index, message in enumerate(messages)]


def _checked(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"message {index} must be an object with role and content, not {message!r:.100}")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise RequestError(f"message {index} has role {role!r:.100}; known are {', '.join(ROLES)}")
    if "content" not in message and not calls:
        raise RequestError(f"message {index} ({role}) has no content")
    if isinstance(content, (list, tuple)):
        content = "".join(_text_part(index, part) for part in content)
    if content is not None and not isinstance(content, str):
        raise RequestError(f"message {index} ({role}) must have text as content, not {content!r:.100}")
    if calls and role != "assistant":
        raise RequestError(f"message {index} ({role}) has tool_calls; only the assistant calls tools")
    checked = {**message, "content": content or ""}
    if calls:
        try:
            checked["tool_calls"] = [_flat_call(call) for call in calls]
            json_text(checked["tool_calls"])
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise RequestError(
                f"message {index}: tool_calls must be a list of names with JSON arguments, not {calls!r:.100}"
            ) from None
    return checked


def _text_part(index: int, part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise RequestError(f"message {index} has a part that is not text: {part!r:.100}; this model reads text alone")
    return text


def _tools(message: Message, tools: Sequence[Any] = ()) -> Pieces:
    """Tools of the call, or those that a system message carries as text, as in the stock template."""
    text = tools_text(tools) if tools else message.get("tools") if message.get("role") == "system" else None
    if text is not None:
        yield from (Control("<|tool|>"), text if isinstance(text, str) else tools_text(text), Control("<|/tool|>"))


def _tool_calls(message: Message) -> Pieces:
    if message.get("tool_calls"):
        yield from (Control("<|tool_call|>"), json_text(message["tool_calls"]), Control("<|/tool_call|>"))


def _flat_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    name, arguments = function["name"], function.get("arguments", {})
    if not isinstance(name, str):
        raise TypeError
    return {"name": name, "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}


def _refuse_tools(name: str, message: Message, tools: Sequence[Any]) -> None:
    if tools or message.get("tools") or message.get("tool_calls"):
        raise RequestError(f"the chat format {name} has no place for tools; only Phi-4-mini was trained to call them")


def _template(folder: Path) -> str:
    """The text of the checkpoint's chat template, if it has one; it is looked at, never run."""
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{path} is not text: {error}") from None
    template = read_json(config).get("chat_template") if config.exists() else None
    if isinstance(template, list):  # several by name, as transformers writes them
        named = (each.get("template") for each in template if isinstance(each, dict) and each.get("name") == "default")
        template = next(named, None)
    return template if isinstance(template, str) else ""
