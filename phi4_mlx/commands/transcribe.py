"""`python -m phi4_mlx transcribe`: the text of sound files of any length."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.amount import amount
from phi4_mlx.terminal.command import Parser, complain, progress_bar, run, typed, word
from phi4_mlx.terminal.options import add_revision_option
from phi4_mlx.terminal.printable import one_line
from phi4_mlx.transcription.formats import FORMATS

if TYPE_CHECKING:
    from phi4_mlx.models.model import LanguageModel
    from phi4_mlx.tokens.media.log_mel import Wave
    from phi4_mlx.tokens.tokenizer import Tokenizer
    from phi4_mlx.transcription.formats import Format, Segment
    from phi4_mlx.transcription.parts import Part
    from phi4_mlx.transcription.progress import Progress

PROG = typed("transcribe")
ENDINGS = {"json": ".json", "text": ".txt", "srt": ".srt", "vtt": ".vtt", "verbose_json": ".json"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _transcribe, argv)


def _parser() -> Parser:
    parser = Parser(
        prog=PROG,
        description="Write down the speech in sound files of any length. The sound is cut at pauses into parts of at "
        "most 40 s, which the model hears side by side; times are those of the parts. Silence has no text.",
    )
    parser.add_argument("files", nargs="+", type=word, metavar="FILE", help="sound: WAV, FLAC, MP3, Ogg, AIFF or CAF")
    parser.add_argument(
        "--model", type=word, required=True, help="a model that hears: a folder, a Hugging Face id, or demo-multimodal"
    )
    add_revision_option(parser)
    parser.add_argument("--verify", action="store_true", help="check every file against the hashes of the package")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the transcript")
    parser.add_argument(
        "--language",
        type=word,
        metavar="LANG",
        help="the language that is spoken, such as en or German, for verbose_json; the model recognises it by itself, "
        "and writes the text in it (default: unknown)",
    )
    parser.add_argument(
        "--output",
        type=word,
        metavar="PATH",
        help="the file to write, or a folder for one file each; a run that was stopped goes on where it was (default: "
        "standard output)",
    )
    parser.add_argument("--word-timestamps", action="store_true", help=argparse.SUPPRESS)
    return parser


class _Job(NamedTuple):
    """A file to transcribe, and where to."""

    source: str
    output: Path | None


def _transcribe(args: argparse.Namespace) -> None:
    from phi4_mlx.transcription.tasks import NO_WORD_TIMES, TRANSCRIBE, language_name

    if args.word_timestamps:
        raise RequestError(NO_WORD_TIMES)
    language = None if args.language is None else language_name(args.language)
    jobs = _jobs(args.files, args.output, args.format)
    _check_sounds(args.files)  # before the model is loaded, so that a mistake costs no wait

    from phi4_mlx.checkpoint import load
    from phi4_mlx.hub import resolve
    from phi4_mlx.tokens.media.media_file import check_reads_media
    from phi4_mlx.transcription.progress import Progress, model_identity

    model, tokenizer = load(args.model, lazy=True, revision=args.revision, verify=args.verify)
    check_reads_media(tokenizer, args.model)
    identity = model_identity(resolve(args.model, args.revision))
    failed = 0
    for job in jobs:
        try:
            progress = None if job.output is None else Progress(job.output, _digest(job.source), identity, TRANSCRIBE)
            _one(job, model, tokenizer, progress, args.format, language)
        except RequestError as error:
            if len(jobs) == 1:
                raise
            complain(PROG, str(error))
            failed += 1
    if failed:
        raise RequestError(f"{failed} of {amount(len(jobs), 'file')} could not be transcribed, see above")


def _one(
    job: _Job,
    model: LanguageModel,
    tokenizer: Tokenizer,
    progress: Progress | None,
    form: Format,
    language: str | None,
) -> None:
    """Transcribes one file and writes its transcript."""
    from phi4_mlx.files.atomic import replacing
    from phi4_mlx.transcription.formats import render

    try:
        segments, duration = _segments(job.source, model, tokenizer, progress)
    except KeyboardInterrupt:
        if progress is not None and progress.file.exists():
            complain(PROG, "stopped; the same command goes on from there")
        raise
    transcript = render(segments, form, duration=duration, language=language)
    if job.output is None:
        sys.stdout.write(transcript)
        sys.stdout.flush()
        return
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(job.output) as path:
        path.write_text(transcript, encoding="utf-8")
    if progress is not None:
        progress.remove()


def _segments(
    source: str, model: LanguageModel, tokenizer: Tokenizer, progress: Progress | None
) -> tuple[list[Segment], float]:
    """(the segments of a file in order, its duration in seconds)"""
    from phi4_mlx.tokens.media.resample import resampled
    from phi4_mlx.tokens.media.sound_file import open_sound
    from phi4_mlx.transcription.formats import Segment
    from phi4_mlx.transcription.parts import cut
    from phi4_mlx.transcription.tasks import TRANSCRIBE
    from phi4_mlx.transcription.transcriber import answers

    found: list[Segment] = []
    heard = 0.0  # seconds of finished parts

    def add(part: Part, text: str) -> None:
        nonlocal heard
        heard += part.end - part.start
        if text:
            found.append(Segment(part.start, part.end, text))
        if show is not None:
            show(min(heard, sound.seconds), sound.seconds)

    def unfinished(parts: Iterable[Part]) -> Iterator[Part]:
        for part in parts:
            text = None if progress is None else progress.text_of(part)
            if text is None:
                yield part
            else:
                add(part, text)

    with progress_bar(one_line(os.path.basename(source)), of=_clock) as show, open_sound(source) as sound:
        rate, blocks = resampled(sound.blocks(), sound.rate)
        clock = _Counted(blocks)
        for answer in answers(model, tokenizer, unfinished(cut(clock, rate)), TRANSCRIBE):
            if answer.cut:
                where = f"{os.path.basename(source)} at {_clock(answer.part.start)}"
                complain(PROG, f"{where}: the text became longer than speech can be, and was ended there")
            if progress is not None:
                progress.add(answer.part, answer.text)
            add(answer.part, answer.text)
    return sorted(found, key=lambda segment: segment.start), clock.samples / rate


class _Counted:
    """Blocks of samples, counted as they pass."""

    def __init__(self, blocks: Iterable[Wave]) -> None:
        self._blocks, self.samples = blocks, 0

    def __iter__(self) -> Iterator[Wave]:
        for block in self._blocks:
            self.samples += len(block)
            yield block


def _jobs(files: Sequence[str], output: str | None, form: str) -> list[_Job]:
    """Each file with the file of its transcript.

    Raises:
        RequestError: transcripts would have one name, or an output cannot be written.
    """
    if output is None:
        return [_Job(file, None) for file in files]
    place = Path(os.path.expanduser(output)).absolute()
    if len(files) == 1 and not place.is_dir():
        if not place.parent.is_dir() or (place.exists() and not place.is_file()):
            raise RequestError(f"{place} cannot be written; name a file in a folder that exists, or a folder")
        jobs = [_Job(files[0], place)]
    elif place.exists() and not place.is_dir():
        raise RequestError(f"--output {output} is not a folder, and there are {len(files)} files; name a folder")
    else:
        jobs = [_Job(file, place / (Path(file).stem + ENDINGS[form])) for file in files]
    taken: dict[str, str] = {os.path.realpath(file): "" for file in files}
    for source, target in jobs:
        real = os.path.realpath(str(target))
        if other := taken.get(real):
            raise RequestError(
                f"the transcripts of {other} and {source} would both be {target}; transcribe them into two folders"
            )
        if real in taken:
            raise RequestError(
                f"the transcript of {source} would overwrite {target}, a file to transcribe; name another"
            )
        taken[real] = source
    return jobs


def _check_sounds(files: Sequence[str]) -> None:
    """Refuses files that are not sound.

    Raises:
        RequestError: one is not.
    """
    from phi4_mlx.tokens.media.sound_file import open_sound

    for file in files:
        with open_sound(file):
            pass


def _digest(source: str) -> str:
    from phi4_mlx.files.manifest import file_sha256

    return file_sha256(Path(source))


def _clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
