"""Memory and time to convert a random 2 GB checkpoint to 4 bits, beside mlx_lm.convert on the same input.

    python tests/bench/convert.py [--runs 3] [--layers 20]

Each conversion is a process of its own; paired runs. Its peak memory is the larger of MLX's peak and the growth of the
resident memory from before the conversion. Bars: peak at most a quarter of the checkpoint, time of the whole process at
most mlx-lm's. The last line is JSON.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from harness import ROOT, alternate, environment, last_line, median_ratio, option_parser

# Thinner than Phi-4-mini: many tensors of 12 to 50 MB, and an embedding of 131 MB.
MAKE = """
import json, shutil, sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.models.text import Model
folder, tokenizer, layers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
raw = {
    "model_type": "phi3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": layers,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32064, "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 2,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
}
folder.mkdir()
(folder / "config.json").write_text(json.dumps(raw))
for file in tokenizer.glob("*.json"):
    shutil.copy(file, folder)
mx.random.seed(0)
names = tree_flatten(Model(ModelConfig.from_dict(raw)).parameters())
weights = {name: (0.02 * mx.random.normal(array.shape)).astype(mx.bfloat16) for name, array in names}
mx.save_safetensors(str(folder / "model.safetensors"), weights)
"""

MEASURE = """
import json, resource, sys, time
source, out = sys.argv[1:]
{setup}
import mlx.core as mx
def resident(kind):
    try:
        line = next(line for line in open("/proc/self/status") if line.startswith(kind))
        return int(line.split()[1]) * 1024
    except OSError:  # macOS: bytes, and only the peak
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, begin = resident("VmRSS:"), time.perf_counter()
{convert}
seconds = time.perf_counter() - begin
print(json.dumps(dict(convert_s=seconds, rss=resident("VmHWM:") - before, mx=mx.get_peak_memory())))
"""
OURS = MEASURE.format(
    setup="from phi4_mlx.convert.package import convert", convert="convert(source, out, quantize=True)"
)
THEIRS = MEASURE.format(
    setup="from mlx_lm import convert", convert="convert(source, out, quantize=True, q_bits=4, q_group_size=64)"
)


def run(code: str, *arguments: str) -> str:
    """Standard output of a Python process."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def conversion(name: str, code: str, source: Path) -> Callable[[], dict[str, float]]:
    """A function that converts once, prints a line and returns its figures."""

    def measure() -> dict[str, float]:
        out = source.with_name("out")
        start = time.perf_counter()
        printed = run(code, str(source), str(out))
        process_s = time.perf_counter() - start
        shutil.rmtree(out)
        figures: dict[str, float] = {**json.loads(printed.splitlines()[-1]), "process_s": process_s}
        print(
            f"{name}: process {process_s:.2f} s, conversion {figures['convert_s']:.2f} s, "
            f"peak {figures['rss'] / 1e6:.0f} MB resident, {figures['mx'] / 1e6:.0f} MB of MLX",
            flush=True,
        )
        return figures

    return measure


def main() -> None:
    """Prints a line for each conversion, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=20)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        run(MAKE, str(source), str(ROOT / "tests" / "data" / "tiny_tokenizer"), str(options.layers))
        size = (source / "model.safetensors").stat().st_size
        ours, theirs = alternate(
            conversion("ours", OURS, source), conversion("mlx-lm", THEIRS, source), options.runs
        )

    def middle(runs: list[dict[str, float]], key: str) -> float:
        return median(run[key] for run in runs)

    def ratio(key: str) -> float:
        return median_ratio([run[key] for run in ours], [run[key] for run in theirs])

    peak = max(middle(ours, "rss"), middle(ours, "mx"))
    last_line(
        "convert",
        source_mb=round(size / 1e6),
        peak_mb=round(peak / 1e6),
        peak_share=round(peak / size, 3),
        peak_share_bar=0.25,
        mlx_lm_peak_mb=round(max(middle(theirs, "rss"), middle(theirs, "mx")) / 1e6),
        process_s=round(middle(ours, "process_s"), 2),
        mlx_lm_process_s=round(middle(theirs, "process_s"), 2),
        process_ratio=round(ratio("process_s"), 3),
        convert_ratio=round(ratio("convert_s"), 3),
        ratio_bar=1.0,
        runs=options.runs,
        ok=peak <= size / 4 and ratio("process_s") <= 1,
    )


if __name__ == "__main__":
    main()
