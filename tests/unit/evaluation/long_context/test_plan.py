"""A run asks each kind in each language at each length; every beginning of its questions is a fair sample."""

from __future__ import annotations

from collections import Counter

from phi4_mlx.evaluation.long_context.language import CODES, DEMO
from phi4_mlx.evaluation.long_context.plan import DEPTHS, answer_room, languages, places
from phi4_mlx.evaluation.long_context.problem import KINDS
from tests.conftest import Demo

LENGTHS = (512, 1024, 2048)


def test_chosen_languages_fill_the_whole_grid() -> None:
    found = places(languages(["de", "ja", "de"]), LENGTHS, DEPTHS, True, 0)
    cells = {(place.language.code, place.kind, place.length, place.depth) for place in found}
    assert len(cells) == len(found) == 2 * len(KINDS) * len(LENGTHS) * len(DEPTHS)
    assert len({place.id for place in found}) == len(found)


def test_all_languages_together_fill_the_grid() -> None:
    found = places(languages([]), LENGTHS, DEPTHS, False, 0)
    assert len(found) == len(CODES) * len(KINDS) * len(LENGTHS)
    cells = Counter((place.kind, place.length, place.depth) for place in found)
    assert len(cells) == len(KINDS) * len(LENGTHS) * len(DEPTHS) and min(cells.values()) >= 4
    by_language = Counter((place.language.code, place.depth) for place in found)
    assert min(by_language.values()) >= 3 and len(by_language) == len(CODES) * len(DEPTHS)
    forms = Counter((place.kind, place.form) for place in found)
    assert min(forms.values()) >= len(LENGTHS) * len(CODES) // 4


def test_the_beginning_is_a_fair_sample_that_a_seed_fixes() -> None:
    found = places(languages([]), LENGTHS, DEPTHS, False, 0)
    assert found == places(languages([]), LENGTHS, DEPTHS, False, 0) != places(languages([]), LENGTHS, DEPTHS, False, 1)
    first = found[:100]
    assert len({place.kind for place in first}) == len(KINDS) and len({place.length for place in first}) == 3
    assert len({place.language.code for place in first}) > 15


def test_problems_depend_on_place_and_seed() -> None:
    one, two = places(languages(["en"]), LENGTHS, DEPTHS, True, 0)[:2]
    assert one.problem(0) == one.problem(0) != one.problem(1)
    assert one.problem(0) != two.problem(0)


def test_answers_have_room_for_their_values(demo: Demo) -> None:
    tokenizer = demo[1]
    for code in (*CODES, DEMO):
        spoken = languages([code])
        room = answer_room(spoken, tokenizer)
        for place in places(spoken, [512], DEPTHS, True, 0):
            truth = ", ".join(place.problem(0).truths)
            assert 32 + len(tokenizer.encode(truth)) <= room <= 320
