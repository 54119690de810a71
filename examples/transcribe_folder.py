"""Transcribes the recordings of a folder, each to subtitles beside it: talk.mp3 gets talk.srt.

    python examples/transcribe_folder.py recordings [--model FOLDER] [--format srt]

Sound of any length is cut at its pauses, and the parts are answered side by side. A recording that has its transcript
is skipped, so the script may be stopped and started again. `python -m phi4_mlx transcribe` does the same, and more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from phi4_mlx import RequestError, load
from phi4_mlx.tokens.media.resample import resampled
from phi4_mlx.tokens.media.sound_file import open_sound
from phi4_mlx.transcription.formats import FORMATS, Segment, render
from phi4_mlx.transcription.parts import cut
from phi4_mlx.transcription.tasks import TRANSCRIBE
from phi4_mlx.transcription.transcriber import answers

ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".aiff", ".caf", ".m4a")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the recordings")
    parser.add_argument("--model", default="demo-multimodal", help="a package that hears")
    parser.add_argument("--format", choices=FORMATS, default="srt", help="of the transcripts")
    options = parser.parse_args()

    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    model, tokenizer = load(options.model)
    if tokenizer.media is None:
        parser.error(f"{options.model} reads only text")
    ending = {"text": ".txt", "verbose_json": ".json"}.get(options.format, f".{options.format}")
    for path in sorted(path for path in options.folder.iterdir() if path.suffix.lower() in ENDINGS):
        transcript = path.with_suffix(ending)
        if transcript.exists():
            continue
        try:
            with open_sound(path) as sound:
                rate, blocks = resampled(sound.blocks(), sound.rate)
                heard = list(answers(model, tokenizer, cut(blocks, rate), TRANSCRIBE))
        except RequestError as error:
            print(f"{path.name}: {error}")
            continue
        heard.sort(key=lambda each: each.part.start)
        segments = [Segment(each.part.start, each.part.end, each.text) for each in heard if each.text]
        duration = sound.seconds or (heard[-1].part.end if heard else 0.0)
        transcript.write_text(render(segments, options.format, duration=duration), encoding="utf-8")
        print(f"{path.name}: written to {transcript.name}")


if __name__ == "__main__":
    main()
