"""A job of several ranks without a model: rank 0 tells sums, the others compute them.

Its environment chooses the course: seconds of loading, operations, seconds idle after them, a folder for what each rank
writes. A rank that is named in ABSENT never joins, one in PROXIED reaches the side channel at the port in
PROXY, one in HOLDS is lost in native code, one in STOPS freezes while the backend
opens, and one in STUCK never ends its fifth operation.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

RANK = os.environ.get("MLX_RANK", "0")
FOLDER = Path(os.environ["FOLDER"])


def given(name: str) -> float:
    return float(os.environ.get(name, 0))


def prepare() -> None:
    """Gives this rank a file for its lines and says which process it is; before anything that takes time."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be inherited as ignored
    os.dup2(os.open(FOLDER / f"{RANK}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    (FOLDER / f"{RANK}.new").write_text(str(os.getpid()))
    (FOLDER / f"{RANK}.new").rename(FOLDER / f"{RANK}.pid")
    if os.environ.get("ABSENT") == RANK:
        time.sleep(120)
    if port := os.environ.get("PROXY" if os.environ.get("PROXIED") == RANK else ""):
        os.environ["PHI4_MLX_CHANNEL"] = f"127.0.0.1:{port}"


def freeze(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def work() -> None:
    import mlx.core as mx

    if os.environ.get("STOPS") == RANK:
        mx.distributed.init = freeze  # the others wait for this rank there, with the interpreter's lock

    from phi4_mlx.ranks.join import join
    from phi4_mlx.ranks.launch import launched

    launch = launched()
    if launch is None:
        print("alone")
        return

    def add(size: int) -> None:
        total = mx.distributed.all_sum(mx.ones(size))
        mx.eval(total)
        assert total[0].item() == launch.size

    with join(launch, {"the option": os.environ.get(f"OPTION_{RANK}", "same")}) as ranks:
        (FOLDER / f"{RANK}.joined").touch()
        time.sleep(given("LOAD_S"))
        if os.environ.get("HOLDS") == RANK:
            ctypes.PyDLL(None).sleep(120)  # native code that keeps the interpreter's lock, as the start of a backend
        if launch.rank == 0:
            for counter in range(1, int(given("STEPS")) + 1):
                ranks.tell({"counter": counter, "size": 3000}, counter)
                add(3000)
            time.sleep(given("IDLE_S"))
            if "ERROR" in os.environ:
                raise ValueError(os.environ["ERROR"])
            ranks.close()
            ranks.close()  # again
            print("closed")
            return
        while True:
            command = ranks.hear()
            add(command["size"])
            if command["counter"] < 5 or os.environ.get("STUCK") != RANK:
                ranks.done(command["counter"])


def main() -> None:
    prepare()
    from phi4_mlx.errors import Phi4Error

    try:
        work()
    except Phi4Error as error:
        print(f"program: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
