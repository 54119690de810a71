"""Ranks that are killed, frozen, absent or unplugged at random moments: how long until the job has ended on all others.

    python tests/bench/ranks.py [--times 5] [--ranks 2 4] [--launcher on off] [--failure killed ...]

Moments are drawn from the start of the processes to the time in which the job is idle. A rank that is stopped before it
has joined cannot end; it is killed here. The last line is JSON.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT, option_parser

sys.path.insert(0, str(ROOT))
from tests.rank_jobs import FAILURES, Job

LIMIT_S = 10.0
COURSE = {"LOAD_S": "0.7", "STEPS": "150", "IDLE_S": "60"}
LONGEST_MOMENT_S = 4.0


def attempt(folder: Path, size: int, launcher: bool, failure: str, chance: random.Random) -> tuple[float, str]:
    """(seconds from the failure to the end of the others, what is wrong; empty if nothing is)."""
    victim = chance.randrange(1, size) if failure == "unplugged" else chance.randrange(size)
    absent = victim if failure == "absent" else None
    others = [rank for rank in range(size) if rank != victim]
    job = Job(folder, size, launcher, absent, PROXIED=str(victim) if failure == "unplugged" else "", **COURSE)
    try:
        job.wait_for(range(size) if launcher or absent is None else iter(others), "pid")
        moment = 0.0 if failure == "absent" else chance.uniform(0, LONGEST_MOMENT_S)
        time.sleep(moment)
        joined = (folder / f"{victim}.joined").exists()
        began = time.monotonic()
        if absent is None:
            job.fail(failure, victim)
        ended = job.wait(others if failure in ("absent", "frozen") and not joined else list(range(size)), 30)
        took = max(job.ended.values(), default=began) - began
        time.sleep(0.05)
        wrong = [] if ended else ["did not end"]
        known = f"Node with rank {victim} exited" in job.launched() or any(
            f"rank {victim} (127.0.0.1)" in line for rank in others for line in job.lines(rank)
        )
        for rank in others:
            lines = job.lines(rank)
            if launcher and known and not lines and not (folder / f"{rank}.joined").exists():
                continue  # mlx.launch has ended it before it could join, as another had ended
            named = "rank" if failure == "unplugged" else f"rank {victim} (127.0.0.1)"
            if len(lines) != 1 or named not in lines[0]:
                wrong.append(f"rank {rank} said {lines}")
            if job.code(rank) == 0:
                wrong.append(f"rank {rank} exited with 0")
        return took, f"{failure} rank {victim} after {moment:.2f} s: {'; '.join(wrong)}" if wrong else ""
    finally:
        job.close()


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--launcher", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--failure", nargs="+", choices=FAILURES, default=FAILURES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    results = {}
    for size in args.ranks:
        for launcher in args.launcher:
            for failure in args.failure:
                times, late = [], 0
                for index in range(args.times):
                    with tempfile.TemporaryDirectory() as folder:
                        took, wrong = attempt(Path(folder) / str(index), size, launcher == "on", failure, chance)
                    times.append(took)
                    late += bool(wrong) or took > LIMIT_S
                    if wrong or took > LIMIT_S:
                        print(f"  {took:.2f} s {wrong}", flush=True)
                name = f"{size} ranks, {'mlx.launch' if launcher == 'on' else 'by hand'}, {failure}"
                print(f"{name}: {args.times - late} of {args.times}, at most {max(times):.1f} s", flush=True)
                results[name] = {"good": args.times - late, "of": args.times, "longest_s": round(max(times), 2)}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
