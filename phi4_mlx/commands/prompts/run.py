"""A run over a file of prompts: options, the loop, progress, and the end."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
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
    from phi4_mlx.grammar.grammars import Grammar
    from phi4_mlx.ranks.join import Ranks
    from phi4_mlx.ranks.launch import Launch
    from phi4_mlx.ranks.session import Session
    from phi4_mlx.tokens.tokenizer import Tokenizer

PROG = typed("generate")
EVERY_S = 30  # between two lines of progress, where standard error is no terminal

# Options of `generate` that ask for one answer alone -> their values where they are not given.
_ONE_ANSWER: dict[str, object] = {
    "prompt": None, "image": [], "audio": [], "prompt_cache_file": None, "max_kv_size": None, "draft_model": None,
    "speculate": "auto", "verbose": False,
}  # fmt: skip


def answer_file(args: argparse.Namespace, max_tokens: int) -> None:
    """Answers a file of prompts, on one machine or over ranks; each has the whole model, with `--parallel` a share.

    Args:
        args: the options of `generate`.
        max_tokens: the longest answer, in tokens, where neither an option nor the model's authors say.

    Raises:
        Phi4Error: the prompts, the model or the files cannot be used.
    """
    from phi4_mlx.commands.prompts.lines import read_prompts
    from phi4_mlx.hub import DEFAULT_MODEL, resolve
    from phi4_mlx.ranks.launch import launched
    from phi4_mlx.ranks.session import ModelOptions, Session, command_options, open_session

    _check_options(args)
    launch = launched()
    path = Path(os.path.expanduser(args.prompts))
    # A mistake in the file costs no wait for the model; ranks meet first, as a long file would keep the others waiting.
    prompts = read_prompts(path) if launch is None else None

    def answer(session: Session, ranks: Ranks | None) -> None:
        _lead(args, max_tokens, prompts or read_prompts(path), known, session, ranks)

    folder = resolve(args.model or DEFAULT_MODEL, args.revision)
    known = _identity(args, folder)
    name, command = args.model or DEFAULT_MODEL, command_options("generate", args)
    options = ModelOptions(name, args.parallel, **load_options(args), command=command)
    if launch is None or args.parallel is not None:
        with open_session(options, partial(complain, PROG)) as session:
            return answer(session, None)
    with _joined(launch, args, known) as ranks:
        (partial(_follow, args.kv_bits) if launch.rank else answer)(Session(options), ranks)


def _check_options(args: argparse.Namespace) -> None:
    """Refuses options that ask for one answer, and an output that is the file of prompts."""
    if args.output is None:
        raise RequestError("--prompts needs --output, the file of the answers")
    for name, default in _ONE_ANSWER.items():
        if getattr(args, name) != default:
            raise RequestError(f"--{name.replace('_', '-')} does not work with --prompts; drop one of the two")
    for path in (args.output, f"{args.output}.run"):
        if _is_same_file(path, args.prompts):
            raise RequestError(f"--output {args.output} would be written over the prompts; name another file")


def _is_same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(os.path.expanduser(one), os.path.expanduser(other))
    except (OSError, ValueError):  # one of them is not there
        return False


def _identity(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """The fingerprints of the model and its adapter."""
    from phi4_mlx.ranks.package import files_fingerprint

    known = {"--model": files_fingerprint(folder), "--adapter-path": "none"}
    if args.adapter_path is not None:
        try:
            known["--adapter-path"] = files_fingerprint(Path(os.path.expanduser(args.adapter_path)))
        except (Phi4Error, OSError):  # loading it says what is wrong
            known["--adapter-path"] = "unreadable"
    return known


@contextlib.contextmanager
def _joined(launch: Launch, args: argparse.Namespace, known: Mapping[str, str]) -> Iterator[Ranks]:
    """All ranks of a job, each with the whole model; its end, by a mistake or an interruption too, is that of all."""
    from phi4_mlx.ranks.join import join
    from phi4_mlx.ranks.session import command_options, ending

    ranks = join(launch, {**command_options("generate", args), **known, "--parallel": args.parallel or "not given"})
    if launch.rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what an interruption means
    with ranks if launch.rank else ending(ranks, ranks.close):
        yield ranks


def _lead(
    args: argparse.Namespace,
    max_tokens: int,
    prompts: PromptFile,
    known: Mapping[str, str],
    session: Session,
    ranks: Ranks | None,
) -> None:
    grammar = None
    if args.schema is not None:
        from phi4_mlx.grammar.grammars import schema_grammar

        grammar = schema_grammar(args.schema)

    from phi4_mlx.commands.prompts.dealing import lead, meet
    from phi4_mlx.commands.prompts.output import AnswerFile
    from phi4_mlx.commands.prompts.requests import about, requests_of
    from phi4_mlx.generation.answer_batch import AnswerBatch
    from phi4_mlx.generation.memory import plan_context
    from phi4_mlx.generation.stream import wired_memory

    model, tokenizer = session.load()
    settings = _settings(args, tokenizer, grammar, max_tokens)
    plan = plan_context(model, args.kv_bits)
    smallest = plan if ranks is None else replace(plan, limit_bytes=meet(ranks, plan.limit_bytes, grammar))
    requests = requests_of(prompts, settings, tokenizer, smallest)
    depends = about(args, prompts, settings, known, tokenizer.chat_format.name)
    with AnswerFile(Path(os.path.expanduser(args.output)), len(requests), depends) as answers:
        run = PromptRun(prompts, answers)
        missing = [requests[index] for index in answers.missing()]
        with run.to_the_end(), wired_memory():
            lead(ranks, AnswerBatch(model, tokenizer, plan, args.kv_bits), missing, run.take)


def _follow(kv_bits: int | None, session: Session, ranks: Ranks) -> NoReturn:
    from phi4_mlx.commands.prompts.dealing import follow, greet
    from phi4_mlx.generation.answer_batch import AnswerBatch
    from phi4_mlx.generation.memory import plan_context
    from phi4_mlx.generation.stream import wired_memory

    model, tokenizer = session.load()
    plan = plan_context(model, kv_bits)
    grammar = greet(ranks, plan.limit_bytes)
    with wired_memory():
        follow(ranks, AnswerBatch(model, tokenizer, plan, kv_bits), grammar)


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
            complain(
                PROG, f"{self._before:,} of {amount(answers.total, 'answer')} are there already, in {answers.path}"
            )
        try:
            with progress_bar("answers", of=lambda done: f"{int(done):,}") as self._show:
                self._progress()
                yield
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, Exception)):
                complain(
                    PROG,
                    f"stopped; {answers.done:,} of {amount(answers.total, 'answer')} are kept in {answers.path} and "
                    f"{answers.path.name}.run, and the same command goes on from there",
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
