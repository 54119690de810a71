"""A run over a file of prompts: options, the loop, progress, and the end."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from phi4_mlx.errors import Phi4Error, RequestError
from phi4_mlx.terminal.amount import amount, duration
from phi4_mlx.terminal.command import complain, progress_bar, typed
from phi4_mlx.terminal.options import complain_of_cuts, given_sampling, load_options, sampling_defaults

if TYPE_CHECKING:
    from phi4_mlx.commands.prompts.lines import PromptFile, PromptLine
    from phi4_mlx.commands.prompts.output import AnswerFile
    from phi4_mlx.commands.prompts.requests import RequestSettings
    from phi4_mlx.files.json_file import JsonObject
    from phi4_mlx.generation.answer_batch import Answer, AnswerRequest
    from phi4_mlx.generation.memory import ContextPlan
    from phi4_mlx.grammar.grammars import Grammar
    from phi4_mlx.models.model import LanguageModel
    from phi4_mlx.ranks.join import Ranks
    from phi4_mlx.ranks.session import Session
    from phi4_mlx.tokens.tokenizer import Tokenizer

PROG = typed("generate")
EVERY_S = 30  # between two lines of progress, where standard error is no terminal

# Options of `generate` that ask for one answer alone -> their values where they are not given.
_ONE_ANSWER: dict[str, object] = {
    "prompt": None, "image": [], "audio": [], "prompt_cache_file": None, "max_kv_size": None, "draft_model": None,
    "speculate": "auto", "verbose": False, "kv_bits": None,
}  # fmt: skip


def check_file_options(args: argparse.Namespace) -> None:
    """Checks that `--prompts` and `--output` come together, and no option that asks for one answer with them.

    Raises:
        RequestError: an option does not work here; names it.
    """
    if args.prompts is None:
        if args.output is not None:
            raise RequestError("--output is the file of the answers to --prompts; name both")
        return
    if args.output is None:
        raise RequestError("--prompts needs --output, the file of the answers")
    for name, default in _ONE_ANSWER.items():
        if getattr(args, name) != default:
            raise RequestError(f"--{name.replace('_', '-')} does not work with --prompts; drop one of the two")


def answer_file(args: argparse.Namespace, max_tokens: int) -> None:
    """Answers a file of prompts, on one machine or with the other ranks of a launch.

    Args:
        args: the options of `generate`.
        max_tokens: the longest answer, in tokens, where neither an option nor the model's authors say.

    Raises:
        Phi4Error: the prompts, the model or the files cannot be used.
    """
    from phi4_mlx.ranks.launch import launched

    if args.parallel is not None:
        from phi4_mlx.hub import DEFAULT_MODEL
        from phi4_mlx.ranks.session import ModelOptions, open_session

        with open_session(ModelOptions(args.model or DEFAULT_MODEL, args.parallel, **load_options(args))) as session:
            return _lead(args, max_tokens, None, session)
    launch = launched()
    if launch is None:
        return _lead(args, max_tokens, None)
    from phi4_mlx.ranks.join import join

    with join(launch, _shared_options(args)) as ranks:
        if launch.rank:
            _follow(args, ranks)
        _lead(args, max_tokens, ranks)
    ranks.close()


def _shared_options(args: argparse.Namespace) -> dict[str, str]:
    """The options that a follower does not learn from its leader."""
    names = ("model", "adapter_path", "revision", "chat_format", "kv_bits", "prompts")
    return {f"--{name.replace('_', '-')}": str(getattr(args, name)) for name in names}


def _lead(args: argparse.Namespace, max_tokens: int, ranks: Ranks | None, session: Session | None = None) -> None:
    from phi4_mlx.commands.prompts.lines import read_prompts

    prompts = read_prompts(Path(os.path.expanduser(args.prompts)))  # before the model is loaded
    grammar = None
    if args.schema is not None:
        from phi4_mlx.grammar.grammars import schema_grammar

        grammar = schema_grammar(args.schema)

    from phi4_mlx.commands.prompts.dealing import lead, meet
    from phi4_mlx.commands.prompts.output import AnswerFile
    from phi4_mlx.commands.prompts.requests import about, identity, requests_of
    from phi4_mlx.generation.answer_batch import AnswerBatch

    model, tokenizer, plan = _load(args, session)
    settings = _settings(args, tokenizer, grammar, max_tokens)
    known = identity(model, tokenizer)
    whole = plan if ranks is None else replace(plan, limit_bytes=meet(ranks, known, plan.limit_bytes, grammar))
    requests = requests_of(prompts, settings, tokenizer, whole)
    with AnswerFile(
        Path(os.path.expanduser(args.output)), len(requests), about(args, prompts, settings, known)
    ) as answers:
        run = PromptRun(prompts, answers)
        missing = [requests[index] for index in answers.missing()]
        with run.to_the_end():
            lead(ranks, AnswerBatch(model, tokenizer, plan), missing, run.take)


def _follow(args: argparse.Namespace, ranks: Ranks) -> NoReturn:
    from phi4_mlx.commands.prompts.dealing import follow, greet
    from phi4_mlx.commands.prompts.requests import identity
    from phi4_mlx.generation.answer_batch import AnswerBatch

    model, tokenizer, plan = _load(args)
    grammar = greet(ranks, identity(model, tokenizer), plan.limit_bytes)
    follow(ranks, AnswerBatch(model, tokenizer, plan), grammar)


def _load(args: argparse.Namespace, session: Session | None = None) -> tuple[LanguageModel, Tokenizer, ContextPlan]:
    """The whole model, or that of a session, which several ranks hold together."""
    from phi4_mlx.checkpoint import load
    from phi4_mlx.generation.memory import plan_context
    from phi4_mlx.hub import DEFAULT_MODEL

    model, tokenizer = load(args.model or DEFAULT_MODEL, **load_options(args)) if session is None else session.load()
    return model, tokenizer, plan_context(model, args.kv_bits)


def _settings(
    args: argparse.Namespace, tokenizer: Tokenizer, grammar: Grammar | None, max_tokens: int
) -> RequestSettings:
    from phi4_mlx.commands.prompts.requests import RequestSettings

    given = given_sampling(args)
    sampling = sampling_defaults(tokenizer.chat_format.name, max_tokens) | given
    complain_of_cuts(PROG, args, sampling["temp"])
    return RequestSettings(
        sampling, "max-tokens" in given, args.system_prompt, not args.ignore_chat_template, tuple(args.stop), grammar
    )


class PromptRun:
    """Takes answers as they come, and shows the progress of the run.

    Args:
        prompts: the file.
        answers: where the answers go.
    """

    def __init__(self, prompts: PromptFile, answers: AnswerFile) -> None:
        self._prompts, self._answers = prompts, answers
        self._before = answers.done
        self._cut = 0
        self._show: Callable[[float, float], None] | None = None
        self._started = self._told = time.monotonic()

    def take(self, request: AnswerRequest, answer: Answer | Exception) -> None:
        """Writes an answer.

        Raises:
            Exception: the request has failed; a Phi4Error names its line.
        """
        line = self._prompts.lines[int(request.key)]
        if isinstance(answer, Phi4Error):
            raise type(answer)(f"{self._prompts.path}:{line.number}: {answer}")
        if isinstance(answer, Exception):
            raise answer
        self._answers.put(int(request.key), _json_line(line, answer))
        self._cut += answer.finish_reason == "length"
        self._progress()

    @contextlib.contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Shows the progress; at the end, or where the run is stopped, one line says what is in the file."""
        answers = self._answers
        if 0 < self._before < answers.total:
            complain(PROG, f"{answers.path} has {self._before:,} of {amount(answers.total, 'answer')} already")
        try:
            with progress_bar("answers", of=lambda done: f"{int(done):,}") as self._show:
                self._progress()
                yield
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, Exception)):
                complain(
                    PROG,
                    f"stopped with {answers.done:,} of {amount(answers.total, 'answer')} in {answers.path}; the same "
                    "command goes on from there",
                )
            raise
        cut = f"; {self._cut:,} of this run cut by max-tokens" if self._cut else ""
        complain(PROG, f"{amount(answers.total, 'answer')} in {answers.path}{cut}")

    def _progress(self) -> None:
        done, total, now = self._answers.done, self._answers.total, time.monotonic()
        if self._show is not None:
            self._show(done, total)
        elif now - self._told >= EVERY_S and done > self._before:
            self._told = now
            left = (now - self._started) / (done - self._before) * (total - done)
            complain(PROG, f"{done:,} of {amount(total, 'answer')}, about {duration(left)} left")


def _json_line(line: PromptLine, answer: Answer) -> JsonObject:
    """The line of the file of answers."""
    return {
        "line": line.number,
        **({} if line.id is None else {"id": line.id}),
        "text": answer.content,
        **({"reasoning": answer.reasoning} if answer.reasoning else {}),
        **(
            {"tool_calls": [{"name": each.name, "arguments": each.arguments} for each in answer.calls]}
            if line.tools
            else {}
        ),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "generation_tokens": answer.tokens,
    }
