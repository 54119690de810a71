"""The options of `evaluate`: those of the command line, and what they stand for."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.command import Idle, Parser, number, typed, word
from phi4_mlx.terminal.limits import MAX_TOKENS_LIMIT, SEED_LIMIT, TEMPERATURE_LIMIT
from phi4_mlx.terminal.options import add_model_options

if TYPE_CHECKING:
    from phi4_mlx.evaluation.options import Options

PROG = typed("evaluate")
_count = number(int, 1, 10_000_000)
_ROW_OPTIONS = (
    "num_shots", "apply_chat_template", "temp", "top_p", "include_path", "lengths", "depths", "languages",
)  # fmt: skip
_WITH_DATA = {"tools", "arena-hard"}  # the package's own tasks that take --data
_RUN_OPTIONS = (
    "limit", "samples", "data", "include_path", "num_shots", "apply_chat_template", "max_tokens", "temp", "top_p",
    "comparator",
)  # fmt: skip
_LM_OPTIONS = ("num_shots", "apply_chat_template", "include_path")


def parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog=PROG,
        description="Score a model on tasks: lm-eval's by name, your own in YAML, or bfcl, tools, long-context and "
        "languages. Every answer is kept, so that the same command goes on after a stop. lm-eval's tasks need the "
        "extra: pip install 'lm-eval>=0.4.13'.",
    )
    add_model_options(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--tasks", nargs="+", type=word, metavar="TASK", help="tasks, apart or with commas (default: none)"
    )
    what.add_argument(
        "--suite", type=word, metavar="NAME",
        help="phi-4-mini: the table of the model's article, each row as the nearest public setting (default: none)",
    )  # fmt: skip
    what.add_argument(
        "--report", nargs=2, type=word, metavar=("A", "B"),
        help="compare two results.json (or their folders) on the documents of both, with a paired test (default: none)",
    )  # fmt: skip
    _add_documents(parser)
    _add_answers(parser)
    parser.add_argument(
        "--comparator", type=word, action="append", default=[], metavar="MODEL",
        help="another model to score in the same way, run by mlx-lm; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--judge", type=word, metavar="MODEL",
        help="a local model that judges Arena Hard's answers, in a column of its own (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", type=word, default="evaluation", metavar="FOLDER",
        help="folder for results.json, results.md, pictures and every answer",
    )  # fmt: skip
    parser.idle += [
        Idle(_RUN_OPTIONS, lambda args: args.report is not None, "with --report, which reads results"),
        Idle(_ROW_OPTIONS, lambda args: args.suite is not None, "with --suite, whose rows have their own"),
        Idle(_LM_OPTIONS, _only_own, "on the package's own tasks"),
        Idle(("data",), lambda args: _only_own(args) and not asks(args, *_WITH_DATA), "on these tasks"),
        Idle(("repeats",), lambda args: _only_own(args) and not asks(args, "languages"), "on these tasks"),
        Idle(("lengths", "depths"), lambda args: not asks(args, "long-context"), "without the task long-context"),
        Idle(("languages",), lambda args: not asks(args, "long-context", "languages"), "without those tasks"),
        Idle(("judge",), lambda args: not asks(args, "arena-hard"), "without the task arena-hard"),
        Idle(("repeats",), _is_greedy, "at a temperature of 0; --temp sets another"),
        Idle(("categories",), lambda args: not asks(args, "bfcl", "tools"), "without the task bfcl or tools"),
    ]
    return parser


def asks(args: argparse.Namespace, *tasks: str) -> bool:
    """Tells whether one of some tasks is asked for; a suite may have any."""
    return args.suite is not None or not {*tasks}.isdisjoint(names_of(args.tasks))


def _only_own(args: argparse.Namespace) -> bool:
    """True if every task is one of the package's own."""
    from phi4_mlx.evaluation.tasks import OWN

    names = set(names_of(args.tasks))
    return bool(names) and names <= OWN.keys()


def _is_greedy(args: argparse.Namespace) -> bool:
    """True if answers have the likeliest tokens; the rows of a suite have temperatures of their own."""
    return args.suite is None and not args.temp and (not _only_own(args) or asks(args, "languages"))


