"""Generation: ids to tokens to text; sampling, speculation, batches, memory plans, prompt cache files."""

from phi4_mlx.generation.options import DecodeOptions, Progress
from phi4_mlx.generation.steps import generate_step
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
    "DecodeOptions",
    "GenerationResponse",
    "Progress",
    "StreamingDecoder",
    "Tokenizer",
    "generate",
    "generate_step",
    "stream_generate",
    "wired_memory",
]
