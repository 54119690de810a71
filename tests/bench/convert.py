"""Converting a random 2 GB checkpoint to 4 bits, beside mlx_lm.convert on the same input, in turns: memory and time.

    python tests/bench/convert.py [--runs 3] [--layers 20]

The bars: peak memory over that of the process before it begins, resident and mlx's own, at most a quarter of the
checkpoint; time of the whole process no worse than mlx-lm's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Shapes like Phi-4-mini's, thinner: many tensors of 12 to 50 MB, and an embedding of 131 MB.
MAKE = """
import json, shutil, sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from phi4_mlx.config import ModelConfig
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
    except OSError:  # macOS: in bytes, and only the peak
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
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def measure(code: str, source: Path) -> dict[str, Any]:
    """One conversion in a process of its own."""
    out = source.with_name("out")
    begin = time.perf_counter()
    printed = run(code, str(source), str(out))
    process_s = time.perf_counter() - begin
    size = (out / "model.safetensors").stat().st_size
    shutil.rmtree(out)
    return {**json.loads(printed.splitlines()[-1]), "process_s": process_s, "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=20)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        run(MAKE, str(source), str(ROOT / "tests" / "data" / "tiny_tokenizer"), str(options.layers))
        size = (source / "model.safetensors").stat().st_size
        pairs = []
        for _ in range(options.runs):
            pairs.append((measure(OURS, source), measure(THEIRS, source)))
            for name, one in zip(("ours", "mlx-lm"), pairs[-1], strict=True):
                print(
                    f"{name}: process {one['process_s']:.2f} s, conversion {one['convert_s']:.2f} s, "
                    f"peak {one['rss'] / 1e6:.0f} MB resident, {one['mx'] / 1e6:.0f} MB of mlx"
                )

    def median(whose: int, what: str) -> float:
        return statistics.median(pair[whose][what] for pair in pairs)

    def ratio(what: str) -> float:
        return statistics.median(ours[what] / theirs[what] for ours, theirs in pairs)

    peak = max(median(0, "rss"), median(0, "mx"))
    result = {
        "bench": "convert",
        "source_mb": round(size / 1e6),
        "peak_mb": round(peak / 1e6),
        "peak_share": round(peak / size, 3),
        "peak_share_bar": 0.25,
        "mlx_lm_peak_mb": round(max(median(1, "rss"), median(1, "mx")) / 1e6),
        "process_s": round(median(0, "process_s"), 2),
        "mlx_lm_process_s": round(median(1, "process_s"), 2),
        "process_ratio": round(ratio("process_s"), 3),
        "convert_ratio": round(ratio("convert_s"), 3),
        "ratio_bar": 1.0,
        "runs": options.runs,
        "ok": peak <= size / 4 and ratio("process_s") <= 1,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
