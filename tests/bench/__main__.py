"""Runs every script beside this one and writes a report of their figures.

    python tests/bench [--only NAME ...] [--output bench]

Each script runs in its own process and writes its output to NAME.log. A script that fails is reported, and the run
continues. The folder then holds RESULTS.md (a table), results.json, and plots where matplotlib is installed. The last
line is JSON. The exit code is 1 if a script gave no result; a missed bar is a result.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from harness import ROOT, environment, last_line, option_parser
from report import draw, markdown, rows

HERE = Path(__file__).resolve().parent
# Run last, in this order.
LONGEST = ("speculation", "batching", "tools", "preference", "loss", "teach", "retrieval", "calibration")
TIMEOUT_S = 3600


def scripts(folder: Path) -> list[str]:
    """The names of the scripts in a folder, the longest last."""
    names = {path.stem for path in folder.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    return sorted(names - {"__main__", *LONGEST}) + [name for name in LONGEST if name in names]


def run(script: Path, log: Path) -> tuple[dict[str, Any] | None, str]:
    """(the script's last line, "") or (None, the reason why there is none)."""
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, "-u", str(script)],
                stdout=file, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(), timeout=TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None, f"took more than {TIMEOUT_S} s"
    lines = log.read_text().splitlines()
    with log.open("a") as file:
        file.write(done.stderr)
    if done.returncode:
        return None, (done.stderr.splitlines() or [""])[-1] or f"exit code {done.returncode}"
    try:
        result = json.loads(lines[-1])
    except (IndexError, ValueError):
        result = None
    return (result, "") if isinstance(result, dict) else (None, "the last line is not a JSON object")


def about() -> dict[str, str]:
    """The machine and the versions."""
    return {
        "machine": f"{mx.device_info().get('device_name', platform.machine())}, {os.cpu_count()} cores, "
        f"{platform.system()}, {mx.default_device()}",
        "versions": f"mlx {mx.__version__}, mlx-lm {version('mlx-lm')}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def run_all(names: list[str], output: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(script -> its last line, script -> why it has none); prints a line for each."""
    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name} ...", end=" ", flush=True)
        start = time.perf_counter()
        result, why = run(HERE / f"{name}.py", output / f"{name}.log")
        if result is None:
            failed[name], outcome = why, f"FAILED: {why}"
        else:
            results[name] = result
            missed = [row for row in rows({name: result}) if row.ok is False]
            outcome = "; ".join(f"{row.figure.name}: {row.value:.4g}" for row in missed)
        print(f"{time.perf_counter() - start:.0f} s{': ' + outcome if outcome else ''}", flush=True)
    return results, failed


def main() -> int:
    """Prints a line for each script, then JSON."""
    parser = option_parser(__doc__)
    names = scripts(HERE)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--output", type=Path, default=ROOT / "bench", metavar="FOLDER", help="default: bench/")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in names if name in options.only]
    start = time.perf_counter()
    results, failed = run_all(chosen, options.output)

    plots = draw(results, options.output)
    (options.output / "results.json").write_text(json.dumps(results | {"failed": failed}, indent=2) + "\n")
    (options.output / "RESULTS.md").write_text(markdown(results, failed, about(), plots), encoding="utf-8")
    missed = [row for row in rows(results) if row.ok is False]
    print(f"{options.output / 'RESULTS.md'}, {len(plots)} plots")
    last_line(
        "all",
        scripts=len(chosen),
        failed=sorted(failed),
        missed={f"{row.figure.bench}: {row.figure.name}": row.value for row in missed},
        minutes=round((time.perf_counter() - start) / 60, 1),
        ok=not failed and not missed,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
