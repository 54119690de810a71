"""Log-mel features against a plain float64 formulation, resampling against sound made at the new rate, tokens."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from phi4_mlx.tokens.media.audio import audio_of, read_audio
from phi4_mlx.tokens.media.log_mel import log_mel
from phi4_mlx.tokens.media.resample import resampled


def reference(wave: np.ndarray, rate: int) -> np.ndarray:
    """Features [T, 80], frame by frame and band by band, as facts about the published processor state them."""
    window, hop, fft = (400, 160, 512) if rate == 16_000 else (200, 80, 256)
    mel = 1127 * np.log(1 + np.arange(257) * 16_000 / 512 / 700)
    centres = np.linspace(0, 1127 * np.log(1 + 7690 / 700), 82)
    bank = np.zeros((257, 80))
    for band in range(80):
        left, centre, right = centres[band : band + 3]
        for number in range(1, 246):
            if left < mel[number] < right:
                bank[number, band] = 1 - abs(centre - mel[number]) / (centre - left)
    rows = []
    for start in range(0, len(wave) - window + 1, hop):
        frame = wave[start : start + window].astype(np.float64)
        previous = np.roll(frame, 1)
        previous[0] = frame[0]
        spectrum = np.fft.rfft((frame - 0.97 * previous) * 32768 * np.hamming(window), fft)
        if rate == 8_000:
            spectrum = np.concatenate([spectrum[:-1], np.zeros(129)])
        rows.append(np.log(np.maximum(np.abs(spectrum) ** 2 @ bank, 1.0)))
    return np.array(rows).reshape(-1, 80)


def blocks_of(wave: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (wave[start : start + size] for start in range(0, len(wave), size))


@pytest.mark.parametrize("rate", [8_000, 16_000])
@pytest.mark.parametrize("scale", [1.0, 1e-7], ids=["loud", "below the floor"])
def test_features_are_those_of_the_plain_formulation(rate: int, scale: float) -> None:
    rng = np.random.default_rng(0)
    wave = scale * np.sin(np.cumsum(rng.uniform(0, 1, 30_000))) * rng.uniform(0, 1, 30_000)
    features = read_audio((wave, rate)).features
    assert features.dtype == np.float32
    assert np.abs(features - reference(wave, rate)).max() <= 5e-6
    assert (features.max() == 0) == (scale < 1)


@pytest.mark.parametrize(
    ("samples", "frames", "tokens"), [(145_840, 910, 114), (400, 1, 1), (1520, 8, 1), (1680, 9, 2)]
)
def test_frames_and_tokens(samples: int, frames: int, tokens: int) -> None:
    audio = read_audio((np.zeros(samples), 16_000))
    assert audio.features.shape == (frames, 80) and audio.tokens == tokens
    assert audio.seconds == samples / 16_000


@pytest.mark.parametrize("size", [1, 399, 4096, 10**6])
def test_features_do_not_depend_on_blocks(size: int) -> None:
    wave = np.random.default_rng(0).normal(size=5000 if size == 1 else 200_000)
    blocks = np.concatenate(list(log_mel(blocks_of(wave, size), 16_000)))
    np.testing.assert_allclose(blocks, np.concatenate(list(log_mel([wave], 16_000))), atol=2e-6)


def test_messages_show_a_clip_in_a_few_words() -> None:
    assert repr(read_audio((np.zeros(16_000, np.float32), 16_000))) == "<sound of 1 s, 13 tokens>"


def test_the_digest_is_of_the_features_and_survives_pickling() -> None:
    wave = np.random.default_rng(0).normal(size=4000)
    audio = read_audio((wave, 16_000))
    assert pickle.loads(pickle.dumps(audio)).digest == audio.digest == read_audio((wave, 16_000)).digest
    assert len({audio.digest, read_audio((wave[::-1], 16_000)).digest, read_audio((wave, 8_000)).digest}) == 3
    assert read_audio(audio) is audio and audio.kind == "audio"


def signal(rate: int, alias: float | None) -> np.ndarray:
    """Sixty tones up to 5 kHz and a sweep, 2 s, faded in and out; `alias` Hz is a loud tone."""
    time = np.arange(2 * rate) / rate
    rng = np.random.default_rng(1)
    wave = 0.05 * np.sin(2 * np.pi * (300 * time + 400 * time**2))
    for hertz, phase in zip(rng.uniform(100, 5000, 60), rng.uniform(0, 6, 60), strict=True):
        wave += 0.01 * np.sin(2 * np.pi * hertz * time + phase)
    if alias is not None:
        wave += 0.3 * np.sin(2 * np.pi * alias * time)
    return wave * np.sin(np.pi * time / 2) ** 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "alias"),
    [
        (11_025, None), (12_000, None), (22_050, 10_000), (24_000, 10_000), (32_000, 9_000), (44_100, 12_000),
        (48_000, 20_000), (96_000, 8_400), (192_000, 60_000),
        (15_999, None), (44_101, 9_000), (47_952, 9_000),
    ],
)  # fmt: skip
def test_sound_of_any_rate_has_the_features_of_16_khz(rate: int, alias: float | None) -> None:
    native = read_audio((signal(16_000, None), 16_000)).features
    assert np.abs(read_audio((signal(rate, alias), rate)).features - native).max() <= 0.05


@pytest.mark.parametrize("size", [7, 50_000])
def test_resampling_does_not_depend_on_blocks(size: int) -> None:
    wave = np.random.default_rng(0).normal(size=2000 if size == 7 else 250_000)  # more than is computed at once
    for rate in (22_050, 48_000):
        whole = np.concatenate(list(resampled([wave], rate)[1]))
        parts = np.concatenate(list(resampled(blocks_of(wave, size), rate)[1]))
        assert len(whole) == -(-len(wave) * 16_000 // rate)
        np.testing.assert_allclose(parts, whole, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 2, 100, 1000])
@pytest.mark.parametrize("rate", [8_820, 44_100, 768_000])
def test_short_sounds_are_resampled_too(samples: int, rate: int) -> None:
    wave = np.full(samples, 0.25)
    (out,) = resampled([wave], rate)[1]
    assert len(out) == -(-samples * 16_000 // rate)
    np.testing.assert_allclose(out, 0.25)  # also at the edges: a constant stays one


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_memory_grows_by_the_features_alone(rate: int) -> None:
    block = np.random.default_rng(0).normal(size=rate)
    peaks, features = [], []
    for seconds in (20, 60):
        tracemalloc.start()
        new_rate, blocks = resampled((block for _ in range(seconds)), rate)
        audio = audio_of(blocks, new_rate, "the sound")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        features.append(audio.features.nbytes)
    assert peaks[1] - peaks[0] <= 2.2 * (features[1] - features[0]) + 2**20
