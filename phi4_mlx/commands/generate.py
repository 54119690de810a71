"""`python -m phi4_mlx generate`: the answer to one prompt, alone on standard output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from phi4_mlx.commands.prompt import prompt_messages, read_media, read_prompt, show_progress
from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.amount import amount, size
from phi4_mlx.terminal.command import Idle, Parser, complain, run, text, typed, word
from phi4_mlx.terminal.options import (
    add_decoding_options,
    add_media_options,
    add_model_options,
    add_parallel_option,
    add_sampling_options,
    cache_options,
    check_decoding_options,
    complain_of_cuts,
    given_sampling,
    load_options,
    sampling_defaults,
)
from phi4_mlx.terminal.screen import Screen
from phi4_mlx.terminal.thoughts import end_note

if TYPE_CHECKING:
    from phi4_mlx.generation.options import DecodeOptions
    from phi4_mlx.generation.stream import GenerationResponse
    from phi4_mlx.grammar.grammars import Grammar
    from phi4_mlx.models.model import LanguageModel
    from phi4_mlx.models.prompt_cache import PromptCache
    from phi4_mlx.ranks.session import Session
    from phi4_mlx.terminal.options import Settings
    from phi4_mlx.tokens.tokenizer import Tokenizer


PROG = typed("generate")
MAX_TOKENS = 256  # of an answer, where the model's authors advise none


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _generate, argv)


def _parser() -> Parser:
    parser = Parser(prog=PROG, description="Print a model's answer to one prompt.")
    add_model_options(parser)
    add_parallel_option(parser)
    parser.add_argument(
        "--prompt", "-p", type=text,
        help="the prompt; text on standard input follows it, after an empty line; - reads that alone (default: -)",
    )  # fmt: skip
    add_media_options(parser, "the prompt")
    parser.add_argument(
        "--system-prompt", type=text, help="instructions to the model, before the prompt (default: none)"
    )
    parser.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="continue the prompt itself, without chat turns around it; control strings in it stay text",
    )
    add_sampling_options(parser, MAX_TOKENS)
    add_decoding_options(parser)
    parser.add_argument(
        "--stop",
        type=word,
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be repeated",
    )
    parser.add_argument(
        "--schema",
        type=word,
        metavar="FILE.json",
        help="the answer is JSON that obeys this JSON schema (default: none)",
    )
    parser.add_argument(
        "--prompt-cache-file",
        type=word,
        metavar="FILE",
        help="a file of cache-prompt: the prompt continues its text, after an empty line (default: none)",
    )
    parser.add_argument(
        "--prompts", type=word, metavar="FILE.jsonl",
        help='answer every line of a file: {"prompt": text}, {"messages": [...]} or a JSON string, with an "id", '
        '"max_tokens" or "seed" of its own where wanted (default: none)',
    )  # fmt: skip
    parser.add_argument(
        "--output", type=word, metavar="OUT.jsonl",
        help="the answers to --prompts, a line each, in their order; a run that was stopped goes on (default: none)",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="print counts and speeds to standard error at the end")
    parser.idle.append(Idle(("chat_format",), lambda args: args.ignore_chat_template, "with --ignore-chat-template"))
    return parser


def _generate(args: argparse.Namespace) -> None:
    _check_options(args)
    if args.prompts is not None:
        from phi4_mlx.commands.prompts.run import answer_file

        return answer_file(args, MAX_TOKENS)
    from phi4_mlx.hub import DEFAULT_MODEL
    from phi4_mlx.ranks.session import ModelOptions, check_over_ranks, command_options, open_session

    check_over_ranks(args, "prompt_cache_file")
    name, command = args.model or DEFAULT_MODEL, command_options("generate", args)
    options = ModelOptions(name, args.parallel, **load_options(args), command=command)
    with open_session(options, partial(complain, PROG)) as session:
        _generate_in(session, args)


def _generate_in(session: Session, args: argparse.Namespace) -> None:
    prompt = read_prompt(args)  # before the model is loaded, so that a mistake costs no wait
    grammar = _grammar(args) if args.schema is not None else None

    from phi4_mlx.checkpoint import load
    from phi4_mlx.generation.memory import check_context, plan_context
    from phi4_mlx.generation.options import DecodeOptions
    from phi4_mlx.generation.sampling import Sampling
    from phi4_mlx.generation.speculate import make_proposer

    model, tokenizer = session.load(lazy=True)  # the first step reads each weight when it needs it
    if args.prompt_cache_file is None:
        ids, cache = _ids(tokenizer, prompt, args), model.make_cache(**cache_options(args))
    else:
        ids, cache = _after_cached(args.prompt_cache_file, prompt, model, tokenizer)
    plan = plan_context(model, cache.options.kv_bits, cache.options.max_kv_size)
    length = cache.offset + len(ids)
    check_context(plan, length)
    settings, lowered = _settings(args, tokenizer, plan.most_tokens - length)
    max_tokens = settings["max-tokens"]
    assert isinstance(max_tokens, int)
    draft = None if args.draft_model is None else load(args.draft_model, lazy=True)[0]
    constraint = None
    if grammar is not None:
        from phi4_mlx.grammar.constraint import Constraint

        constraint = Constraint(grammar, tokenizer, model.config.vocab_size, max_tokens)
    sampling = Sampling.of(settings)
    options = DecodeOptions(
        max_tokens=max_tokens,
        sampler=sampling.sampler(),
        logits_processors=sampling.processors(),
        logits_mask=constraint,
        stop=args.stop,
        proposer=make_proposer(args.speculate, model, draft, seeded=sampling.seeded, rewindable=cache.rewindable),
    )
    cached = cache.offset
    thinks = tokenizer.chat_format.reasons and grammar is None and not args.ignore_chat_template
    last, unanswered = _print_answer(model, tokenizer, ids, cache, options, thinks)
    if args.verbose:
        _report(last, cached)
    cut = last.finish_reason == "length"
    if unanswered or (lowered and cut):
        complain(PROG, end_note(last.generation_tokens, cut=cut, unanswered=unanswered, full=lowered))
    if constraint is not None and not constraint.complete:
        raise RequestError(f"the answer had not ended after --max-tokens {max_tokens}; raise --max-tokens")
    if constraint is not None and constraint.forced:
        note = f"the answer was brought to its end by --max-tokens {max_tokens}; raise it for a whole answer"
        complain(PROG, note)


def _settings(args: argparse.Namespace, tokenizer: Tokenizer, room: int) -> tuple[Settings, bool]:
    """The sampling options, given or default, and True if the default max-tokens was lowered to `room` tokens."""
    given = given_sampling(args)
    settings = sampling_defaults(tokenizer.chat_format.name, MAX_TOKENS) | given
    complain_of_cuts(PROG, args, settings["temp"])
    lowered = "max-tokens" not in given and (settings["max-tokens"] or 0) > room
    return settings | ({"max-tokens": max(room, 1)} if lowered else {}), lowered


def _print_answer(
    model: LanguageModel,
    tokenizer: Tokenizer,
    ids: list[int],
    cache: PromptCache,
    options: DecodeOptions,
    thinks: bool,
) -> tuple[GenerationResponse, bool]:
    """Prints an answer as it is drawn; returns its last event, and True if it has only thoughts."""
    from phi4_mlx.generation.stream import stream
    from phi4_mlx.generation.thoughts import Part, ThoughtSplitter

    begun = False

    def progress(done: int, total: int) -> None:
        if not begun:  # a prefill at a RoPE crossing comes in the middle of the answer
            show_progress(done, total)

    answer, splitter = Screen().plain_answer(), ThoughtSplitter() if thinks else None
    for event in stream(model, tokenizer, ids, cache, replace(options, prompt_progress_callback=progress)):
        begun = True
        part = Part(answer=event.text) if splitter is None else splitter.add(event.text)
        answer.think(part.thought)
        answer.add(part.answer)
    if splitter is not None:
        rest = splitter.finish()
        answer.think(rest.thought)
        answer.add(rest.answer)
    answer.finish()
    return event, answer.unanswered


def _grammar(args: argparse.Namespace) -> Grammar:
    from phi4_mlx.grammar.grammars import schema_grammar

    return schema_grammar(args.schema)


def _check_options(args: argparse.Namespace) -> None:
    if args.output is not None and args.prompts is None:
        raise RequestError("--output is the file of the answers to --prompts; name both")
    check_decoding_options(args)
    if args.schema is not None and args.stop:
        raise RequestError("--stop may end an answer before it obeys the schema; drop --stop or --schema")
    if args.ignore_chat_template and args.system_prompt is not None:
        raise RequestError("--system-prompt needs the chat format, and --ignore-chat-template leaves it out; drop one")
    fixed: dict[str, object] = {
        "ignore_chat_template": False, "system_prompt": None, "kv_bits": None, "max_kv_size": None, "image": [],
        "audio": [],
    }  # fmt: skip
    given = [f"--{name.replace('_', '-')}" for name, default in fixed.items() if getattr(args, name) != default]
    if args.prompt_cache_file is not None and given:
        raise RequestError(f"{given[0]} is fixed by the file of --prompt-cache-file; drop one of the two")


def _ids(tokenizer: Tokenizer, prompt: str, args: argparse.Namespace) -> list[int]:
    media = read_media(args, tokenizer)
    if args.ignore_chat_template:
        return tokenizer.encode_pieces([*media, prompt])
    return tokenizer.apply_chat_template(prompt_messages(prompt, args.system_prompt, media=media))


def _after_cached(path: str, prompt: str, model: LanguageModel, tokenizer: Tokenizer) -> tuple[list[int], PromptCache]:
    """(ids still to prefill, cache) of a prompt that continues the text of a cache file."""
    from phi4_mlx.generation.prompt_cache_file import load_prompt_cache

    cache, metadata = load_prompt_cache(path, model, tokenizer, return_metadata=True)
    media = [place.medium for place in cache.places]
    messages = prompt_messages(prompt, metadata.get("system_prompt"), metadata.get("text"), media)
    whole = tokenizer.apply_chat_template(messages)
    return cache.reuse(whole), cache


def _report(event: GenerationResponse, cached: int) -> None:
    before = f"{cached} cached tokens; " if cached else ""
    print(
        f"{before}prompt {amount(event.prompt_tokens, 'token')}, {event.prompt_tps:.1f} tokens/s; "
        f"answer {amount(event.generation_tokens, 'token')}, {event.generation_tps:.1f} tokens/s, "
        f"{event.finish_reason}; peak memory {size(1e9 * event.peak_memory)}",
        file=sys.stderr,
    )
