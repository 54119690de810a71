"""Speech to text: the parts of a sound as jobs side by side, their text in the order of the sound."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from phi4_mlx.errors import Phi4Error
from phi4_mlx.server.apis.transcriptions import SpeechAsk, Transcript
from phi4_mlx.server.apis.wire import Delta, End, WireError
from phi4_mlx.server.limits import LONGEST_SPEECH_S
from phi4_mlx.transcription.formats import Segment
from phi4_mlx.transcription.tasks import most_tokens, speech_messages

if TYPE_CHECKING:
    from phi4_mlx.server.service import Service
    from phi4_mlx.tokens.media.log_mel import Wave
    from phi4_mlx.transcription.parts import Part

PARTS_AT_ONCE = 8  # of one request; a part is up to 40 s of sound


@dataclass
class _Running:
    """A part that is being answered."""

    part: Part
    tokens: int  # of its sound
    items: asyncio.Queue[Delta | End | Exception] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[None] | None = None


async def transcribed(
    service: Service, speech: SpeechAsk, path: str, transcript: Transcript
) -> AsyncGenerator[str, None]:
    """Fills a transcript; yields the text of the first part that is not complete, as it grows, "" once it is.

    Args:
        service: answers the parts.
        speech: the request.
        path: of the sound.
        transcript: of the request.

    Raises:
        WireError: the sound cannot be read, or a part cannot be answered.
    """
    parts = _parts(path, transcript)
    running: deque[_Running] = deque()
    more = True
    try:
        while running or more:
            while more and len(running) < PARTS_AT_ONCE:
                part = await _next(parts, path)
                more = part is not None
                if part is not None:
                    running.append(await _started(service, speech, part))
            if not running:
                break
            async for text in _heard(running[0], transcript):
                yield text
            running.popleft()
    finally:
        tasks = [each.task for each in running if each.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(ValueError):  # a thread is still at the next part; the file ends with it
            parts.close()


def _parts(path: str, transcript: Transcript) -> Generator[Part, None, None]:
    """A thread's: the parts of a sound, decoded as they are asked for; the transcript gets its duration."""
    from phi4_mlx.tokens.media.resample import resampled
    from phi4_mlx.tokens.media.sound_file import open_sound
    from phi4_mlx.transcription.parts import cut

    with open_sound(path, LONGEST_SPEECH_S) as sound:
        rate, blocks = resampled(sound.blocks(), sound.rate)

        def counted() -> Iterator[Wave]:
            for block in blocks:
                transcript.seconds += len(block) / rate
                yield block

        yield from cut(counted(), rate)


async def _next(parts: Generator[Part, None, None], path: str) -> Part | None:
    try:
        return await asyncio.to_thread(next, parts, None)
    except Phi4Error as error:  # which names the server's own file
        raise WireError(400, str(error).replace(path, "the file"), "file") from None


async def _started(service: Service, speech: SpeechAsk, part: Part) -> _Running:
    """Gives a part to the engine."""
    audio = await asyncio.to_thread(part.audio)
    ask = replace(speech.ask, messages=speech_messages(audio, speech.words), max_tokens=most_tokens(audio.seconds))
    ask, prompts = await service.prompts(ask)
    jobs, _ = await service.jobs(ask, prompts)
    running = _Running(part, audio.tokens)

    async def listen() -> None:
        try:
            async with contextlib.aclosing(service.answers(ask, jobs)) as items:
                async for item in items:
                    running.items.put_nowait(item)
        except Exception as error:
            running.items.put_nowait(error)

    running.task = asyncio.create_task(listen())
    return running


async def _heard(running: _Running, transcript: Transcript) -> AsyncGenerator[str, None]:
    """The growing text of a part; at its end the transcript has its segment."""
    text = ""
    while True:
        item = await running.items.get()
        if isinstance(item, Exception):
            raise item
        if isinstance(item, Delta):
            text += item.text
            yield text
            continue
        transcript.audio_tokens += running.tokens
        transcript.prompt_tokens += item.prompt_tokens
        transcript.answer_tokens += item.answer_tokens
        transcript.segments.append(Segment(running.part.start, running.part.end, text.strip()))
        yield ""
        return
