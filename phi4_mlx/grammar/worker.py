"""A process that makes grammars for another: an order on each line of its input, a result on each line of its output.

A hostile grammar takes any time and memory to compile, or crashes llguidance. Here it costs one order: the process's
own timer and limit of memory end it.

    python -m phi4_mlx.grammar.worker
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from pathlib import Path

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.grammar.apart import MAX_GROWTH_BYTES, MAX_ORDER_S, Refused
from phi4_mlx.grammar.order import Order

_RENEW_BYTES = 2**27  # a process that has grown by so much makes room for a new one


def main() -> None:
    """Makes grammars until the input ends."""
    os.nice(5)  # the server's own work comes first
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads the answers
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    Order(("json_schema", {"pattern": "a"})).make()  # loads the library
    usual = _peak_bytes()
    _limit_memory()
    _write({"ready": True})
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, MAX_ORDER_S)
        result = _result(line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        last = _peak_bytes() - usual > _RENEW_BYTES
        _write({**result, "last": last})
        if last:
            return


def _result(line: bytes) -> JsonObject:
    order = Order.read(line)
    try:
        grammar = order.make()
    except Refused as error:
        return {"error": str(error), "field": error.field}
    except MemoryError:
        os._exit(1)  # too little is left for an answer
    return {"text": grammar.text, "loosened": grammar.loosened}


def _write(value: JsonObject) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _limit_memory() -> None:
    """Limits the address space to what is in use now and `MAX_GROWTH_BYTES` more."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MAX_GROWTH_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
