"""`generate` with a reasoning model: thoughts beside standard output, the authors' sampling, and cut answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.commands import generate
from phi4_mlx.generation import memory, sampling
from phi4_mlx.generation import stream as stream_module
from phi4_mlx.generation.memory import ContextPlan, plan_context
from tests.conftest import write_tiny_checkpoint
from tests.tiny_sambay import write_tiny_sambay
from tests.unit.scripted_stream import ScriptedStream

THOUGHT = "--- thinking ---\nTwo.\n"


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_sambay(tmp_path_factory.mktemp("generate") / "flash"))


class Script(ScriptedStream):
    """A scripted answer that also records the temperature and top-p of each sampler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__("<think>Two.</think>\n\n4.")
        self.drawn: list[tuple[float, float]] = []
        make = sampling.make_sampler

        def noted(temp: float, top_p: float, *rest: Any) -> Any:
            self.drawn.append((temp, top_p))
            return make(temp, top_p, *rest)

        monkeypatch.setattr(stream_module, "stream", self)
        monkeypatch.setattr(sampling, "make_sampler", noted)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(monkeypatch)


@pytest.mark.parametrize(
    ("text", "out", "err"),
    [
        ("<think>Two.</think>\n\n4.", "4.\n", f"{THOUGHT}--- answer ---\n"),
        ("<think>Two.</think> 4 <think>x</think>", "4 <think>x</think>\n", f"{THOUGHT}--- answer ---\n"),
        ("4.", "4.\n", ""),
        ("<thi", "<thi\n", ""),
        ("<think>Two.", "", f"{THOUGHT}{generate.PROG}: the model ended its thoughts without an answer\n"),
    ],
)
def test_standard_output_has_the_answer_alone(
    text: str, out: str, err: str, flash: str, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.text = text
    assert generate.main(["--model", flash, "-p", "2 + 2?"]) == 0
    assert capsys.readouterr() == (out, err)


@pytest.mark.parametrize("options", [["--ignore-chat-template"], ["--chat-format", "phi4-mini"]])
def test_tags_are_text_without_the_chat_format_that_reasons(
    options: list[str], flash: str, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--model", flash, "-p", "2 + 2?", *options]) == 0
    assert capsys.readouterr() == (f"{script.text}\n", "")


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ([], (0.6, 0.95)), (["--temp", "0"], (0, 0.95)), (["--top-p", "1"], (0.6, 1)),
        (["--temp", "0.3", "--top-p", "0.5"], (0.3, 0.5)), (["--chat-format", "phi4-mini"], (0, 1)),
        (["--chat-format", "phi4-mini-reasoning"], (0.8, 0.95)),
    ],
)  # fmt: skip
def test_each_option_overrides_its_own_default(
    options: list[str], drawn: tuple[float, float], flash: str, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--model", flash, "-p", "2 + 2?", *options]) == 0
    assert script.drawn == [drawn] and "no effect" not in capsys.readouterr().err


def test_a_cut_without_effect_is_named_once_the_model_is_known(
    flash: str, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.text = "4."
    said = f"{generate.PROG}: --top-p has no effect at --temp 0, which takes the likeliest token\n"
    for model, line in ((flash, ""), (str(write_tiny_checkpoint(tmp_path / "phi3")), said)):
        assert generate.main(["--model", model, "-p", "2 + 2?", "--top-p", "0.9", "--max-tokens", "5"]) == 0
        assert capsys.readouterr() == ("4.\n", line)
    assert script.drawn == [(0.6, 0.9), (0, 0.9)]


@pytest.mark.parametrize("longest", [1_024, 300])
def test_the_default_length_is_what_fits(
    longest: int, flash: str, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(*given: Any) -> ContextPlan:
        plan = plan_context(*given)
        return replace(plan, limit_bytes=plan.peak_bytes(longest))

    monkeypatch.setattr(memory, "plan_context", small)
    script.reason = "length"
    assert generate.main(["--model", flash, "-p", "2 + 2?"]) == 0
    assert longest - 3 <= script.options.max_tokens + script.prompt_tokens <= longest
    room = "the context and the memory have room for no more"
    assert f"the answer was cut, after 23 tokens; {room}\n" in capsys.readouterr().err
    script.text = "<think>Two."
    assert generate.main(["--model", flash, "-p", "2 + 2?", "--max-tokens", "11"]) == 0
    assert script.options.max_tokens == 11
    assert "the thoughts were cut, before an answer, after 11 tokens; raise --max-tokens" in capsys.readouterr().err
