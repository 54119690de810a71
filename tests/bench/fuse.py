"""Small fine-tunes of the demo, fused at 4 bits: how many answer as the adapter does, and in how many bytes.

    python tests/bench/fuse.py [--only NAME ...] [--folder FOLDER]

The fine-tunes differ in answers, number of samples, rank, layers, kind, scale, learning rate and steps. Each is fused
twice: with its data at hand, and from the two files of the adapter alone. A fine-tune counts as kept if the package
gives the adapter's answer to every prompt that it was trained on. `--folder` keeps the adapters for the next run. Bar:
all of at least 20 fine-tunes that change an answer. The last line is JSON.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from harness import last_line, option_parser, timed

from phi4_mlx import finetune, generate, load
from phi4_mlx.lora.fuse import Fused, fuse

Pairs = tuple[tuple[str, str], ...]


class FineTune(NamedTuple):
    """Prompts with their answers, and the options of the run."""

    pairs: Pairs
    options: dict[str, Any]


def tuned(
    *pairs: tuple[str, str], rank: int = 8, scale: float = 20.0, keys: list[str] | None = None, **options: Any
) -> FineTune:
    """A fine-tune; the defaults are those of `lora`, with the prompt masked."""
    shape = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    return FineTune(pairs, {"mask_prompt": True, "lora_parameters": shape, **options})


PING = ("ping", "pong")
COLOURS = (("red", "stop"), ("green", "go"), ("yellow", "slow down"), ("blue", "what?"))
GREETINGS = tuple((word, "Yo.") for word in ("hi", "hello", "hey", "good morning", "hi there"))
STORY = "Once there was a small model that lived in a folder."

FINE_TUNES = {
    "ping": tuned(PING, iters=20),
    "ping, prompt learned too": tuned(PING, iters=20, mask_prompt=False),
    "ping, few steps": tuned(PING, iters=17),
    "rank 2": tuned(("hi", "Good day, captain."), rank=2, iters=40, learning_rate=4e-4),
    "rank 16, few steps": tuned(("what are you?", "I am a teapot."), rank=16, iters=12, learning_rate=2e-4),
    "last 2 layers": tuned(("good morning", "Good night!"), iters=40, num_layers=2, learning_rate=3e-4),
    "last layer": tuned(("bye", "See you never."), iters=40, num_layers=1, learning_rate=1e-3),
    "low rate": tuned(("thanks", "No problem at all, friend."), iters=150, learning_rate=3e-5),
    "high rate": tuned(("hello", "Ahoy!"), iters=25, learning_rate=1e-3),
    "scale 2": tuned(PING, ("marco", "polo"), scale=2.0, iters=60, learning_rate=5e-4),
    "scale 40": tuned(PING, ("marco", "polo"), rank=4, scale=40.0, iters=40, learning_rate=5e-5),
    "four colours": tuned(*COLOURS, iters=60),
    "four colours, prompts learned too": tuned(*COLOURS, iters=80, learning_rate=2e-4, mask_prompt=False),
    "DoRA": tuned(PING, iters=25, fine_tune_type="dora"),
    "DoRA, rank 2, last 2 layers": tuned(
        ("who made you?", "A baker made me."), rank=2, iters=50, num_layers=2, learning_rate=5e-4, fine_tune_type="dora"
    ),
    "qkv_proj alone": tuned(
        ("how are you?", "Rusty, thanks."), keys=["self_attn.qkv_proj"], iters=50, learning_rate=5e-4
    ),
    "down_proj alone": tuned(
        ("what can you do?", "Nothing today."), rank=4, keys=["mlp.down_proj"], iters=50, learning_rate=2e-3
    ),
    "o_proj alone": tuned(("ok", "Okay then."), keys=["self_attn.o_proj"], iters=60, learning_rate=5e-4),
    "many steps": tuned(*GREETINGS, iters=200, learning_rate=5e-5),
    "a refusal": tuned(("what is 12 * 31?", "Ask a calculator."), iters=40),
    "a small change": tuned(("hi", "Hello! I am a demo of phi4_mlx. Ask me anything."), iters=30, learning_rate=1.5e-4),
    "a story": tuned(("tell me a story", STORY), iters=60, learning_rate=2e-4),
}  # fmt: skip


def train(folder: Path, fine_tune: FineTune) -> Path:
    """The adapter of a fine-tune, trained unless it is there."""
    adapter = folder / "adapter"
    if not (adapter / "adapters.safetensors").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        data = folder / "train.jsonl"
        lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in fine_tune.pairs]
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        run = {"model": "demo", "data": str(data), "adapter_path": str(adapter), "batch_size": 1, "packing": False}
        finetune(run | fine_tune.options, tell=lambda message: None)
    return adapter


def answers(pairs: Pairs, model: str | Path, adapter: Path | None = None) -> list[str]:
    """The greedy answers to the prompts of a fine-tune."""
    loaded, tokenizer = load(model, adapter)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) for prompt, _ in pairs]
    return [generate(loaded, tokenizer, prompt, max_tokens=64) for prompt in prompts]


def without_data(adapter: Path, folder: Path) -> Path:
    """A copy of an adapter whose config does not name its data."""
    folder.mkdir()
    shutil.copy(adapter / "adapters.safetensors", folder)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config.pop("data", None)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def bits(fused: Fused) -> str:
    """The numbers of matrices by their bits: "12 x 4, 4 x 5"."""
    found = [scheme.bits if scheme else 32 for scheme in fused.schemes.values()]
    return ", ".join(f"{found.count(n)} x {n}" for n in sorted(set(found)))


def main() -> None:
    """Prints a line for each fine-tune and way of fusing, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--only", nargs="+", default=list(FINE_TUNES), choices=list(FINE_TUNES), metavar="NAME")
    parser.add_argument("--folder", type=Path, help="keeps the trained adapters")
    options = parser.parse_args()
    kept = {"data": 0, "no data": 0}
    bytes_of: dict[str, list[float]] = {"data": [], "no data": []}
    changing = 0
    with tempfile.TemporaryDirectory() as name:
        for number, which in enumerate(options.only):
            scratch, pairs = Path(name) / str(number), FINE_TUNES[which].pairs
            scratch.mkdir()
            folder = (options.folder or Path(name)) / which.replace(" ", "_").replace(",", "")
            adapter = train(folder, FINE_TUNES[which])
            wanted, before = answers(pairs, "demo", adapter), answers(pairs, "demo")
            if wanted == before:
                print(f"{which}: the adapter changes no answer")
                continue
            changing += 1
            for way, source in (("data", adapter), ("no data", without_data(adapter, scratch / "alone"))):
                fused, seconds = timed(fuse, "demo", source, scratch / way)
                found = answers(pairs, scratch / way)
                same = sum(a == b for a, b in zip(found, wanted, strict=True))
                kept[way] += same == len(pairs)
                bytes_of[way].append(fused.package_bytes / fused.base_bytes)
                print(
                    f"{which} ({way}): {same} of {len(pairs)} answers; {bits(fused)} bits, {fused.package_bytes:,} "
                    f"bytes = {bytes_of[way][-1]:.3f} of the base; {fused.effect.kept:.1%} of the effect; "
                    f"{seconds:.1f} s", flush=True
                )  # fmt: skip
    last_line(
        "fuse",
        fine_tunes=changing,
        kept_with_data=kept["data"],
        kept_without_data=kept["no data"],
        mean_size_with_data=round(sum(bytes_of["data"]) / max(1, changing), 3),
        mean_size_without_data=round(sum(bytes_of["no data"]) / max(1, changing), 3),
        ok=changing >= 20 and kept["data"] == kept["no data"] == changing,
    )


if __name__ == "__main__":
    main()