def _add_documents(parser: Parser) -> None:
    """The options that choose what is asked."""
    parser.add_argument(
        "--include-path",
        type=word,
        metavar="FOLDER",
        help="a folder with tasks of your own, as lm-eval's YAML (default: none)",
    )
    parser.add_argument(
        "--data", type=word, metavar="PATH",
        help="a folder with copies of data sets under their Hugging Face ids, as in PATH/allenai/ai2_arc, or the data "
        "of the package's own task (default: from Hugging Face)",
    )  # fmt: skip
    parser.add_argument("--limit", type=_count, metavar="N", help="documents a task (default: all)")
    parser.add_argument(
        "--samples", type=word, metavar="JSON",
        help='documents by task, as \'{"arc_challenge": [0, 3]}\' or a file with that (default: all)',
    )  # fmt: skip
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=_count,
        metavar="N",
        help="prompt lengths of long-context, in tokens (default: its own)",
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=number(int, 0, 100),
        metavar="N",
        help="depths of what long-context hides, in per cent of the text (default: 0 25 50 75 100)",
    )
    parser.add_argument(
        "--languages",
        nargs="+",
        type=word,
        metavar="CODE",
        help="codes of languages of long-context and languages, apart or with commas (default: all)",
    )
    parser.add_argument(
        "--categories",
        nargs="+",
        type=word,
        metavar="NAME",
        help="kinds of question of bfcl (live, non_live, or such as live_simple) and tools (default: all)",
    )


def _add_answers(parser: Parser) -> None:
    """The options that decide how it is asked and answered."""
    parser.add_argument(
        "--num-shots",
        type=number(int, 0, 1000),
        metavar="N",
        help="solved examples before each question (default: the task's)",
    )
    parser.add_argument(
        "--apply-chat-template", action=argparse.BooleanOptionalAction,
        help="ask in the model's chat format (default: where the model writes its answer, not where texts are scored)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens",
        type=number(int, 1, MAX_TOKENS_LIMIT),
        metavar="N",
        help="longest answer, in tokens (default: the task's)",
    )
    parser.add_argument(
        "--temp", type=number(float, 0, TEMPERATURE_LIMIT), metavar="N", help="temperature (default: the task's)"
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 0, 1),
        metavar="N",
        help="keep the likeliest tokens whose probabilities sum to this (default: the task's)",
    )
    parser.add_argument(
        "--repeats",
        type=number(int, 1, 10_000),
        metavar="N",
        help="answers drawn for each question, at a temperature above 0; scores are their mean (default: 1; of a "
        "suite, the row's)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, SEED_LIMIT),
        default=0,
        metavar="N",
        help="for the choice of examples and for sampling",
    )
    parser.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="let tasks run code that the model writes"
    )


def read_options(args: argparse.Namespace) -> Options:
    """The options as tasks get them.

    Raises:
        RequestError: a value cannot be read, or two exclude each other.
    """
    from phi4_mlx.evaluation.options import Options

    data = None if args.data is None else Path(os.path.expanduser(args.data)).absolute()
    if data is not None and not data.exists():
        raise RequestError(f"--data {args.data} does not exist; name a folder with copies of data sets")
    if args.limit is not None and args.samples is not None:
        raise RequestError("--limit and --samples both choose documents; drop one")
    include = None if args.include_path is None else Path(os.path.expanduser(args.include_path)).absolute()
    return Options(
        limit=args.limit,
        samples=_samples(args.samples),
        seed=args.seed,
        num_shots=args.num_shots,
        apply_chat_template=args.apply_chat_template,
        max_tokens=args.max_tokens,
        temp=args.temp,
        top_p=args.top_p,
        repeats=args.repeats,
        include_path=include,
        data=data,
        lengths=tuple(args.lengths or ()),
        depths=tuple(args.depths or ()),
        languages=tuple(names_of(args.languages)),
        categories=tuple(names_of(args.categories)),
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        judge=args.judge,
    )


def _samples(given: str | None) -> dict[str, list[int]]:
    """The documents by task, from JSON or a file with it."""
    if given is None:
        return {}
    from phi4_mlx.files.user_file import read_file

    text = (
        given if given.lstrip().startswith("{") else read_file(Path(os.path.expanduser(given))).decode(errors="replace")
    )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f'--samples is not JSON: {error}; write {{"arc_challenge": [0, 3]}}') from None
    is_ids = isinstance(value, dict) and all(
        isinstance(ids, list) and all(type(each) is int for each in ids) for ids in value.values()
    )
    if not is_ids:
        raise RequestError(f'--samples must map tasks to lists of ids, as {{"arc_challenge": [0, 3]}}, not {text:.100}')
    return {name: sorted(set(ids)) for name, ids in value.items()}


def names_of(given: Sequence[str] | None) -> list[str]:
    """The names of an option, apart or with commas, each once."""
    return list(dict.fromkeys(name for part in given or () for name in part.split(",") if name))


def settings_of(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options that results depend on, as JSON values.

    Args:
        args: the command's options.
        names: of the tasks.
    """
    kept = ("suite", "limit", "num_shots", "apply_chat_template", "max_tokens", "temp", "top_p", "repeats", "seed")
    own = {
        "tasks": list(names),
        "samples": _samples(args.samples),
        "lengths": args.lengths,
        "depths": args.depths,
        "languages": names_of(args.languages),
        "categories": names_of(args.categories),
    }
    return {name: getattr(args, name) for name in kept} | own
