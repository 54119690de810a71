"""All the figures: runs every script beside this one, and writes a report of what they came to.

    python tests/bench [--only NAME ...] [--output bench]

Each script is a process of its own, its output in NAME.log; one that fails is shown, and the others go on. The folder
then holds RESULTS.md (a table), results.json, and plots where matplotlib is installed. The last line is JSON. The exit
code is 1 if a script came to no result; a missed bar is a result.
"""

from __future__ import annotations

import argparse
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
from report import draw, markdown, rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LAST = ("speculation", "batching", "load", "tools", "preference", "loss", "teach", "retrieval")  # those that take long
TIMEOUT_S = 3600


def scripts(folder: Path) -> list[str]:
    """The names of what can be run there, the long ones last."""
    names = [path.stem for path in folder.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()]
    return sorted(set(names) - {"__main__"}, key=lambda name: (LAST.index(name) if name in LAST else -1, name))


def run(script: Path, log: Path) -> tuple[dict[str, Any] | None, str]:
    """(what the script printed last, or None; why there is nothing)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, "-u", str(script)],
                stdout=file, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, timeout=TIMEOUT_S,
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


def main() -> int:
    """Prints a line a script, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = scripts(HERE)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--output", type=Path, default=ROOT / "bench", metavar="FOLDER")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in names if name in options.only]
    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    begin = time.perf_counter()
    for number, name in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {name} ...", end=" ", flush=True)
        start = time.perf_counter()
        result, why = run(HERE / f"{name}.py", options.output / f"{name}.log")
        if result is None:
            failed[name] = why
        else:
            results[name] = result
        missed = [row for row in rows({name: result or {}}) if row.ok is False]
        told = f"FAILED: {why}" if why else "; ".join(f"{row.figure.what}: {row.value:.4g}" for row in missed)
        print(f"{time.perf_counter() - start:.0f} s{': ' + told if told else ''}", flush=True)

    plots = draw(results, options.output)
    (options.output / "results.json").write_text(json.dumps(results | {"failed": failed}, indent=2) + "\n")
    (options.output / "RESULTS.md").write_text(markdown(results, failed, about(), plots), encoding="utf-8")
    missed = [row for row in rows(results) if row.ok is False]
    print(f"{options.output / 'RESULTS.md'}, {len(plots)} plots")
    summary = {
        "bench": "all",
        "scripts": len(chosen),
        "failed": sorted(failed),
        "missed": {f"{row.figure.bench}: {row.figure.what}": row.value for row in missed},
        "minutes": round((time.perf_counter() - begin) / 60, 1),
        "ok": not failed and not missed,
    }
    print(json.dumps(summary))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
