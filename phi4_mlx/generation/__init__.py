"""Generation: ids to tokens to text; sampling, speculation, batches, memory plans, prompt cache files."""

from phi4_mlx.generation.steps import Progress, generate_step
from phi4_mlx.generation.stream import (
    AnswerText,
    GenerationResponse,
    StreamingDecoder,
    Tokenizer,
    generate,
    stream_generate,
    wired_memory,
)

__all__ = [
    "AnswerText",
    "GenerationResponse",
    "Progress",
    "StreamingDecoder",
    "Tokenizer",
    "generate",
    "generate_step",
    "stream_generate",
    "wired_memory",
]
