"""The processes that hold a model: this one alone, or all ranks of a job, of which rank 0 goes on and others follow.

A front door opens a session first, so that ranks meet before any of them waits for a person, and then loads the model.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from phi4_mlx.errors import Interruption, Phi4Error, RequestError
from phi4_mlx.ranks.launch import Launch, launched
from phi4_mlx.terminal.command import USER_MISTAKE

if TYPE_CHECKING:
    from phi4_mlx.models.model import LanguageModel
    from phi4_mlx.models.share import Parallel
    from phi4_mlx.ranks.join import Ranks
    from phi4_mlx.ranks.leader import Leader
    from phi4_mlx.tokens.tokenizer import Tokenizer

_NOT_COMPARED = frozenset((
    "model", "revision", "verify", "adapter_path", "adapters", "parallel", "prompt", "system_prompt", "image", "audio",
    "prompts", "output", "schema", "tools", "mcp", "api_key", "debug",
))  # fmt: skip

HOW = "mlx.launch -n 2 -- python -m phi4_mlx ... starts two on this machine; see 'More than one machine' in the README"


@dataclass(frozen=True)
class ModelOptions:
    """A model, as the options of a command name it.

    Attributes:
        name: a folder, a Hub id, or the name of an embedded package.
        parallel: "tensor" or "pipeline"; None to choose, or for a process on its own.
        adapter_path: a LoRA adapter for the whole model.
        adapters: name -> folder of the adapters that a request may name.
        revision, verify, chat_format: see `phi4_mlx.checkpoint.load`.
        command: from `command_options`.
    """

    name: str
    parallel: Parallel | None = None
    adapter_path: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    verify: bool = False
    chat_format: str | None = None
    command: Mapping[str, str] = field(default_factory=dict)


class Session:
    """This process alone, which loads the whole model.

    Args:
        options: the model.

    Attributes:
        over_ranks: True if the model is held by several ranks.
    """

    over_ranks = False

    def __init__(self, options: ModelOptions) -> None:
        self.options = options

    def load(self, lazy: bool = False) -> tuple[LanguageModel, Tokenizer]:
        """Loads the model, once; see `phi4_mlx.checkpoint.load`.

        Args:
            lazy: leaves the weights on the disk until they are first used; over ranks they are read at once.

        Raises:
            Phi4Error: it cannot be loaded.
        """
        from phi4_mlx.checkpoint import load

        options = self.options
        return load(
            options.name, options.adapter_path, lazy, options.revision, verify=options.verify,
            chat_format=options.chat_format,
        )  # fmt: skip

    def fail(self, line: str) -> None:
        """Ends the job on every rank with a line, if there are several."""


class RanksSession(Session):
    """All ranks of a job, as rank 0 sees them: its model tells the others what it runs.

    Args:
        options: the model.
        ranks: joined.
        folder: of the model.
        parallel: the way in which the ranks hold it.
    """

    over_ranks = True

    def __init__(self, options: ModelOptions, ranks: Ranks, folder: Path, parallel: Parallel) -> None:
        super().__init__(options)
        self.ranks = ranks
        self._folder, self._parallel = folder, parallel
        self._leader: Leader | None = None

    def load(self, lazy: bool = False) -> tuple[LanguageModel, Tokenizer]:
        """See `Session.load`; waits until every rank has its share."""
        import mlx.core as mx

        from phi4_mlx.checkpoint import check_vocabulary, load_tokenizer_and_format
        from phi4_mlx.models.shared_stream import shared_stream
        from phi4_mlx.ranks.leader import Leader, lead

        ranks, group = self.ranks, self.ranks.group
        with ranks, shared_stream():
            share = _load(self.options, self._folder, self._parallel, ranks)
            tokenizer = load_tokenizer_and_format(self._folder, self.options.chat_format, share.config.model_type)
            check_vocabulary(self._folder, tokenizer, share.config)
            self._leader = Leader(ranks, splits_head=self._parallel == "tensor")
            self._leader.burden = max(1.0, max(ranks.answers()) / _fullness(share))
            model = lead(share, self._leader, lambda hidden: mx.distributed.all_sum(hidden, group=group))
        return model, tokenizer

    def fail(self, line: str) -> NoReturn:
        """See `Session.fail`."""
        self.ranks.end(line)

    def close(self, code: int = 0) -> None:
        """Lets the other ranks finish what they were told, and leave with an exit code."""
        with self.ranks:  # names a rank that is lost meanwhile
            if self._leader is not None:
                self._leader.settle()
        self.ranks.close(code)


@contextlib.contextmanager
def open_session(options: ModelOptions, tell: Callable[[str], None] = lambda line: None) -> Iterator[Session]:
    """Opens a session. On every rank but the first it does not return: they follow until the job ends.

    Args:
        options: the model.
        tell: called on rank 0 with a line about the way in which the ranks hold the model, where none is asked for.

    Yields:
        The session of this process, or of rank 0. Its end, by a mistake or an interruption too, is that of all ranks.

    Raises:
        RequestError: `--parallel` is given to a process on its own, or the ranks cannot meet.
        SystemExit: the job of this rank has ended.
    """
    launch = launched()
    if launch is None:
        if options.parallel is not None:
            raise RequestError(f"--parallel {options.parallel} needs several ranks, and this is one process; {HOW}")
        yield Session(options)
        return
    ranks, folder, parallel = _join(launch, options, tell)
    if launch.rank:
        _follow(ranks, options, folder, parallel)
    session = RanksSession(options, ranks, folder, parallel)
    with ending(ranks, session.close):
        yield session


@contextlib.contextmanager
def ending(ranks: Ranks, close: Callable[[int], None]) -> Iterator[None]:
    """Ends the job of all ranks with a block on rank 0, by a mistake or an interruption too.

    Args:
        ranks: the job.
        close: ends it in order, with an exit code of the others.
    """
    try:
        yield
    except (Phi4Error, OSError):
        close(USER_MISTAKE)
        raise
    except (KeyboardInterrupt, Interruption, SystemExit, GeneratorExit):
        close(0)
        raise
    except Exception:
        with ranks:  # ends the job: a rank may be lost, which the watcher then names
            raise
    close(0)


def is_follower() -> bool:
    """True on every rank but the first of a job; False for a process on its own."""
    launch = launched()
    return launch is not None and launch.rank > 0


def command_options(command: str, args: argparse.Namespace) -> dict[str, str]:
    """A command and its options as texts, which must be equal on all ranks.

    Args:
        command: "generate", for example; how it is started does not matter.
        args: the parsed options. Left out are the model, whose files are compared, and what only rank 0 reads.
    """
    texts = {
        f"--{name.replace('_', '-')}": "not given" if value is None else str(value)
        for name, value in vars(args).items()
        if name not in _NOT_COMPARED
    }
    return {"the command": command, **texts}


def check_over_ranks(args: argparse.Namespace, *names: str) -> None:
    """Refuses options that do not work over ranks; only rank 0 says so.

    Args:
        args: the parsed options.
        names: of those options, as attributes.

    Raises:
        RequestError: one is given, and there are several ranks.
    """
    given = [name for name in names if getattr(args, name) not in (None, False, [])]
    if given and (launch := launched()) is not None:
        if launch.rank:
            raise SystemExit(2)
        option = f"--{given[0].replace('_', '-')}"
        raise RequestError(f"{option} does not work over ranks, each of which has a part of every cache; leave it out")


def _join(launch: Launch, options: ModelOptions, tell: Callable[[str], None]) -> tuple[Ranks, Path, Parallel]:
    """Meets the other ranks; they differ where one of them cannot read what the others can."""
    from phi4_mlx.models.safe import VARIABLE, switched_off
    from phi4_mlx.ranks.join import join
    from phi4_mlx.ranks.package import files_fingerprint

    mistakes: list[Phi4Error | OSError] = []
    prepared: list[tuple[Path, Parallel, str]] = []

    def known(what: Callable[[], str]) -> str:
        try:
            return what()
        except (Phi4Error, OSError) as error:
            mistakes.append(error)
            return f"not usable ({error})"

    def model() -> str:
        prepared.append(_prepared(launch, options))
        return files_fingerprint(prepared[0][0])

    adapters = {f"adapter {name}": path for name, path in options.adapters.items()}
    adapters |= {"--adapter-path": options.adapter_path} if options.adapter_path else {}
    about = {
        **options.command,
        "the model's fingerprint": known(model),
        "--parallel": options.parallel or "not given",
        VARIABLE: known(lambda: ",".join(switched_off()) or "not given"),
        **{name: known(partial(files_fingerprint, Path(path).expanduser())) for name, path in adapters.items()},
    }
    ranks = join(launch, about)
    if launch.rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what an interruption means
    if mistakes:
        if launch.rank:
            ranks.hear()  # all have made the same mistake: rank 0 says so
        ranks.close(USER_MISTAKE)
        raise mistakes[0]
    folder, parallel, reason = prepared[0]
    if launch.rank == 0 and options.parallel is None:
        tell(f"{launch.size} ranks over {launch.backend}, --parallel {parallel}: {reason}")
    return ranks, folder, parallel


def _prepared(launch: Launch, options: ModelOptions) -> tuple[Path, Parallel, str]:
    """(folder, way, reason for it) of a model."""
    from phi4_mlx.checkpoint import load_config
    from phi4_mlx.checkpoint_share import tensor_infos
    from phi4_mlx.files.manifest import verify_manifest
    from phi4_mlx.hub import resolve
    from phi4_mlx.models.sharding import check_share, choose_parallel

    folder = resolve(options.name, options.revision)
    if options.verify:
        verify_manifest(folder)
    config = load_config(folder)
    infos = tensor_infos(folder, config)
    if options.parallel is None:
        parallel, reason = choose_parallel(config, launch.size, launch.backend, infos)
    else:
        parallel, reason = options.parallel, ""
    check_share(config, parallel, launch.size, infos)
    return folder, parallel, reason


def _load(options: ModelOptions, folder: Path, parallel: Parallel, ranks: Ranks) -> LanguageModel:
    """This rank's share, with its parts of the adapters, all read now, so that none is refused later."""
    from phi4_mlx.adapters.layers import put_adapter
    from phi4_mlx.checkpoint_share import load_share, share_adapter
    from phi4_mlx.models.share import Share

    model = load_share(folder, Share(parallel, ranks.launch.rank, ranks.launch.size), ranks.group)
    if options.adapter_path is not None:
        put_adapter(model, share_adapter(model, Path(options.adapter_path)))
    if options.adapters:
        assert model.adapters is not None
        if taken := [name for name in options.adapters if name in model.adapters.names]:
            raise RequestError(f"adapter {taken[0]!r} has the name of one of the model's own; choose another name")
        for name, path in options.adapters.items():
            model.adapters.add(name, share_adapter(model, Path(path)))
            model.adapters.load(name)
    return model


def _fullness(model: LanguageModel) -> float:
    """The part of this rank's memory, beside the weights, that a context takes; of a length at which both kinds count.

    Both are positive: a rank whose weights alone fill its memory counts as one with a byte left.
    """
    from phi4_mlx.models.machine import memory_limit

    cost = model.context_cost()
    return max(4096 * cost.token_bytes + cost.fixed_bytes, 1) / max(memory_limit() - model.weights_bytes, 1)


def _follow(ranks: Ranks, options: ModelOptions, folder: Path, parallel: Parallel) -> NoReturn:
    """Loads this rank's share, and follows the leader until the job ends."""
    from phi4_mlx.models.shared_stream import shared_stream
    from phi4_mlx.ranks.follower import Follower, OutOfStep

    with ranks:
        with shared_stream():
            follower = Follower(_load(options, folder, parallel, ranks), ranks.group)
        ranks.answer(_fullness(follower.model))
        while True:
            command = ranks.hear()
            try:
                follower.obey(command)
            except OutOfStep as error:
                ranks.end(f"{ranks.name} is out of step: {error}")
            ranks.done(follower.counter)
