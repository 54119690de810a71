"""A process that reads a PDF from its input, and writes a line of JSON and the pixels of one page.

python -m phi4_mlx.tokens.media.pdf_worker PAGE < FILE.pdf
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import signal
import sys
from typing import Any

_SCALE = 150 / 72  # dots an inch over points an inch; letters of 10 points are 21 pixels high
_MOST_PIXELS = 36 * 448**2  # what the model sees of a picture
_MOST_CPU_S = 10
_MOST_MEMORY_BYTES = 2**31


def main() -> None:
    """Reads the input, and draws the page that the command line names; page 0 is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads the answer
    for limit, most in ((resource.RLIMIT_CPU, _MOST_CPU_S), (resource.RLIMIT_AS, _MOST_MEMORY_BYTES)):
        with contextlib.suppress(OSError, ValueError):  # macOS has no limit of memory
            resource.setrlimit(limit, (most, most))
    head, pixels = _drawn(sys.stdin.buffer.read(), int(sys.argv[1]))
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + pixels)
    sys.stdout.buffer.flush()


def _drawn(data: bytes, number: int) -> tuple[dict[str, Any], bytes]:
    import pypdfium2

    if b"%PDF-" not in data[:1024]:
        return {"error": "it is not a PDF"}, b""
    try:
        document = pypdfium2.PdfDocument(data)
        count = len(document)
        if not count:
            return {"error": "it has no pages"}, b""
        if not number:
            return {"pages": count}, b""
        if number > count:
            return {"error": f"page {number} does not exist: it has pages 1 to {count}"}, b""
        document.init_forms()  # so that what was filled in is drawn
        page = document[number - 1]
        width, height = page.get_size()
        if not (0 < width < math.inf and 0 < height < math.inf):
            return {"error": f"page {number} has a size of {width} x {height}"}, b""
        scale = min(_SCALE, math.sqrt(_MOST_PIXELS / (width * height)))
        image = page.render(scale=scale).to_pil().convert("RGB")
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            return {"error": "it is encrypted: save it without a password first"}, b""
        return {"error": f"it is damaged ({' '.join(str(error).split())})"}, b""
    return {"pages": count, "width": image.width, "height": image.height}, image.tobytes()


if __name__ == "__main__":
    main()
