"""Teaches `demo-flash` a new kind of problem with a LoRA adapter: "What comes after 347?".

    python examples/demo/teach_flash.py [--folder build/following] [--iters 60] [--count 100]

It writes train.jsonl, runs `python -m phi4_mlx.lora`, and asks held-out problems of that kind before and after. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from draw import Draw
from evaluate import SEED, examine, share
from problems import following

from phi4_mlx import load

SAMPLES = 1500


def main() -> None:
    """Prints the share of right answers before and after."""
    root = Path(__file__).resolve().parent.parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=root / "build" / "following")
    parser.add_argument("--iters", type=int, default=60)
    parser.add_argument("--count", type=int, default=100, help="number of held-out problems")
    options = parser.parse_args()
    folder: Path = options.folder
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    draw = Draw(f"following {SEED}")
    lines = ({"messages": [*made.messages, made.answer]} for made in (following(draw) for _ in range(SAMPLES)))
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    held_out = Draw(f"following {SEED}", held_out=True)
    prompts = [following(held_out) for _ in range(options.count)]
    before = share(examine(*load("demo-flash"), prompts))
    command = [
        sys.executable, "-m", "phi4_mlx.lora", "--model", "demo-flash", "--data", str(folder / "train.jsonl"),
        "--mask-prompt", "--adapter-path", str(folder / "adapter"), "--iters", str(options.iters), "--batch-size", "8",
        "--learning-rate", "1e-3",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=root)
    after = share(examine(*load("demo-flash", adapter_path=str(folder / "adapter")), prompts, mistakes=5))
    print(json.dumps({"before_percent": before, "after_percent": after}))


if __name__ == "__main__":
    main()
