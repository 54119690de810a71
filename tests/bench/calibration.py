"""The cost of 4 bits with and without calibration: KL of packages to the checkpoint they are made of, on held-out text.

    python tests/bench/calibration.py [--folder bench/calibration] [--seeds 1 2 3] [--checkpoint FOLDER ...]

Demo checkpoints are trained without rounding (3 M tokens, ten minutes each on two cores), unless the folder has them;
`--checkpoint` takes others. Each becomes packages of 4 bits in groups of 64: plain; calibrated, 4 bits throughout;
calibrated, bits chosen within the bytes of plain. KL(checkpoint || package) is measured over the weights in the written
files, which are dequantised first because a CPU multiplies packed ones slowly, and its ratio to plain's gets an
interval by bootstrap over samples. mlx-lm loads the same packages: its logits under the long RoPE table, the only one
that it has, must be ours. Bars, for the median of the checkpoints: 0.35 of plain's KL at 4 bits throughout, 0.25 with
chosen bits, at no more bytes of tensors. The last line is JSON.

On Linux, set `OPENBLAS_NUM_THREADS=1 LD_PRELOAD=libopenblas.so.0`, which is several times faster.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from harness import ROOT, last_line, option_parser, timed
from unrounded_demo import train, write_data

from phi4_mlx import load
from phi4_mlx.convert import __main__ as converter
from phi4_mlx.evaluation.compare import Comparison, compare

TOKENS = 3_000_000
CALIBRATION, HELD_OUT = (9001, 50_000), (9003, 25_000)  # (seed, tokens)
RECIPES: dict[str, list[str]] = {
    "plain": [],
    "4 bits": ["--q-calibration", "CALIBRATION", "--q-bits", "4"],
    "chosen": ["--q-calibration", "CALIBRATION", "--q-bpw", "4.5"],
}
BARS = {"4 bits": 0.35, "chosen": 0.25}
LONG = 300  # ids past the demo's RoPE boundary


def write(source: Path, target: Path, *options: str) -> Path:
    """Runs the converter, anew."""
    shutil.rmtree(target, ignore_errors=True)
    if converter.main(["--hf-path", str(source), "--mlx-path", str(target), *options]):
        raise SystemExit(f"{target}: not written")
    return target


def ratio(found: Comparison, plain: Comparison) -> tuple[float, float, float]:
    """The ratio of two divergences from one checkpoint, with the 95 % interval of a paired bootstrap over samples."""
    ours, theirs = np.array(found.a.sample_kl), np.array(plain.a.sample_kl)
    draws = np.random.default_rng(0).multinomial(len(ours), [1 / len(ours)] * len(ours), 2000)
    low, high = np.percentile(draws @ ours / (draws @ theirs), [2.5, 97.5])
    return float(ours.sum() / theirs.sum()), float(low), float(high)


def mlx_lm_difference(package: Path) -> float | None:
    """The largest difference between our logits and mlx-lm's; None if it does not know the kind of model."""
    from mlx_lm.utils import load_model

    ours = load(package)[0]
    try:
        theirs = load_model(package)[0]
    except ValueError:
        return None
    ids = mx.random.randint(0, ours.config.vocab_size, (1, LONG), key=mx.random.key(0))
    return float(mx.abs(ours(ids) - theirs(ids)).max().item())


def packages(checkpoint: Path, folder: Path, calibration: Path, held_out: Path) -> dict[str, dict[str, Any]]:
    """The figures of each recipe."""
    found: dict[str, dict[str, Any]] = {}
    plain: Comparison | None = None
    for name, options in RECIPES.items():
        target = folder / f"{checkpoint.name}-{name.replace(' ', '-')}"
        arguments = [str(calibration) if each == "CALIBRATION" else each for each in options]
        _, seconds = timed(write, checkpoint, target, "-q", *arguments)
        dense = write(target, target.with_name(target.name + "-dense"), "-d")
        comparison = compare(checkpoint, dense, held_out)
        shutil.rmtree(dense)
        plain = plain or comparison
        times, low, high = ratio(comparison, plain)
        kl = comparison.a.kl
        found[name] = {
            "bytes": load(target, lazy=True)[0].weights_bytes,
            "kl": kl.value, "kl_interval": [kl.low, kl.high], "ratio": times, "ratio_interval": [low, high],
            "other_likeliest": 1 - comparison.agreement.value, "perplexity": comparison.b.perplexity.value,
            "mlx_lm_difference": mlx_lm_difference(target), "seconds": seconds,
        }  # fmt: skip
        print(
            f"{checkpoint.name}, {name}: {found[name]['bytes']:,} bytes, KL {kl.value:.4f} [{kl.low:.4f}, "
            f"{kl.high:.4f}], {times:.3f} of plain [{low:.3f}, {high:.3f}], other likeliest token "
            f"{found[name]['other_likeliest']:.2%}, largest difference from mlx-lm {found[name]['mlx_lm_difference']}; "
            f"{seconds:.0f} s", flush=True
        )  # fmt: skip
    return found


def main() -> None:
    """Prints a line for each package, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "bench" / "calibration", help="keeps checkpoints and data"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the checkpoints to train")
    parser.add_argument("--checkpoint", type=Path, nargs="+", help="unquantised checkpoints to use instead")
    parser.add_argument("--calibration", type=Path, help="calibration data (default: written to the folder)")
    parser.add_argument("--held-out", type=Path, help="held-out data (default: written to the folder)")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    for seed in () if options.checkpoint else options.seeds:
        if not (folder / f"unrounded-{seed}").exists():
            train(folder / f"unrounded-{seed}", seed, TOKENS)
    files = []
    for given, name, (seed, tokens) in (
        (options.calibration, "calibration.jsonl", CALIBRATION), (options.held_out, "held-out.jsonl", HELD_OUT)
    ):  # fmt: skip
        if given is None and not (folder / name).exists():
            write_data(folder / name, seed, tokens)
        files.append(given or folder / name)
    checkpoints = options.checkpoint or [folder / f"unrounded-{seed}" for seed in options.seeds]
    found = {each.name: packages(each, folder, *files) for each in checkpoints}
    ratios = {name: median(each[name]["ratio"] for each in found.values()) for name in BARS}
    no_larger = all(each[name]["bytes"] <= each["plain"]["bytes"] for each in found.values() for name in BARS)
    differences = [recipe["mlx_lm_difference"] for each in found.values() for recipe in each.values()]
    mlx_lm = max((each for each in differences if each is not None), default=None)
    last_line(
        "calibration", checkpoints=found, four_bits_ratio=ratios["4 bits"], chosen_ratio=ratios["chosen"],
        no_larger=no_larger, mlx_lm_difference=mlx_lm,
        ok=no_larger and (mlx_lm or 0) < 1e-3 and all(ratios[name] <= bar for name, bar in BARS.items()),
    )  # fmt: skip


if __name__ == "__main__":
    main()
