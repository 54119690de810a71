"""The requests of a file of prompts, with all that their answers depend on."""

from __future__ import annotations

import argparse
import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phi4_mlx.commands.prompts.lines import PromptFile, PromptLine
from phi4_mlx.data.jsonl import refuse_lines
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.answer_batch import AnswerRequest
from phi4_mlx.generation.memory import ContextPlan, check_context
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.hub import DEFAULT_MODEL
from phi4_mlx.terminal.command import shown_default

if TYPE_CHECKING:
    from phi4_mlx.commands.prompts.output import About
    from phi4_mlx.grammar.grammars import Grammar
    from phi4_mlx.terminal.options import Settings
    from phi4_mlx.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class RequestSettings:
    """The settings that all requests of a run share.

    Attributes:
        sampling: the options of `terminal.options.SAMPLING`, given or default.
        limited: True if --max-tokens was given, so that it is not lowered to what fits.
        system_prompt: before a prompt that has no system message of its own; None for none.
        chat: False continues the prompts themselves.
        stops: strings that end an answer.
        grammar: that all answers obey; None for none.
    """

    sampling: Settings
    limited: bool
    system_prompt: str | None
    chat: bool
    stops: Sequence[str]
    grammar: Grammar | None


def requests_of(
    prompts: PromptFile, settings: RequestSettings, tokenizer: Tokenizer, plan: ContextPlan
) -> list[AnswerRequest]:
    """Encodes prompts; the key of a request is the index of its line, from 0.

    Args:
        prompts: the file.
        settings: of all its answers.
        tokenizer: of the model.
        plan: of its memory.

    Raises:
        RequestError: a prompt is malformed, or does not fit the context or the memory; names its line.
    """
    found: list[AnswerRequest] = []
    bad: list[tuple[int, str]] = []
    for line in prompts.lines:
        try:
            found.append(_request(line, settings, tokenizer, plan))
        except RequestError as error:
            bad.append((line.number, str(error)))
    refuse_lines(prompts.path, bad)
    return found


def _request(line: PromptLine, settings: RequestSettings, tokenizer: Tokenizer, plan: ContextPlan) -> AnswerRequest:
    ids = _ids(line, settings, tokenizer)
    if len(ids) >= plan.longest:
        raise RequestError(
            f"the prompt has {len(ids):,} tokens, and the context of {plan.longest:,} leaves no room for an answer; "
            "shorten it"
        )
    asked = settings.sampling["max-tokens"] if line.max_tokens is None else line.max_tokens
    assert isinstance(asked, int)
    if line.max_tokens is not None or settings.limited:
        max_tokens = min(asked, plan.longest - len(ids))
        check_context(plan, len(ids), max_tokens)
    else:
        check_context(plan, len(ids) + 1)
        max_tokens = max(min(asked, plan.most_tokens - len(ids)), 1)
    sampling = Sampling.of(settings.sampling)
    if line.seed is not None:
        sampling = replace(sampling, seed=line.seed)
    thinks = settings.chat and tokenizer.chat_format.reasons and settings.grammar is None
    return AnswerRequest(
        str(line.number - 1),
        array("I", ids),
        max_tokens,
        sampling,
        settings.stops,
        line.tools,
        settings.grammar,
        thinks,
    )


def _ids(line: PromptLine, settings: RequestSettings, tokenizer: Tokenizer) -> list[int]:
    prompt = line.prompt
    if not settings.chat:
        if not isinstance(prompt, str):
            raise RequestError("messages need the chat format, and --ignore-chat-template leaves it out; drop it")
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    if settings.system_prompt is not None and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": settings.system_prompt}, *messages]
    return tokenizer.apply_chat_template(messages, line.tools or None)


def about(
    args: argparse.Namespace, prompts: PromptFile, settings: RequestSettings, known: Mapping[str, str], chat_format: str
) -> About:
    """What the answers depend on, by the option that sets it.

    Args:
        args: the options of `generate`.
        prompts: the file.
        settings: of all its answers.
        known: fingerprints of the model and its adapter, by their options.
        chat_format: the name of the prompts' format.
    """
    grammar = None if settings.grammar is None else hashlib.sha256(settings.grammar.text.encode()).hexdigest()
    found: dict[str, tuple[Any, Any]] = {
        "--model": (known["--model"], args.model or DEFAULT_MODEL),
        "--adapter-path": (known["--adapter-path"], args.adapter_path),
        "--prompts": (prompts.digest, args.prompts),
        "--schema": (grammar, args.schema),
        "--chat-format": (chat_format,) * 2,
        "--system-prompt": (settings.system_prompt,) * 2,
        "--ignore-chat-template": (not settings.chat, "off" if settings.chat else "on"),
        "--stop": ([*settings.stops], " ".join(map(repr, settings.stops)) or None),
        "--kv-bits": (args.kv_bits,) * 2,
        **{f"--{name}": (value, value) for name, value in settings.sampling.items()},
    }
    return {name: {"is": value, "shown": _shown(shown)} for name, (value, shown) in found.items()}


def _shown(value: object) -> str:
    text = "none" if value is None else shown_default(value)
    return text if len(text) <= 60 else text[:60] + "..."


def to_json(request: AnswerRequest) -> dict[str, Any]:
    """A request as JSON, without its grammar, which all share."""
    return {
        "key": request.key, "ids": [*request.ids], "max_tokens": request.max_tokens, "sampling": vars(request.sampling),
        "stops": [*request.stops], "tools": [*request.tools], "thinks": request.thinks,
    }  # fmt: skip


def from_json(value: Mapping[str, Any], grammar: Grammar | None) -> AnswerRequest:
    """The request of `to_json`."""
    sampling = {**value["sampling"]}
    return AnswerRequest(
        **{**value, "ids": array("I", value["ids"]), "sampling": Sampling(**sampling), "grammar": grammar}
    )
