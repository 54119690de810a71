"""Parts of a sound through a model, several side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import mlx.core as mx

from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.sequence import BatchSequence, Fault
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.tokens.tokenizer import Tokenizer
from phi4_mlx.transcription.parts import Part
from phi4_mlx.transcription.tasks import most_tokens, speech_messages

ROWS = 8  # parts side by side: a step takes little longer than one of a single part
KV_BYTES = 2**29  # of all their caches; eight parts of 40 s of Phi-4-multimodal need a little more


class Answer(NamedTuple):
    """The text of a part.

    Attributes:
        part: whose text it is.
        text: without spaces around it.
        cut: True if it reached the limit of tokens, so that its end may be missing.
    """

    part: Part
    text: str
    cut: bool


def answers(
    model: LanguageModel, tokenizer: Tokenizer, parts: Iterable[Part], task: str, rows: int = ROWS
) -> Iterator[Answer]:
    """Asks for a speech task on each part, greedily; answers come as they end, not in the order of the parts.

    Args:
        model: one that hears.
        tokenizer: of the model.
        parts: taken one by one, as rows become free.
        task: the words of the task.
        rows: the most parts side by side.

    Raises:
        RequestError: the model reads only text, or as reading a part raises it.
    """
    batch = Batch(max_rows=rows, kv_limit_bytes=KV_BYTES)
    running: dict[BatchSequence, tuple[Part, list[int]]] = {}
    waiting = iter(parts)
    while True:
        while len(running) < rows and (part := next(waiting, None)) is not None:
            prompt = tokenizer.apply_chat_template(speech_messages(part.audio(), task))
            sequence = BatchSequence(model, prompt, most_tokens(part.end - part.start))
            running[sequence] = part, []
            batch.add(sequence)
        if not running:
            return
        for event in batch.step():
            if isinstance(event, Fault):
                raise event.error
            if event.sequence not in running:  # tokens of the same step after its end
                continue
            part, ids = running[event.sequence]
            ended = event.token in tokenizer.eos_ids
            if not ended:
                ids.append(event.token)
            if ended or len(ids) == event.sequence.max_tokens:
                batch.end(event.sequence)
                del running[event.sequence]
                mx.clear_cache()
                yield Answer(part, tokenizer.decode(ids).strip(), cut=not ended)
