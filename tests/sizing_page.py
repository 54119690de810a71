"""Writes docs/sizing.md: text, and what `plan` prints for models of which it reads the config alone.

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
from phi4_mlx.commands.sizing.machines import SOURCES
from tests.conftest import DATA, ROOT
from tests.presets import PRESETS

PAGE = ROOT / "docs" / "sizing.md"
QUANTIZATION = {"group_size": 64, "bits": 4}

TEXT = """# A model over several Macs: what it takes

Three ways to use several Macs:

| way | each Mac holds | what it is for | link |
|---|---|---|---|
| each its own model | all weights | many prompts: `generate --prompts`, `evaluate`, or a server on each | any |
| `--parallel pipeline` | some of the blocks | a model too large for one Mac; an answer is no faster | any |
| `--parallel tensor` | a part of every matrix | one answer, faster: two sums a layer cross | JACCL |

**Private links only.** The links have no authentication and no encryption: whoever reaches their ports can read prompts
and answers, and write them. Connect the Macs by a cable or a network of their own.

Bytes and exchanges follow from the shapes of the models and are exact. Every time and speed below is **computed**: from
those bytes, and from public figures of Macs and links, whose sources stand at the end. None has been measured on a Mac.
Started by `mlx.launch` on your own machines, `plan` runs some steps and prints measured beside predicted times.

"""

AFTER = """
## A fleet of servers

`requests/s` above are those of one Mac with the whole model; N Macs answer N times as many. A router in front of them
must know

- which of them has a conversation: each has its own prefix cache, so a user, or a beginning that prompts share, stays
  with one server while it is healthy;
- their health, by `GET /health`: a request that failed before its first token may go to another server;
- their model names, by `GET /v1/models`: all serve the same model and adapters under the same names;
- how busy they are: a full server answers 429 or 503, and the request goes to the next.

## Predicted and measured

`mlx.launch -n 2 -- python -m phi4_mlx plan --model M --parallel W`, three times for each way, with a random model of 8
blocks in float32. Measured by two processes on the two cores of a busy Linux machine without a GPU, over the ring on
its loopback: the bytes are exact, the times rough.

| | tensor | pipeline |
|---|---|---|
| weights of the two ranks, predicted | 102 MB, 102 MB | 102 MB, 101 MB |
| held | 102 MB, 102 MB | 102 MB, 101 MB |
| a decode step, predicted from products and exchanges | 333, 520, 360 ms | 734, 275, 616 ms |
| measured | 458, 615, 716 ms | 695, 616, 559 ms |

## Sources

| figure | source |
|---|---|
"""

MINI, LARGE = "Phi-4-mini-instruct-4bit", "phi-4-4bit"
KEPT = ("By ", "tokens/s of one answer", "longest context", "A fleet")  # of the second model: what differs


def page() -> str:
    """The text of the page."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            mini, large = _block(MINI), _block(LARGE)
        finally:
            os.chdir(before)
    first, *sections = large.split("\n\n")
    shorter = "\n\n".join([first, *(each for each in sections if each.startswith(KEPT))])
    sources = "".join(f"| {figure} | {source} |\n" for figure, source in SOURCES)
    return (
        f"{TEXT}## Phi-4-mini in 4 bits, two Macs\n\n```console\n{mini}```\n\n"
        f"## Phi-4 (14B) in 4 bits, two Macs\n\nThe parts that differ:\n\n```console\n{shorter}```\n{AFTER}{sources}"
    )


def _block(name: str) -> str:
    """A command and what it prints."""
    _write(Path(name))
    return f"$ python -m phi4_mlx plan --model {name} --ranks 2\n{printed(['--model', name, '--ranks', '2'])}"


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
