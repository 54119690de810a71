"""`python -m phi4_mlx models`: lists the models in the Hugging Face cache, downloads one, or removes one."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from phi4_mlx.errors import Phi4Error, RequestError
from phi4_mlx.files.embedded import EMBEDDED
from phi4_mlx.terminal.advice import command_line
from phi4_mlx.terminal.amount import amount, size
from phi4_mlx.terminal.command import Parser, complain, run, typed, word
from phi4_mlx.terminal.printable import one_line

if TYPE_CHECKING:
    from phi4_mlx.hub import CachedModel

_RIGHT_ALIGNED = ("size", "context")
_REASON_CHARS = 100


class Listed(NamedTuple):
    """A model of the list.

    Attributes:
        model: its revision.
        context: its longest context in tokens, if config.json says it.
        why_not: the reason why it cannot be loaded; "" if it can.
        reads_media: True if it reads pictures and sound.
    """

    model: CachedModel
    context: int | None
    why_not: str
    reads_media: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _models, argv)


def _parser() -> Parser:
    parser = Parser(typed("models"), "List the models at hand, embedded or in the Hugging Face cache; pull or rm one.")
    parser.add_argument("--json", action="store_true", help="print the list as one line of JSON")
    commands = parser.add_subparsers(dest="action", title="commands", metavar="COMMAND")
    also = commands.add_parser("list", help="list the models, as without a command", description="List the models.")
    also.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print one line of JSON (default: off)"
    )
    pull = commands.add_parser("pull", help="download a model", description="Download a model to the cache.")
    pull.add_argument("id", type=word, metavar="ID", help="its Hugging Face id, like owner/name")
    pull.add_argument(
        "--revision", type=word, help="branch, tag or commit (default: main; of the default model, a pinned commit)"
    )
    remove = commands.add_parser("rm", help="remove a model", description="Remove a model from the cache.")
    remove.add_argument("id", type=word, metavar="ID", help="its Hugging Face id, as listed")
    remove.add_argument("--yes", action="store_true", help="remove it without a question")
    return parser


def _models(args: argparse.Namespace) -> None:
    if args.action not in (None, "list") and args.json:
        raise RequestError(f"--json prints the list, and {args.action} prints none; drop one of the two")
    {None: _list, "list": _list, "pull": _pull, "rm": _remove}[args.action](args)


def _list(args: argparse.Namespace) -> None:
    from phi4_mlx.hub import DEFAULT_MODEL, cache_folder

    listed = listed_models()
    if args.json:
        print(json.dumps({"cache": str(cache_folder()), "models": [_as_json(each) for each in listed]}))
        return
    print(f"{table(listed)}\n")
    cached = listed[len(EMBEDDED) :]
    if cached:
        total = size(sum({each.model.name: each.model.total_bytes for each in cached}.values()))
        print(f"{amount(len(cached), 'revision')} in {cache_folder()}: {total}")
    else:
        pull = command_line("models", "pull", DEFAULT_MODEL)
        print(f"{cache_folder()} holds no model; `{pull}` downloads the default one, --model demo needs no download")


def _pull(args: argparse.Namespace) -> None:
    from phi4_mlx.checkpoint import load_config
    from phi4_mlx.files.safetensors import weight_files
    from phi4_mlx.hub import download

    if args.id in EMBEDDED:
        raise RequestError(f"{args.id} is a part of this package; it needs no download")
    try:
        load_config(download(args.id, args.revision, ("config.json",)))  # before gigabytes of weights
        folder = download(args.id, args.revision)
        weight_files(folder)  # without a network, the cache may hold a part
    except KeyboardInterrupt:
        complain(typed("models pull"), "stopped; complete files are kept, and the same command downloads the others")
        raise
    total = size(_nbytes(folder))
    chat = command_line("chat", model=args.id, revision=args.revision)
    print(f"{args.id}: {total} in {folder}; chat with it: {chat}")


def _remove(args: argparse.Namespace) -> None:
    from phi4_mlx.hub import cached_models, remove_cached
    from phi4_mlx.terminal.screen import Screen

    if args.id in EMBEDDED:
        raise RequestError(f"{args.id} is a part of this package, not of the cache, and stays")
    found = [each for each in cached_models() if each.name == args.id]
    if found and not args.yes:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise RequestError("no person is at a terminal to confirm; --yes removes without a question")
        what = f"{args.id}, {amount(len(found), 'revision')}, {size(found[0].total_bytes)}"
        answer = Screen().ask(f"remove {what}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return
    freed = remove_cached(args.id)
    print(f"{args.id}: removed, {size(freed)} freed")


def listed_models() -> list[Listed]:
    """The embedded models, and those in the cache."""
    from phi4_mlx.hub import CachedModel, cached_models

    embedded = []
    for name, folder in EMBEDDED.items():
        nbytes = _nbytes(folder)
        embedded.append(CachedModel(name, "", (), folder, nbytes, nbytes, 0, False))
    found = []
    for model in (*embedded, *cached_models()):
        with _access_times_kept(model.folder):
            why, reads_media = _try_to_load(model.folder)
            if why and model.interrupted:
                why = f"incomplete: `{command_line('models', 'pull', model.name)}` downloads the rest"
            elif why and not model.revision:
                why = f"damaged: `{command_line('models', 'rm', model.name)}` removes it"
            found.append(Listed(model, _context(model.folder), why, reads_media))
    return found


def _nbytes(folder: Path) -> int:
    """Bytes of the files of a model; adapters of its own are in folders in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _try_to_load(folder: Path) -> tuple[str, bool]:
    """(the reason why a model cannot be loaded or "", True if it reads media); reads no weights."""
    from phi4_mlx.checkpoint import load

    try:
        return "", load(folder, lazy=True)[1].media is not None
    except Phi4Error as error:
        reason = str(error).replace(f"{folder}/", "").replace(f"{folder} ", "").removeprefix("config.json: ")
        return reason.partition("; ")[0], False
    except OSError as error:
        return f"cannot be read: {error.strerror}", False


