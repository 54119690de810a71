"""Prompts with media: places, keys and modes through slices, sums and pickles."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable

import pytest

from phi4_mlx.tokens.prompt import AbsentMedium, Mode, Place, Prompt, absent, slots
from tests.media import clip, picture, prompt_of

ONE, OTHER = AbsentMedium("image", 5, "ab" * 32), AbsentMedium("image", 5, "cd" * 32)
SOUND = AbsentMedium("audio", 3, "ef" * 32)
PROMPT = prompt_of([1, 2], ONE, [7], SOUND, OTHER, [8])


def test_every_slice_keeps_ids_and_keys_and_the_slices_add_up() -> None:
    for start in range(len(PROMPT) + 1):
        for end in range(start, len(PROMPT) + 1):
            part = PROMPT[start:end]
            assert [*part] == [*PROMPT][start:end] and part.keys == PROMPT.keys[start:end]
            whole = PROMPT[:start] + part + PROMPT[end:]
            assert whole == PROMPT and whole.places == PROMPT.places


def test_keys_tell_media_apart_where_ids_do_not() -> None:
    other = prompt_of([1, 2], OTHER, [7], SOUND, ONE, [8])
    assert [*other] == [*PROMPT] and other != PROMPT and other == [*PROMPT]
    assert len({*PROMPT.keys}) == len(PROMPT)
    assert [key for key in PROMPT.keys if key >= 0] == [1, 2, 7, 8] and all(key >= -(2**63) for key in PROMPT.keys)
    assert prompt_of(ONE).keys == prompt_of([1], ONE).keys[1:]  # the same at any position


def test_keys_need_all_of_the_digest() -> None:
    """A key from the first or the last bytes alone would make two of these equal."""
    digests = ["ab" * 32, "ab" * 31 + "ac", "ac" + "ab" * 31, "ab" * 16 + "ac" + "ab" * 15]
    keys = {key for digest in digests for key in slots(AbsentMedium("image", 50, digest), 9).keys}
    assert len(keys) == 4 * 50


def test_a_prompt_is_copied_and_pickled_with_its_media() -> None:
    for twin in (PROMPT.copy(), copy.copy(PROMPT), copy.deepcopy(PROMPT), pickle.loads(pickle.dumps(PROMPT))):
        assert type(twin) is Prompt and twin == PROMPT and twin.places == PROMPT.places
    with_pixels = prompt_of([1], picture(), clip())
    there = pickle.loads(pickle.dumps(with_pixels))
    assert there == with_pixels and there.media[0].digest == picture().digest and there.mode is Mode.VISION_SPEECH


def test_ids_are_taken_from_the_end_and_appended() -> None:
    prompt = PROMPT.copy()
    for length in range(len(PROMPT) - 1, -1, -1):
        assert prompt.pop() == PROMPT[length] and prompt == PROMPT[:length]
        grown = prompt.copy()
        grown.append(5)
        assert grown.keys == [*PROMPT.keys[:length], 5]  # an id in place of a slot is an id
    prompt += PROMPT
    prompt += [3]
    assert type(prompt) is Prompt and prompt.keys == [*PROMPT.keys, 3]
    prompt.clear()
    assert prompt == [] and not prompt.places
    plain = [1]
    plain += PROMPT  # a plain list has lost the media
    assert type(plain) is list and type([1, *PROMPT]) is list


@pytest.mark.parametrize(
    "change",
    [
        lambda prompt: prompt.insert(0, 9),
        lambda prompt: prompt.remove(1),
        lambda prompt: prompt.pop(0),
        lambda prompt: prompt.reverse(),
        lambda prompt: prompt.sort(),
        lambda prompt: operator.imul(prompt, 2),
        lambda prompt: operator.setitem(prompt, slice(0, 1), [8, 9]),
        lambda prompt: operator.delitem(prompt, slice(None, None, 2)),
    ],
)
def test_a_change_that_media_would_not_follow_is_refused(change: Callable[[Prompt], object]) -> None:
    prompt = PROMPT.copy()
    with pytest.raises(ValueError, match="at its end only"):
        change(prompt)
    assert prompt == PROMPT
    change(Prompt([1, 2, 3]))


@pytest.mark.parametrize(
    ("media", "mode", "adapter", "projection"),
    [
        ((), Mode.LANGUAGE, None, "speech"),
        ((ONE,), Mode.VISION, "vision", "vision"),
        ((SOUND,), Mode.SPEECH, "speech", "speech"),
        ((SOUND, ONE), Mode.VISION_SPEECH, "vision", "vision"),
    ],
)
def test_the_media_decide_the_mode(
    media: tuple[AbsentMedium, ...], mode: Mode, adapter: str | None, projection: str
) -> None:
    assert Mode.of(media) is mode is prompt_of(*media).mode
    assert (mode.adapter, mode.projection) == (adapter, projection)
    assert Mode([*Mode].index(mode)) is mode and Mode(mode.value) is mode


def test_a_mode_that_does_not_exist_is_refused() -> None:
    for value in (4, -1, "sound", None):
        with pytest.raises(ValueError, match="is not a valid Mode"):
            Mode(value)


def test_parts_of_one_medium_are_one_place_again_and_those_of_two_are_not() -> None:
    twice = prompt_of(ONE, ONE)
    assert [(place.start, place.count) for place in twice.places] == [(0, 5), (5, 5)]
    assert Prompt([9] * 5, [Place(0, ONE, 0, 2), Place(2, ONE, 2, 3)]).places == (Place(0, ONE),)
    assert absent(picture()) == absent(picture()) != absent(picture(1))
