"""Ollama's Modelfile for a GGUF file.

Source: Ollama's docs/modelfile.md.
"""

from __future__ import annotations

from collections.abc import Sequence

CONTEXT_STEP = 256  # tokens: llama.cpp allocates a context in whole steps


def exact_context(boundary: int) -> int:
    """The largest context that llama.cpp allocates under the short RoPE table; 0 if one step exceeds its boundary."""
    return boundary // CONTEXT_STEP * CONTEXT_STEP


def modelfile(gguf: str, template: str, stops: Sequence[str], context: int | None) -> str:
    """The content of a Modelfile.

    Args:
        gguf: the name of the GGUF file beside it.
        template: in Go's language.
        stops: the texts that end an answer.
        context: tokens to allocate; None or 0 leaves it to Ollama.
    """
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
    if context:
        lines.append("# A longer context uses the long RoPE table from the first token on.")
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"
