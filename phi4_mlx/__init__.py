"""The Phi-4-mini family on Apple MLX: load, generate, convert, fine-tune.

    from phi4_mlx import generate, load

    model, tokenizer = load("demo")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    print(generate(model, tokenizer, prompt, max_tokens=40))

Names are imported on first use; `import phi4_mlx` itself imports only the standard library.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # not from `typing`, which would take most of the time of this import
if TYPE_CHECKING:
    from typing import Any

    from phi4_mlx.agent import AgentResult, run_tools
    from phi4_mlx.checkpoint import load
    from phi4_mlx.config.text import ModelConfig
    from phi4_mlx.errors import CheckpointError, ConfigError, Phi4Error, RequestError, TokenizerError
    from phi4_mlx.generation.prompt_cache_file import load_prompt_cache, save_prompt_cache
    from phi4_mlx.generation.sampling import make_logits_processors, make_sampler
    from phi4_mlx.generation.steps import generate_step
    from phi4_mlx.generation.stream import GenerationResponse, generate, stream_generate
    from phi4_mlx.lora.run import finetune
    from phi4_mlx.models.prompt_cache import PromptCache
    from phi4_mlx.models.text import Model
    from phi4_mlx.terminal.version import __version__ as __version__
    from phi4_mlx.tokens.media.audio import read_audio
    from phi4_mlx.tokens.media.image import image_tokens, read_image
    from phi4_mlx.tokens.tokenizer import Tokenizer

_HOMES = {
    "AgentResult": "agent",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "GenerationResponse": "generation.stream",
    "Model": "models.text",
    "ModelConfig": "config.text",
    "Phi4Error": "errors",
    "PromptCache": "models.prompt_cache",
    "RequestError": "errors",
    "Tokenizer": "tokens.tokenizer",
    "TokenizerError": "errors",
    "__version__": "terminal.version",
    "finetune": "lora.run",
    "generate": "generation.stream",
    "generate_step": "generation.steps",
    "image_tokens": "tokens.media.image",
    "load": "checkpoint",
    "load_prompt_cache": "generation.prompt_cache_file",
    "make_logits_processors": "generation.sampling",
    "make_sampler": "generation.sampling",
    "read_audio": "tokens.media.audio",
    "read_image": "tokens.media.image",
    "run_tools": "agent",
    "save_prompt_cache": "generation.prompt_cache_file",
    "stream_generate": "generation.stream",
}

__all__ = [
    "AgentResult",
    "CheckpointError",
    "ConfigError",
    "GenerationResponse",
    "Model",
    "ModelConfig",
    "Phi4Error",
    "PromptCache",
    "RequestError",
    "Tokenizer",
    "TokenizerError",
    "finetune",
    "generate",
    "generate_step",
    "image_tokens",
    "load",
    "load_prompt_cache",
    "make_logits_processors",
    "make_sampler",
    "read_audio",
    "read_image",
    "run_tools",
    "save_prompt_cache",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # later lookups do not call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
