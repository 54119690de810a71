"""Sound is cut at its pauses, into parts of at most 40 s; silence makes no part."""

from __future__ import annotations

import numpy as np
import pytest

from phi4_mlx.transcription.parts import LONGEST_S, cut


def words(spans: list[tuple[float, float]], length: float, rate: int = 16000, noise: float = 0.0) -> np.ndarray:
    """Bursts of noise at the given seconds, each with short dips as consonants make them."""
    rng = np.random.default_rng(0)
    wave = noise * rng.normal(size=round(length * rate))
    for start, end in spans:
        first, last = round(start * rate), round(end * rate)
        wave[first:last] += 0.1 * rng.normal(size=last - first)
        for dip in np.arange(start + 0.2, end - 0.2, 0.25):
            wave[round(dip * rate) : round((dip + 0.08) * rate)] *= 0.01
    return wave


def speech(length: float, seed: int = 1) -> list[tuple[float, float]]:
    """Words of 0.3 to 3 s with pauses of 0.2 to 0.7 s."""
    rng, spans, place = np.random.default_rng(seed), [], 0.0
    while place < length - 4:
        start = place + rng.uniform(0.2, 0.7)
        place = start + rng.uniform(0.3, 3.0)
        spans.append((start, place))
    return spans


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_no_word_is_cut_and_none_is_lost(rate, noise):
    spans = speech(200)
    parts = list(cut([words(spans, 200, rate, noise)], rate))
    assert len(parts) >= 5
    for part in parts:
        assert len(part.samples) <= LONGEST_S * rate
        assert part.end - part.start == pytest.approx(len(part.samples) / rate)
    for start, end in spans:
        inside = [part for part in parts if part.start <= start + 0.02 and end <= part.end + 0.02]
        assert len(inside) == 1, (start, end)


def test_parts_do_not_depend_on_blocks():
    wave = words(speech(130), 130)
    whole = list(cut([wave], 16000))
    for size in (1000, 65536, 700_000):
        blocks = list(cut((wave[start : start + size] for start in range(0, len(wave), size)), 16000))
        assert [(part.start, part.end) for part in blocks] == [(part.start, part.end) for part in whole]
        for one, other in zip(blocks, whole, strict=True):
            np.testing.assert_array_equal(one.samples, other.samples)


def test_a_part_is_read_before_the_rest_of_the_sound():
    taken = 0

    def blocks():
        nonlocal taken
        while True:  # endless
            taken += 1
            yield words([(0.1, 0.9)], 1.0)

    parts = cut(blocks(), 16000)
    for number in range(1, 4):
        next(parts)
        assert taken <= number * LONGEST_S + 2


@pytest.mark.parametrize(
    "wave",
    [
        np.zeros(16000 * 100),
        np.zeros(0),
        np.full(16000 * 50, 0.3),
        1e-5 * np.random.default_rng(0).normal(size=700_000),
    ],
    ids=["zeros", "nothing", "a constant", "hiss at -100 dB"],
)
def test_silence_makes_no_part(wave):
    assert list(cut([wave], 16000)) == []


def test_silence_around_speech_is_left_out():
    (part,) = cut([words([(20.0, 21.0)], 35.0)], 16000)
    assert (part.start, part.end) == pytest.approx((19.8, 21.2), abs=0.03)
    assert part.audio().tokens == -(-138 // 8)


def test_sound_without_a_pause_is_cut_where_it_is_softest():
    rng = np.random.default_rng(0)
    wave = 0.1 * rng.normal(size=16000 * 60)
    wave[16000 * 33 : 16000 * 33 + 1600] *= 0.1  # 0.1 s
    first, second = cut([wave], 16000)
    assert first.end == pytest.approx(33.05, abs=0.05) == second.start


def test_a_long_pause_late_in_a_part_is_preferred_to_a_longer_one_early() -> None:
    spans = [(0.1, 3.0), (3.9, 20.0), (20.3, 30.0), (30.6, 60.0)]  # pauses of 0.9, 0.3 and 0.6 s
    first, second = cut([words(spans, 60.0)], 16000)
    assert first.end == pytest.approx(30.2, abs=0.1) and second.start == pytest.approx(30.4, abs=0.1)


def test_a_steady_tone_is_cut_too():
    wave = 0.1 * np.sin(np.arange(16000 * 100) * 0.1)
    parts = list(cut([wave], 16000))
    assert sum(part.end - part.start for part in parts) == pytest.approx(100)
    assert all(part.end - part.start <= LONGEST_S for part in parts)