def _context(folder: Path) -> int | None:
    """The context of a model, in tokens; for an unsupported kind, the number in its config.json, or None."""
    from phi4_mlx.checkpoint import load_config
    from phi4_mlx.files.json_file import read_json

    with contextlib.suppress(Phi4Error):
        return load_config(folder).max_position_embeddings
    with contextlib.suppress(Phi4Error):
        found = read_json(folder / "config.json").get("max_position_embeddings")
        return found if type(found) is int else None
    return None


@contextlib.contextmanager
def _access_times_kept(folder: Path) -> Iterator[None]:
    """Restores the times at which the files of a folder were last read: to list a model is not to use it."""
    before = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    try:
        yield
    finally:
        for path, times in before.items():
            with contextlib.suppress(OSError):  # the file of another user
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _as_json(listed: Listed) -> dict[str, object]:
    model = listed.model
    used = datetime.fromtimestamp(model.last_used, timezone.utc).isoformat(timespec="seconds")
    return {
        "id": model.name,
        "revision": model.revision or None,
        "refs": [*model.refs],
        "path": str(model.folder),
        "bytes": model.nbytes,
        "context": listed.context,
        "last_used": used if model.last_used else None,
        "loads": not listed.why_not,
        "why_not": listed.why_not or None,
        "reads_media": listed.reads_media,
    }


def table(models: Sequence[Listed]) -> str:
    """The models as a table for people."""
    lines: list[tuple[str, ...]] = [("id", "size", "revision", "context", "last used", "loads")]
    for model, context, why, reads_media in models:
        refs = " ".join([model.revision[:8] or ("embedded" if model.name in EMBEDDED else "none"), *model.refs])
        used = datetime.fromtimestamp(model.last_used).strftime("%Y-%m-%d") if model.last_used else ""
        loads = f"no: {why}" if why else "yes; reads pictures and sound" if reads_media else "yes"
        if len(loads) > _REASON_CHARS:
            loads = f"{loads[:_REASON_CHARS]} ..."
        lines.append((model.name, size(model.nbytes), refs, "" if context is None else f"{context:,}", used, loads))
    lines = [tuple(map(one_line, line)) for line in lines]
    columns = []
    for column in zip(*lines, strict=True):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if column[0] in _RIGHT_ALIGNED else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
