"""Generation from prompts with media: chunks, the RoPE boundary, speculation, prompt cache files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.generation.prompt_cache_file import load_prompt_cache, save_prompt_cache
from phi4_mlx.generation.speculate import DraftModel, PromptLookup
from phi4_mlx.generation.stream import stream_generate
from phi4_mlx.models.multimodal import Model
from phi4_mlx.tokens.media.audio import Audio
from phi4_mlx.tokens.media.image import Image
from phi4_mlx.tokens.prompt import Prompt, absent
from tests.char_tokenizer import CharTokenizer
from tests.conformance import recipe_multimodal as recipe
from tests.media import picture, prompt_of
from tests.model_runs import decoded
from tests.tiny_multimodal import make_tiny_multimodal

TOKENIZER: Any = CharTokenizer()
GOLDEN = np.load(Path(recipe.__file__).with_name("golden_multimodal.npz"))
TEXT = [490, 5, 6]
ONE, OTHER = (prompt_of(TEXT, picture(seed), [20, 21, 22]) for seed in (0, 1))


@pytest.fixture(scope="module")
def model() -> Model:
    return make_tiny_multimodal()


def golden_prompt(mode: str) -> Prompt:
    """The recipe's prompt with its media."""
    image, sound = Image(*recipe.picture(), recipe.CROP, recipe.PATCH), Audio(recipe.features("short"), 0.83)
    media = [*([image] if "vision" in mode else []), *([sound] if "speech" in mode else [])]
    ids = [token for token in recipe.prompt(mode) if token not in (recipe.IMAGE_TOKEN, recipe.AUDIO_TOKEN)]
    return prompt_of(ids[:4], *media, ids[4:])


@pytest.mark.parametrize("step", [1, 5, 96])
@pytest.mark.parametrize("mode", recipe.MODES)
def test_greedy_tokens_are_the_references_in_any_chunks(model: Model, mode: str, step: int) -> None:
    """Those with a picture cross the RoPE boundary, or are past it."""
    prompt = golden_prompt(mode)
    assert [*prompt] == recipe.prompt(mode)
    assert decoded(model, prompt, recipe.GREEDY, prefill_step_size=step) == GOLDEN[f"greedy_{mode}"].tolist()


@pytest.mark.parametrize("masked", [False, True])
def test_guesses_change_nothing_and_are_never_slots(model: Model, masked: bool) -> None:
    class Allow:
        forced = False

        def mask(self) -> mx.array | None:
            return None

        def accept(self, token: int) -> list[int]:
            return []

    expected = decoded(model, ONE, 40)
    guessed: list[int] = []

    class Guesses:
        """Guesses the answer, and a slot before its end."""

        def begin(self, ids: Sequence[int]) -> None:
            self.at = 0

        def extend(self, tokens: Sequence[int]) -> None:
            self.at += len(tokens)

        def took(self, tokens: int, seconds: float) -> None:
            guessed.append(tokens - 1)

        def pays(self) -> bool:
            return True

        def guess(self, most: int) -> list[int]:
            return [*expected[self.at : self.at + 3], recipe.IMAGE_TOKEN, recipe.AUDIO_TOKEN]

    options = {"logits_mask": Allow()} if masked else {}
    for proposer in (Guesses(), PromptLookup(timed=False), DraftModel(model, timed=False)):
        assert decoded(model, ONE, 40, proposer=proposer, **options) == expected
    assert max(guessed) == 3


def test_prompt_tokens_and_progress_count_slots(model: Model) -> None:
    prompt, seen = prompt_of(TEXT, picture(), picture(1), [20, 21]), []
    answers = stream_generate(
        model, TOKENIZER, prompt, max_tokens=1, prompt_progress_callback=lambda *each: seen.append(each)
    )
    assert next(answers).prompt_tokens == len(prompt) == 87
    assert seen == [(0, 87), (44, 87), (85, 87), (87, 87)]  # a chunk ends with each picture


def test_a_conversation_goes_on_in_its_cache(model: Model) -> None:
    cache = model.make_cache()
    first = decoded(model, ONE, 5, cache=cache)
    longer = ONE + first + [7, 8] + OTHER
    rest = cache.reuse(longer)
    assert len(rest) == len(longer) - len(ONE) - 4 or len(rest) == len(longer) - len(ONE) - 5
    assert decoded(model, rest, 9, cache=cache) == decoded(model, longer, 9)


def test_a_prompt_that_has_lost_its_media_is_refused(model: Model) -> None:
    for lost in ([*ONE], mx.array(ONE), np.array(ONE)):
        with pytest.raises(RequestError, match="without its media"):
            decoded(model, lost, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [20, 44, 47])
