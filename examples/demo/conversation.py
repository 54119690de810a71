"""Sample pictures, and an SVG of a conversation about them and about clips, with the package's own answers.

python examples/demo/conversation.py
"""

from __future__ import annotations

import base64
import random
from html import escape
from pathlib import Path

import evaluate
import pictures

from phi4_mlx import load

FOLDER = Path(__file__).parent
SAMPLES = FOLDER / "samples"
SEEDS = {"shapes.png": 127, "seven.png": 5}  # of held-out pictures
CLIP = "046.ogg"
LINE, LEFT, TOP = 20, 128, 56  # pixels

# Questions about each sample or clip, in one conversation each.
TALKS: list[tuple[str, list[str]]] = [
    (
        "samples/shapes.png",
        ["How many shapes are there?", "Where is the yellow triangle?", "Which is larger, the star or the circle?"],
    ),
    ("samples/seven.png", ["What digit is it?", "What colour is the digit?"]),
    (f"clips/{CLIP}", ["Transcribe the audio clip into text.", "How many words are said?"]),
]


def main() -> None:
    """Writes `samples/*.png` and `conversation.svg`."""
    from PIL import Image

    SAMPLES.mkdir(exist_ok=True)
    for name, seed in SEEDS.items():
        rng, is_digit = random.Random(seed), name == "seven.png"
        picture = pictures.make_picture(rng, held_out=True, digits=float(is_digit))
        while is_digit and picture.digit != 7:
            picture = pictures.make_picture(rng, held_out=True, digits=1)
        Image.fromarray(picture.pixels).save(SAMPLES / name, optimize=True)
    (FOLDER / "conversation.svg").write_text(_svg(answered(TALKS)), encoding="utf-8")


def answered(talks: list[tuple[str, list[str]]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The path of each medium, and (question, the model's answer) about it."""
    model, tokenizer = load(evaluate.MULTIMODAL)
    found = []
    for path, texts in talks:
        kind = "image" if path.endswith("png") else "audio"
        messages: list[dict[str, object]] = []
        turns = []
        for text in texts:
            parts: list[dict[str, str]] = [] if messages else [{"type": kind, kind: str(FOLDER / path)}]
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
            answer = tokenizer.decode(evaluate.reply(model, tokenizer, tokenizer.apply_chat_template(messages)))
            messages.append({"role": "assistant", "content": answer})
            turns.append((text, answer))
        found.append((path, turns))
    return found


def _svg(talks: list[tuple[str, list[tuple[str, str]]]]) -> str:
    """A terminal, with each picture beside the turns about it."""
    y, body = TOP, []
    for path, turns in talks:
        if path.endswith("png"):
            data = base64.b64encode((FOLDER / path).read_bytes()).decode()
            href = f"data:image/png;base64,{data}"
            body.append(f'<image x="24" y="{y - 14}" width="84" height="84" href="{href}"/>')
            command = f"/image examples/demo/{path}"
        else:
            bars = random.Random(path)
            for bar in range(21):
                tall = bars.uniform(8, 60)
                body.append(
                    f'<rect class="b" x="{24 + 4 * bar}" y="{y + 28 - tall / 2:.0f}" width="2" height="{tall:.0f}"/>'
                )
            command = f"/audio examples/demo/{path}"
        lines = [("u", f"> {command}")]
        for question, answer in turns:
            lines += [("u", f"> {question}"), ("a", answer)]
        for style, text in lines:
            body.append(f'<text class="{style}" x="{LEFT}" y="{y}">{escape(text)}</text>')
            y += LINE
        y = y + LINE if len(lines) * LINE > 84 else y + 84 - len(lines) * LINE + LINE
    style = (
        "text{font:14px ui-monospace,Menlo,Consolas,monospace}.u{fill:#9ecbff}.a{fill:#e6edf3}.p{fill:#8b949e}"
        ".b{fill:#7ee787}"
    )
    title = f'<text class="p" x="24" y="26">$ make chat MODEL={evaluate.MULTIMODAL}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{y}" viewBox="0 0 720 {y}">'
        f'<style>{style}</style><rect width="720" height="{y}" rx="10" fill="#0d1117"/>{title}{"".join(body)}</svg>\n'
    )


if __name__ == "__main__":
    main()
