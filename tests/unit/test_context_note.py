"""A context that ends before the one in config.json: each message that names its end says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from phi4_mlx.chat.conversation import Conversation
from phi4_mlx.checkpoint import load, load_config
from phi4_mlx.commands import benchmark, context
from phi4_mlx.convert import __main__ as convert
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.server.engine.engine import Engine, limit_note
from phi4_mlx.server.engine.protocol import Failure, Job
from phi4_mlx.server.engine.settings import Settings
from tests.conftest import write_tiny_checkpoint
from tests.tiny_sambay import write_tiny_sambay

REASON = "trained for no more"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_sambay(tmp_path / "tiny", max_position_embeddings=262144)


def test_the_answer_of_each_door_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load(folder)
    with pytest.raises(RequestError, match=rf"come to 70003, and the context holds 65536 \(.*{REASON}.* 65533"):
        next(generate_step([5, 6, 7], model, max_tokens=70_000))
    with pytest.raises(RequestError, match=rf"the context holds 65,536 \(.*{REASON}.*\); shorten the question"):
        next(Conversation(model, tokenizer).ask("ab " * 70_000, DecodeOptions(max_tokens=1)))
    assert benchmark.main(["--model", str(folder), "--prompt-tokens", "65536"]) == 2
    assert REASON in capsys.readouterr().err
    assert context.main(["--model", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("The context holds 65,536 tokens (this model was trai")
    assert convert.main(["--hf-path", str(folder), "--mlx-path", str(folder.parent / "copy")]) == 0
    assert "\ncontext: 65,536 tokens (this model was trained" in capsys.readouterr().out
    assert load_config(folder.parent / "copy") == model.config


@pytest.mark.parametrize(("write", "said"), [(write_tiny_sambay, True), (write_tiny_checkpoint, False)])
def test_a_server_says_why_where_memory_is_not_the_limit(
    write: Callable[..., Path], said: bool, tmp_path: Path
) -> None:
    folder = write(tmp_path / "any", max_position_embeddings=131_072)
    model, tokenizer = load(folder)

    def note(kv_limit_bytes: int) -> str:
        engine = Engine(model, tokenizer, Settings(str(folder), kv_limit_bytes=kv_limit_bytes, prefix_limit_bytes=0))
        (failure,) = engine.submit(Job(1, (5, 6, 7), 2**24, Sampling()))
        assert isinstance(failure, Failure) and (limit_note(engine) in failure.message)
        return limit_note(engine)

    assert (REASON in note(2**40)) == said
    assert note(2**20) == ""