def test_a_file_continues_without_the_towers(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    cache = model.make_cache("long")
    decoded(model, ONE[:length], 1, cache=cache)
    save_prompt_cache(tmp_path / "kept", cache, model, TOKENIZER)
    expected = decoded(model, ONE, 12, cache=model.make_cache("long"))
    loaded = load_prompt_cache(tmp_path / "kept", model, TOKENIZER)
    assert (loaded.keys, loaded.mode, loaded.adapter) == (cache.keys, cache.mode, cache.adapter)
    assert all(place.medium == absent(picture()) for place in loaded.places)
    assert len(loaded.reuse(OTHER)) == len(OTHER) - 3
    loaded = load_prompt_cache(tmp_path / "kept", model, TOKENIZER)
    if length >= 44:  # else the rest of the picture is still to read
        monkeypatch.setattr(Model, "encode", lambda *_: pytest.fail("a tower ran"))
    assert decoded(model, loaded.reuse(ONE), 12, cache=loaded) == expected


def test_a_file_without_the_media_does_not_cross_the_boundary_unless_they_are_given(
    model: Model, tmp_path: Path
) -> None:
    cache, new = model.make_cache(), [9] * 20
    decoded(model, ONE, 1, cache=cache)
    save_prompt_cache(tmp_path / "kept", cache, model, TOKENIZER)
    loaded = load_prompt_cache(tmp_path / "kept", model, TOKENIZER)
    with pytest.raises(RequestError, match="must be run again under the long RoPE table"):
        decoded(model, new, 1, cache=loaded)
    expected = decoded(model, ONE + new, 5)
    assert decoded(model, loaded.reuse(ONE + new), 5, cache=loaded) == expected


@pytest.mark.parametrize(
    "media",
    [
        '[[3,0,41,"image",41,"ab"]]',  # no SHA-256
        '[[3,0,41,"film",41,"%s"]]',
        '[[3,0,42,"image",41,"%s"]]',
        '[[30,0,41,"image",41,"%s"]]',  # past the end
        '[[3,0,9,"image",41,"%s"],[5,0,9,"image",41,"%s"]]',  # overlap
        '[[3,0,true,"image",41,"%s"]]',
        "[3]",
        "7",
        "[",
    ],
)
def test_forged_media_of_a_file_are_refused(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, media: str
) -> None:
    from phi4_mlx.generation import prompt_cache_content

    cache = model.make_cache()
    decoded(model, ONE, 1, cache=cache)
    forged = media.replace("%s", "ab" * 32)
    monkeypatch.setattr(prompt_cache_content.json, "dumps", _forging(prompt_cache_content.json.dumps, forged))
    save_prompt_cache(tmp_path / "kept", cache, model, TOKENIZER)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="is not a prompt cache of this model") as refused:
        load_prompt_cache(tmp_path / "kept", model, TOKENIZER)
    assert "\n" not in str(refused.value)


def _forging(dumps: Any, forged: str) -> Any:
    """`json.dumps` that writes something else in place of media."""
    media = [[3, 0, 41, "image", 41, picture().digest]]
    return lambda value, **options: forged if value == media else dumps(value, **options)


def test_a_file_with_media_is_refused_by_another_adapter_of_the_mode(model: Model, tmp_path: Path) -> None:
    cache = model.make_cache()
    decoded(model, ONE, 1, cache=cache)
    save_prompt_cache(tmp_path / "kept", cache, model, TOKENIZER)
    other = make_tiny_multimodal()
    other.adapters.add("vision", lambda: _other_adapter(other))
    with pytest.raises(CheckpointError, match="with another adapter"):
        load_prompt_cache(tmp_path / "kept", other, TOKENIZER)


def test_a_file_under_an_adapter_by_name_goes_on_under_it(model: Model, tmp_path: Path) -> None:
    cache, prompt = model.make_cache(), [*TEXT, 7, 8]
    model.adapters.add("mine", _other_adapter(model))
    cache.adapter = "mine"
    expected = decoded(model, prompt, 8, cache=cache)
    save_prompt_cache(tmp_path / "kept", cache, model, TOKENIZER)
    loaded = load_prompt_cache(tmp_path / "kept", model, TOKENIZER)
    assert loaded.adapter == "mine" and decoded(model, loaded.reuse(prompt), 8, cache=loaded) == expected
    model.adapters.remove("mine")
    with pytest.raises(CheckpointError, match=r"of this model: adapter 'mine' is unknown; this model has vision"):
        load_prompt_cache(tmp_path / "kept", model, TOKENIZER)


def _other_adapter(model: Model) -> Any:
    from phi4_mlx.adapters.folder import Adapter

    path = "model.layers.0.self_attn.o_proj"
    width = model.config.hidden_size
    tensors = {f"{path}.lora_a": mx.ones((width, 2)), f"{path}.lora_b": mx.ones((2, width))}
    return Adapter("lora", 1.0, 0.0, tensors, "a test")
