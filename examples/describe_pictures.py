"""Describes every picture of a folder: one line of JSON for each, {"picture": ..., "text": ...}.

    python examples/describe_pictures.py photos --output photos.jsonl [--model FOLDER] [--question TEXT]

A file that is not a picture gets a line with its "error". If the script is stopped and started again, it goes on with
the pictures that have no line yet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from phi4_mlx import RequestError, generate, load


def described(output: Path) -> set[str]:
    """The pictures that have a line already; a line that was cut is removed from the file."""
    if not output.exists():
        return set()
    whole, newline, _ = output.read_text(encoding="utf-8").rpartition("\n")
    output.write_text(whole + newline, encoding="utf-8")
    return {json.loads(line)["picture"] for line in whole.splitlines()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the pictures")
    parser.add_argument("--output", type=Path, default=Path("pictures.jsonl"), help="file for the lines")
    parser.add_argument("--model", default="demo-multimodal", help="a package that reads pictures")
    parser.add_argument("--question", default="What is in the picture?", help="asked about each picture")
    parser.add_argument("--max-tokens", type=int, default=200, help="longest description")
    options = parser.parse_args()

    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    done = described(options.output)
    model, tokenizer = load(options.model)
    if tokenizer.media is None:
        parser.error(f"{options.model} reads only text")
    with open(options.output, "a", encoding="utf-8") as output:
        for path in sorted(path for path in options.folder.iterdir() if path.is_file() and path.name not in done):
            line = {"picture": path.name}
            parts = [{"type": "image", "path": path}, {"type": "text", "text": options.question}]
            try:
                prompt = tokenizer.apply_chat_template([{"role": "user", "content": parts}])
                line["text"] = generate(model, tokenizer, prompt, max_tokens=options.max_tokens)
            except RequestError as error:
                line["error"] = str(error)
            output.write(json.dumps(line, ensure_ascii=False) + "\n")
            output.flush()
            print(f"{path.name}: {line.get('text') or line['error']}")


if __name__ == "__main__":
    main()
