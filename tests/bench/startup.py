"""Time from process start to the first token, beside mlx-lm on the same package; and time of `import phi4_mlx`.

    python tests/bench/startup.py [--runs 7]

Paired runs. Bars: at most 0.2 of mlx-lm's time; under 30 ms for the import. The last line is JSON.
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from statistics import median

from harness import ROOT, alternate, environment, last_line, median_ratio, option_parser, seconds

DEMO = ROOT / "phi4_mlx" / "demo"
OPTIONS = ["--prompt", "hi", "--max-tokens", "1"]
OURS = ["-m", "phi4_mlx", "generate", "--model", "demo", *OPTIONS]
# Not verbose, so that the first byte on standard output is the token and not a line of dashes.
THEIRS = ["-m", "mlx_lm", "generate", "--model", str(DEMO), *OPTIONS, "--verbose", "False"]


def time_to_first_byte(arguments: list[str]) -> float:
    """Seconds from the start of the process to the first byte on its standard output."""
    variables = environment(PYTHONUNBUFFERED="1")
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables
    ) as process:
        assert process.stdout and process.stderr
        first = process.stdout.read(1)
        took = time.perf_counter() - start
        _, errors = process.communicate()
    if process.returncode or not first:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{errors.decode()}")
    return took


def process_seconds(code: str) -> float:
    """Seconds from start to end of a Python process that runs `code`."""
    return seconds(subprocess.run, [sys.executable, "-c", code], check=True, env=environment())


def main() -> None:
    """Prints a line for each pair, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs

    time_to_first_byte(OURS), time_to_first_byte(THEIRS)  # fill the disk cache
    ours, theirs = alternate(partial(time_to_first_byte, OURS), partial(time_to_first_byte, THEIRS), runs)
    for mine, other in zip(ours, theirs, strict=True):
        print(f"ours {mine:.3f} s, mlx-lm {other:.3f} s, ratio {mine / other:.3f}")
    added = median(process_seconds("import phi4_mlx") - process_seconds("pass") for _ in range(3 * runs))
    ratio = median_ratio(ours, theirs)
    last_line(
        "startup",
        ours_s=round(median(ours), 3),
        mlx_lm_s=round(median(theirs), 3),
        ratio=round(ratio, 3),
        ratio_bar=0.2,
        import_ms=round(1000 * added, 1),
        import_bar_ms=30,
        runs=runs,
        ok=ratio <= 0.2 and added < 0.030,
    )


if __name__ == "__main__":
    main()
