"""From process start to the first token, beside mlx-lm on the same package, in turns; and what `import phi4_mlx` adds.

    python tests/bench/startup.py [--runs 7]

The bars: at most one fifth of mlx-lm's time, and less than 30 ms for the import. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "phi4_mlx" / "demo"
OPTIONS = ["--prompt", "hi", "--max-tokens", "1"]
OURS = ["-m", "phi4_mlx", "generate", "--model", "demo", *OPTIONS]
# Not verbose: so that the first byte on standard output is the token, not a line of dashes.
THEIRS = ["-m", "mlx_lm", "generate", "--model", str(DEMO), *OPTIONS, "--verbose", "False"]


def time_to_first_byte(arguments: list[str]) -> float:
    """Seconds from the start of the process to the first byte on its standard output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout and process.stderr
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        _, errors = process.communicate()
    if process.returncode or not first:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{errors.decode()}")
    return seconds


def import_seconds(code: str) -> float:
    """Seconds from start to end of a Python process that does only this."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs

    time_to_first_byte(OURS), time_to_first_byte(THEIRS)  # from a warm disk, both
    pairs = [(time_to_first_byte(OURS), time_to_first_byte(THEIRS)) for _ in range(runs)]
    for ours, theirs in pairs:
        print(f"ours {ours:.3f} s, mlx-lm {theirs:.3f} s, ratio {ours / theirs:.3f}")
    imports = [import_seconds("import phi4_mlx") - import_seconds("pass") for _ in range(3 * runs)]

    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    added = statistics.median(imports)
    result = {
        "bench": "startup",
        "ours_s": round(statistics.median(ours for ours, _ in pairs), 3),
        "mlx_lm_s": round(statistics.median(theirs for _, theirs in pairs), 3),
        "ratio": round(ratio, 3),
        "ratio_bar": 0.2,
        "import_ms": round(1000 * added, 1),
        "import_bar_ms": 30,
        "runs": runs,
        "ok": ratio <= 0.2 and added < 0.030,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
