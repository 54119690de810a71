"""The ranks of one job: joined, spoken to, and ended together."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Mapping
from types import TracebackType
from typing import NoReturn

import mlx.core as mx

from phi4_mlx.errors import RequestError, message_of
from phi4_mlx.ranks.channel import JSON, Channel
from phi4_mlx.ranks.launch import Launch
from phi4_mlx.ranks.meeting import Met, follow, lead, let_go, wait_to_go
from phi4_mlx.ranks.watching import Watching
from phi4_mlx.terminal.version import __version__

MLX = (0, 32, 4)
"""The least version of mlx for ranks: in earlier ones a collective hangs when a peer has died (mlx #4060, #3742)."""

_CLOSING_S = 60.0  # for what the followers still run
_LEAVING_S = 5.0  # for the leader's last line


def join(launch: Launch, about: Mapping[str, str]) -> Ranks:
    """Meets the other ranks, starts the watcher, and opens the backend.

    Args:
        launch: of this process.
        about: what must be equal on all ranks, by name, such as the package's fingerprint; the versions of phi4_mlx
            and mlx are added.

    Raises:
        RequestError: mlx is too old or lacks the backend; a rank does not come, differs, or cannot be reached.
    """
    _check_mlx(launch.backend)
    everything = {"the version of phi4_mlx": __version__, "the version of mlx": mx.__version__, **about}
    met = (lead if launch.rank == 0 else follow)(launch, everything)
    watching = Watching(launch.rank, met)
    try:
        let_go(met) if launch.rank == 0 else wait_to_go(met)
    except BaseException:
        watching.close()
        raise
    ranks = Ranks(launch, met, watching)
    with ranks:
        ranks.open_backend()
    return ranks


def _check_mlx(backend: str) -> None:
    version = tuple(int(part) for part in mx.__version__.split(".")[:3] if part.isdigit())
    if version < MLX:
        raise RequestError(
            f"mlx {mx.__version__} hangs when a rank ends; several ranks need mlx {'.'.join(map(str, MLX))} or newer: "
            "pip install -U mlx"
        )
    if not mx.distributed.is_available(backend):
        raise RequestError(f"mlx {mx.__version__} here has no backend {backend}; start with mlx.launch --backend ring")


class Ranks:
    """All ranks of a job, as one of them sees them. As a context, it ends the job on all ranks after an error.

    Attributes:
        launch: of this rank.
        group: of `mx.distributed`.
        names: rank -> its name in messages; a follower knows its own and the leader's.
    """

    group: mx.distributed.Group

    def __init__(self, launch: Launch, met: Met, watching: Watching):
        self.launch = launch
        self.names = met.names
        self._met = met
        self._watching = watching
        self._closed = False

    @property
    def name(self) -> str:
        """The name of this rank in messages."""
        return self.names[self.launch.rank]

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.launch.size

    def open_backend(self) -> None:
        """Initialises `mx.distributed`."""
        backend = self.launch.backend
        with self._watching.opening():
            try:
                self.group = mx.distributed.init(strict=True, backend=backend)
            except RuntimeError as error:
                advice = "if another job uses its ports, choose others, with mlx.launch by --starting-port"
                raise RuntimeError(f"the backend {backend} does not open: {message_of(error)}; {advice}") from None
        if (self.group.rank(), self.group.size()) != (self.launch.rank, self.launch.size):
            raise RequestError(
                f"the backend {backend} counts {self.name} as rank {self.group.rank()} of "
                f"{self.group.size()}, not of {self.launch.size}"
            )

    def tell(
        self,
        command: Mapping[str, JSON],
        counter: int | None = None,
        tokens: int = 1,
        *,
        new: bool = False,
        rank: int | None = None,
    ) -> None:
        """Sends a command to all followers; of the leader.

        Args:
            command: plain values.
            counter: of an operation whose end each follower reports by `done`; the watcher ends the job if a follower
                takes far longer than for any operation before. None for a command without such a report.
            tokens: how many tokens the operation runs, the measure of its length.
            new: kernels may have to be compiled for the operation, so that no earlier one says how long it takes.
            rank: the only follower that it is for; None for all.
        """
        if counter is not None:
            self._watching.told(counter, tokens, new)
        for follower, channel in self._met.commands.items():
            if rank in (None, follower):
                self._send(channel, {"command": dict(command)})

    def hear(self) -> dict[str, JSON]:
        """Waits for the leader's next command; of a follower.

        Raises:
            SystemExit: with the code of the leader's `close`.
        """
        said = self._receive(self._met.commands[0])
        if "close" in said:
            self._send(self._met.commands[0], {"closed": True})
            self._watching.close()
            if said["close"]:  # mlx.launch kills the leader when a rank has failed: first it says what is wrong
                with contextlib.suppress(OSError, ValueError):
                    self._met.commands[0].receive(_LEAVING_S)
            self._met.close()
            raise SystemExit(said["close"])
        command: dict[str, JSON] = said["command"]
        return command

    def done(self, counter: int) -> None:
        """Reports that an operation's arrays have been evaluated on this rank; of a follower.

        Args:
            counter: of the operation, as the leader told it; those before it are done as well.
        """
        self._watching.done(counter)

    def answer(self, value: JSON) -> None:
        """Sends a value to the leader, which awaits it by `answers`; of a follower."""
        self._send(self._met.commands[0], {"answer": value})

    def answers(self) -> list[JSON]:
        """Waits for one `answer` of each follower; of the leader.

        Returns:
            The values, in the order of ranks from 1.
        """
        return [self.answer_of(rank) for rank in self._met.commands]

    def answer_of(self, rank: int) -> JSON:
        """Waits for the next `answer` of one follower; of the leader."""
        return self._receive(self._met.commands[rank])["answer"]

    def ready(self, timeout_s: float | None = 0) -> list[int]:
        """Waits for the ranks whose next message can be read at once: followers, or the leader of a follower.

        Args:
            timeout_s: the most seconds to wait; None for no limit.
        """
        ranks = {channel.detach(): rank for rank, channel in self._met.commands.items()}
        return [ranks[each] for each in select.select([*ranks], [], [], timeout_s)[0]]

    def end(self, line: str) -> NoReturn:
        """Ends the job on all ranks, each with this line on standard error and an exit code that is not 0.

        Args:
            line: the reason.
        """
        self._watching.end(line)

    def close(self, code: int = 0) -> None:
        """Ends the job in order; of the leader. The followers exit at their next `hear`.

        Args:
            code: their exit code. If it is not 0, they wait until this process has ended, for some seconds.
        """
        if self._closed:
            return
        self._closed = True
        for channel in self._met.commands.values():
            self._send(channel, {"close": code})
        for channel in self._met.commands.values():
            while "closed" not in self._receive(channel, _CLOSING_S):
                pass  # an answer that nobody awaits
        self._watching.close()
        if not code:
            self._met.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Ends the job after an error, with a line that names this rank."""
        if error is None or isinstance(error, SystemExit):
            return
        if isinstance(error, KeyboardInterrupt):
            self.end(f"{self.name} was interrupted")
        if isinstance(error, RuntimeError):  # mlx's, of a collective that has lost a peer
            self._watching.wait_for_cause()
        self.end(f"{self.name}: {message_of(error) or type(error).__name__}")

    def _send(self, channel: Channel, value: JSON) -> None:
        try:
            channel.send(value)
        except OSError as error:
            self._lost(error)

    def _receive(self, channel: Channel, timeout_s: float | None = None) -> dict[str, JSON]:
        try:
            said: dict[str, JSON] = channel.receive(timeout_s)
            return said
        except (OSError, ValueError) as error:
            self._lost(error)

    def _lost(self, error: Exception) -> NoReturn:
        """Leaves it to the watcher to name the rank that is gone, for some time."""
        self._watching.wait_for_cause()
        self.end(f"{self.name} has lost the side channel: {message_of(error)}")
