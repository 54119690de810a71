"""The multimodal model: rows of media in any chunks, adapters by mode, caches that know their media."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.models.multimodal import Model
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.tokens.prompt import Mode, Prompt, absent
from tests.conformance import recipe_multimodal as recipe
from tests.media import clip, picture, prompt_of
from tests.model_runs import close
from tests.tiny_multimodal import make_tiny_multimodal

BOUNDARY = recipe.BOUNDARY
TEXT = [490, 5, 6]
PROMPTS = {
    "vision": prompt_of(TEXT, picture(), [20, 21], [22]),
    "two": prompt_of(TEXT, picture(), [20], picture(1), [21, 22]),  # under the long table
    "speech": prompt_of(TEXT, clip(), [20, 21]),
    "both": prompt_of(TEXT, clip(), [20], picture(), [21, 22]),
    "media alone": prompt_of(picture()),
}


@pytest.fixture(scope="module")
def model() -> Model:
    return make_tiny_multimodal()


def whole(model: Model, prompt: Prompt) -> mx.array:
    """Logits [T, V] of a pass without a cache that the caller sees."""
    return model(mx.array([prompt]), media=prompt.media)[0]


def run(model: Model, prompt: Prompt, cache: PromptCache) -> mx.array:
    """Logits [T, V] of a prompt, or of the rest of it that a cache lacks."""
    ids = cache.admit(mx.array([prompt]), prompt.places)
    return model.logits(model.hidden(ids, cache)[:, -len(prompt) :])[0]


@pytest.mark.parametrize("size", [1, 5, 32, 96])
@pytest.mark.parametrize("name", PROMPTS)
def test_chunks_anywhere_equal_the_whole(model: Model, name: str, size: int) -> None:
    prompt, cache, logits = PROMPTS[name], model.make_cache(), []
    ids = cache.admit(mx.array([prompt]), prompt.places)
    for start in range(0, len(prompt), size):
        logits.append(model.logits(model.hidden(ids[:, start : start + size], cache)))
    assert close(mx.concatenate(logits, axis=1)[0], whole(model, prompt))
    assert (cache.keys, cache.mode, cache.adapter) == (prompt.keys, prompt.mode, prompt.mode.adapter)


def test_a_chunk_may_end_within_a_picture_and_the_next_call_goes_on(model: Model) -> None:
    prompt, cache = PROMPTS["two"], model.make_cache("long")
    first = model(mx.array([prompt[:10]]), cache, prompt.media[:1])
    second = model(mx.array([prompt[10:]]), cache, prompt.media[1:])
    assert cache.keys == prompt.keys
    assert close(mx.concatenate([first, second], axis=1)[0], whole(model, prompt))


@pytest.mark.parametrize("name", PROMPTS)
def test_slices_of_a_prompt_may_be_run_one_by_one(model: Model, name: str) -> None:
    """Each with the media of its slots, also those whose first slots were in the slice before."""
    prompt, cache, logits = PROMPTS[name], model.make_cache("long"), []
    for start in range(0, len(prompt), 7):
        part = prompt[start : start + 7]
        logits.append(model(mx.array([part]), cache, part.media))
    assert cache.keys == prompt.keys
    if cache.rerun_tokens == 0:
        fresh = model.make_cache("long")
        assert close(mx.concatenate(logits, axis=1)[0], run(model, prompt, fresh))


@pytest.mark.parametrize("name", ["vision", "both"])
def test_a_crossing_runs_everything_again_without_the_towers(
    model: Model, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, cache = PROMPTS[name], model.make_cache()
    run(model, prompt, cache)
    monkeypatch.setattr(Model, "encode", lambda *_: pytest.fail("a tower ran again"))
    new = [7] * (BOUNDARY + 1 - len(prompt))
    logits = run(model, Prompt(new), cache)
    assert cache.regime == "long" and cache.rerun_tokens == len(prompt)
    assert close(logits, whole(model, prompt + new)[-len(new) :])


def test_rows_are_kept_by_digest_and_projection(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = [], Model.encode

    def counted(self: Model, medium: Any, mode: Mode) -> mx.array:
        encoded.append((medium.kind, mode.projection))
        return encode(self, medium, mode)

    monkeypatch.setattr(Model, "encode", counted)
    sound, image = clip(7), picture(7)
    for media in ((sound,), (sound, image), (image,), (clip(7), picture(7)), (sound, sound)):
        whole(model, prompt_of(TEXT, *media, [9]))
    assert encoded == [("audio", "speech"), ("audio", "vision"), ("image", "vision")]
    monkeypatch.setattr("phi4_mlx.models.multimodal.MAX_ROWS", 41)
    whole(model, prompt_of(TEXT, picture(8), [9]))
    whole(model, prompt_of(TEXT, picture(7), [9]))  # the first picture's rows had to go
    assert encoded[3:] == [("image", "vision")] * 2


def test_the_first_picture_of_a_conversation_runs_the_text_again_under_its_adapter(model: Model) -> None:
    cache = model.make_cache()
    run(model, Prompt(TEXT), cache)
    assert cache.adapter is None and cache.mode is Mode.LANGUAGE
    question = prompt_of([8], picture(), [9])
    logits = run(model, question, cache)
    assert cache.rerun_tokens == len(TEXT) and (cache.adapter, cache.mode) == ("vision", Mode.VISION)
    assert close(logits, whole(model, Prompt(TEXT) + question)[-len(question) :])


def test_sound_behind_a_picture_keeps_the_cache_and_a_picture_behind_sound_does_not(model: Model) -> None:
    image, sound = prompt_of(TEXT, picture(), [9]), prompt_of(TEXT, clip(), [9])
    for first, second, rerun in ((image, prompt_of(clip(), [8]), 0), (sound, prompt_of(picture(), [8]), len(sound))):
        cache = model.make_cache("long")
        run(model, first, cache)
        logits = run(model, second, cache)
        assert cache.rerun_tokens == rerun and cache.mode is Mode.VISION_SPEECH
        fresh = model.make_cache("long")
        assert close(logits, run(model, first + second, fresh)[-len(second) :])


def test_a_picture_taken_back_leaves_a_cache_that_text_runs_again(model: Model) -> None:
    cache = model.make_cache()
    run(model, prompt_of(TEXT, picture(), [9]), cache)
    cache.trim(42)
    assert cache.offset == len(TEXT) and not cache.places and cache.mode is Mode.LANGUAGE
    logits = run(model, Prompt([9]), cache)
    assert cache.rerun_tokens == len(TEXT) and cache.adapter is None
    assert close(logits, whole(model, Prompt([*TEXT, 9]))[-1:])


@pytest.mark.parametrize("length", [0, 2, 3, 4, 20, 43, 44, 45, 46])
def test_prompts_share_what_their_keys_share(model: Model, length: int) -> None:
    """Fork, trim and reuse, also in the middle of a picture."""
    prompt = PROMPTS["vision"]
    cache = model.make_cache("long")
    run(model, prompt, cache)
    kept = min(length, len(prompt) - 1)
    fork = cache.fork(kept)
    assert fork.keys == prompt.keys[:kept] and fork.places == prompt[:kept].places
    cache.trim(cache.offset - kept)
    fresh = run(model, prompt, model.make_cache("long"))
    for each in (cache, fork):
        rest = each.reuse(prompt)
        assert isinstance(rest, Prompt) and len(rest) == len(prompt) - kept
        assert close(run(model, rest, each), fresh[-len(rest) :])


def test_two_pictures_of_one_size_with_the_same_words_share_no_slot(model: Model) -> None:
    one, other = (prompt_of(TEXT, picture(seed), [20, 21]) for seed in (0, 1))
    cache = model.make_cache()
    run(model, one, cache)
    rest = cache.reuse(other)
    assert [*one] == [*other] and len(rest) == len(other) - len(TEXT)
    assert close(run(model, rest, cache), whole(model, other)[-len(rest) :])
    assert len(cache.reuse(one)) == len(one) - len(TEXT) and len(cache.reuse(Prompt([*TEXT, 1]))) == 4


def test_a_cache_forgets_pixels_and_takes_them_from_a_prompt_that_has_them(model: Model) -> None:
    prompt, cache = PROMPTS["vision"], model.make_cache()
    run(model, prompt, cache)
    cache.forget_media()
    assert cache.keys == prompt.keys and cache.places[0].medium == absent(prompt.media[0])
    longer = prompt + [7] * BOUNDARY
    with pytest.raises(RequestError, match=r"must be run again under the long RoPE table.* of 41 tokens again"):
        run(model, longer[len(prompt) :], cache)
    assert cache.offset == len(prompt)  # nothing is lost
    rest = cache.reuse(longer)
    assert len(rest) == BOUNDARY and close(run(model, rest, cache), whole(model, longer)[-BOUNDARY:])
    with pytest.raises(RequestError, match="must be read again"):
        model.encode(absent(prompt.media[0]), Mode.VISION)


def test_slots_without_media_are_ids_like_others_in_a_pass_and_refused_in_a_plain_prompt(model: Model) -> None:
    ids = mx.array([[490, recipe.IMAGE_TOKEN, recipe.AUDIO_TOKEN, 5]])
    assert close(model(ids), model.logits(model.hidden(ids, embeddings=model.model.embed_tokens(ids))))
    with pytest.raises(RequestError, match=r"token 510, a slot of a picture or a clip, without its media"):
        model.check_ids([490, recipe.IMAGE_TOKEN, 5])
    model.check_ids(Prompt([490, recipe.IMAGE_TOKEN, 5]))  # drawn by the model
    model.check_ids(PROMPTS["both"])


@pytest.mark.parametrize(
    ("ids", "media", "reason"),
    [
        ([*TEXT, *[510] * 40, 9], (picture(),), "40 image slots and the media take 41"),
        ([*TEXT, *[510] * 42, 9], (picture(),), "42 image slots and the media take 41"),
        ([*TEXT, *[511] * 11, 9], (picture(),), "0 image slots and the media take 41"),
        ([*TEXT, *[511] * 11, *[510] * 41], (picture(),), "11 audio slots and the media take 0"),
        (TEXT, (clip(),), "0 audio slots and the media take 11"),
    ],
)
def test_media_that_do_not_fit_the_slots_are_refused(
    model: Model, ids: list[int], media: tuple[Any, ...], reason: str
) -> None:
    for cache in (None, model.make_cache()):
        with pytest.raises(RequestError, match=reason):
            model(mx.array([ids]), cache, media)
    with pytest.raises(RequestError, match="one sequence of ids, not with 2"):
        model(mx.array([ids, ids]), media=media)


def test_a_picture_for_other_crops_is_refused(model: Model) -> None:
    from phi4_mlx.tokens.media.image import Image

    other = Image(picture().padded, picture().content, recipe.CROP, 28)
    with pytest.raises(RequestError, match="crop_size 112 and patch_size 28; this model needs 112 and 14"):
        model.check_ids(prompt_of(TEXT, other))


def test_a_users_adapter_and_media_are_refused_in_one_line(model: Model) -> None:
    cache = model.make_cache()
    cache.adapter = "mine"
    with pytest.raises(RequestError, match="adapter 'mine' cannot be used with image input"):
        cache.admit(mx.array([PROMPTS["vision"]]), PROMPTS["vision"].places)


def test_a_text_model_refuses_media(tiny_model: Any) -> None:
    text = tiny_model()
    with pytest.raises(RequestError, match="reads only text"):
        text(mx.array([TEXT]), media=(picture(),))
    with pytest.raises(RequestError, match="has image input, and this model reads only text"):
        text.check_ids(PROMPTS["vision"])


def test_the_order_of_kinds_is_that_of_each_kind_alone(model: Model) -> None:
    """As in the reference, the first run of image slots takes the first picture, whatever sound is between."""
    prompt = PROMPTS["both"]
    turned = tuple(reversed(prompt.media))
    assert close(model(mx.array([prompt]), media=turned)[0], whole(model, prompt))


def test_other_weights_make_other_rows(model: Model) -> None:
    own, prompt = make_tiny_multimodal(), PROMPTS["vision"]
    before = whole(own, prompt)
    embed = own.vision
    own.update({"model": {"embed_tokens_extend": {"image_embed": {
        "global_img_feature_extensor": embed.global_img_feature_extensor + 9,
    }}}})  # fmt: skip
    assert not close(whole(own, prompt), before)


def test_media_need_a_cache_that_remembers_them(model: Model) -> None:
    with pytest.raises(RequestError, match=r"make it with model.make_cache\(\)"):
        model(mx.array([PROMPTS["vision"]]), [*model.make_cache()], PROMPTS["vision"].media)


def test_a_slot_is_never_run_by_a_compiled_step(model: Model) -> None:
    """One token a pass: embeddings of slots are rows, which a compiled step would not take."""
    prompt, cache = PROMPTS["speech"], model.make_cache()
    ids, logits = cache.admit(mx.array([prompt]), prompt.places), []
    for at in range(len(prompt)):
        logits.append(model.logits(model.hidden(ids[:, at : at + 1], cache)))
    assert close(mx.concatenate(logits, axis=1)[0], whole(model, prompt))
