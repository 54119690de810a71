"""Distils a quantised package from its original: mlx-lm's DWQ trains the scales and biases of the packed matrices.

    python examples/distil_package.py --model ORIGINAL --package PACKAGE --data train.jsonl --save-path OUT

The new package has the same codes, bytes and layout. On demo checkpoints that were trained without rounding, it cuts
the KL divergence of calibrated packages (`convert -q --q-calibration`) by a fifth, but that of plain ones only to half,
more than calibration leaves: so calibrate first. The original, the package and the gradients are in memory together.
Check the result on other text with `python -m phi4_mlx compare`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.quant.dwq import dwq_quantize

from phi4_mlx import load
from phi4_mlx.data.samples import load_samples
from phi4_mlx.files.atomic import whole_or_absent
from phi4_mlx.files.manifest import MANIFEST_FILE, file_sha256
from phi4_mlx.files.safetensors import weight_files
from phi4_mlx.hub import resolve
from phi4_mlx.models.model import LanguageModel

WARMUP = 20  # steps
BATCH_SIZE = 4


def write(source: Path, target: Path, model: LanguageModel) -> None:
    """Copies a package with the scales and biases of a model."""
    trained = dict(tree_flatten(model.parameters()))
    with whole_or_absent(target) as out:
        shutil.copytree(source, out, dirs_exist_ok=True)
        manifest = json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8"))
        for path in sorted(set(weight_files(source).values())):
            arrays = mx.load(str(path))
            for name, old in arrays.items():
                if name.endswith((".scales", ".biases")) and name in trained:
                    arrays[name] = trained[name].astype(old.dtype)
            copy = out / path.name
            mx.save_safetensors(str(copy), arrays, {"format": "mlx"})
            manifest["files"][path.name] = {"bytes": copy.stat().st_size, "sha256": file_sha256(copy)}
        (out / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Trains, and writes the new package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the original: a folder or a Hugging Face id")
    parser.add_argument("--package", required=True, help="the quantised package, from phi4_mlx.convert")
    parser.add_argument("--data", required=True, help="samples in a format of training")
    parser.add_argument("--save-path", type=Path, required=True, help="the new folder")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--max-seq-length", type=int, default=1024)
    options = parser.parse_args()

    source = resolve(options.package)
    (teacher, tokenizer), (student, _) = load(options.model), load(source)
    samples, _ = load_samples(options.data, tokenizer, max_seq_length=options.max_seq_length)
    data = [(sample.ids, 0) for sample in samples]
    held_out = data[: max(BATCH_SIZE, len(data) // 10)]
    train = data[len(held_out) :]
    if len(train) < BATCH_SIZE:
        parser.error(f"{options.data} has {len(data)} samples; at least {2 * BATCH_SIZE} are needed")
    steps, rate = options.epochs * (len(train) // BATCH_SIZE), options.learning_rate
    warm = optim.linear_schedule(rate / WARMUP, rate, WARMUP)
    cool = optim.cosine_decay(rate, max(1, steps - WARMUP), rate / WARMUP)
    optimizer = optim.Adam(learning_rate=optim.join_schedules([warm, cool], [WARMUP]), bias_correction=True)
    student.freeze()
    for epoch in range(options.epochs):
        dwq_quantize(
            student, lambda batch, *_, **__: teacher(batch), optimizer, train, held_out, BATCH_SIZE,
            options.max_seq_length, seed=epoch, dtype=student.dtype,
        )  # fmt: skip
    write(source, options.save_path, student)


if __name__ == "__main__":
    main()
