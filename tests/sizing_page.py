"""Writes docs/sizing.md: text, and what `plan` prints for models whose config is all that it reads.

python -m tests.sizing_page
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

from phi4_mlx.commands import plan
from tests.conftest import DATA, ROOT
from tests.presets import PRESETS

PAGE = ROOT / "docs" / "sizing.md"
QUANTIZATION = {"group_size": 64, "bits": 4}

TEXT = """# A model over several Macs: what it takes

Everything in the blocks below is what `python -m phi4_mlx plan` prints; `python -m tests.sizing_page` writes this page
anew, and a test compares the two. Only the line about the machine that the command runs on is left out. Nothing here
has been measured on a Mac: the figures follow from the shapes of the models and from public figures of Macs and links,
whose sources stand in `phi4_mlx/commands/sizing/machines.py`. Started by `mlx.launch` on your own machines, the same
command loads the shares, runs some steps, and prints measured beside predicted times.

There are three ways to use several Macs:

- **each its own model**: for files of prompts (`generate --prompts`), evaluation, and many users. Nothing crosses while
  answers are drawn, so any link will do; `N` Macs answer `N` times as much, and no single answer is faster;
- **pipeline** (`--parallel pipeline`): each Mac holds some of the blocks. For models that are too large for one, over
  any link; one answer is no faster than on one Mac;
- **tensor parallel** (`--parallel tensor`): each Mac holds a part of every matrix. One answer is faster, but two sums a
  layer cross, so it needs JACCL: RDMA over Thunderbolt 5, from macOS 26.2.

**Private links only.** The links between the Macs have no authentication and no encryption: whoever reaches their ports
can read prompts and answers, and write them. Connect the Macs by a cable or a network of their own.

## Predicted and measured

`mlx.launch -n 2 -- python -m phi4_mlx plan --model M --parallel W`, three times for each way, with a random model of 8
blocks and 203 MB in float32. Measured once, by two processes on the 2 cores of a Linux machine without a GPU, over the
ring on its loopback. Seven times as many processes wanted these cores, so the times are rough; the bytes are exact.

| | tensor | pipeline |
|---|---|---|
| weights of the two ranks, predicted | 102 MB, 102 MB | 102 MB, 101 MB |
| held | 102 MB, 102 MB | 102 MB, 101 MB |
| a decode step, predicted from products and exchanges | 333, 520, 360 ms | 734, 275, 616 ms |
| measured | 458, 615, 716 ms | 695, 616, 559 ms |

"""

BLOCKS = (
    ("## Phi-4-mini in 4 bits, two Macs\n", "Phi-4-mini-instruct-4bit", "2"),
    ("\n## Phi-4 (14B) in 4 bits, two Macs\n", "phi-4-4bit", "2"),
)


def page() -> str:
    """The text of the page."""
    parts = [TEXT]
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for title, name, ranks in BLOCKS:
                _write(Path(name))
                parts += [title, "\n```console\n", f"$ python -m phi4_mlx plan --model {name} --ranks {ranks}\n"]
                parts += [printed(["--model", name, "--ranks", ranks]), "```\n"]
        finally:
            os.chdir(before)
    return "".join(parts)


def printed(arguments: list[str]) -> str:
    """What `plan` prints, without its lines about this machine."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert plan.main(arguments) == 0
    return "".join(line for line in out.getvalue().splitlines(keepends=True) if not line.startswith("this machine"))


def _write(folder: Path) -> None:
    """A folder with a config.json alone."""
    folder.mkdir()
    if folder.name.startswith("Phi-4-mini"):
        config = json.loads((DATA / "phi-4-mini-instruct" / "config.json").read_text())
    else:
        config = {**PRESETS["phi-4"].to_dict(), "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization": QUANTIZATION}))


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
