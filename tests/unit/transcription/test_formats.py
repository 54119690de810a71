"""Transcripts in the five formats."""

from __future__ import annotations

import json

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.transcription.formats import FORMATS, Segment, render
from phi4_mlx.transcription.tasks import language_name

SEGMENTS = [Segment(0.2, 3.25, "Hello there."), Segment(3661.9996, 3663.0, "One <b> & two\n\n--> end")]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("text", "Hello there. One <b> & two\n\n--> end\n"),
        (
            "srt",
            "1\n00:00:00,200 --> 00:00:03,250\nHello there.\n\n"
            "2\n01:01:02,000 --> 01:01:03,000\nOne <b> & two -> end\n\n",
        ),
        (
            "vtt",
            "WEBVTT\n\n00:00:00.200 --> 00:00:03.250\nHello there.\n\n"
            "01:01:02.000 --> 01:01:03.000\nOne &lt;b&gt; &amp; two -&gt; end\n\n",
        ),
    ],
)
def test_texts(form, expected):
    assert render(SEGMENTS, form, duration=4000.0) == expected


def test_json():
    assert json.loads(render(SEGMENTS, "json", duration=1.0)) == {"text": "Hello there. One <b> & two\n\n--> end"}
    assert json.loads(render(SEGMENTS[:1], "verbose_json", duration=4.0, language="German")) == {
        "task": "transcribe",
        "language": "german",
        "duration": 4.0,
        "text": "Hello there.",
        "segments": [{"id": 0, "start": 0.2, "end": 3.25, "text": "Hello there."}],
    }


@pytest.mark.parametrize("form", FORMATS)
def test_silence_has_a_transcript_in_every_format(form):
    text = render([], form, duration=2.0)
    assert text == {"text": "\n", "srt": "", "vtt": "WEBVTT\n\n"}.get(form, text)
    if "json" in form:
        assert json.loads(text)["text"] == ""


def test_languages_without_spaces_have_none_between_segments():
    segments = [Segment(0, 1, "你好。"), Segment(1, 2, "再见。"), Segment(2, 3, "Bye.")]
    assert json.loads(render(segments, "json", duration=3.0))["text"] == "你好。再见。 Bye."


@pytest.mark.parametrize("given", ["de", "German", " GERMAN "])
def test_languages_have_codes_and_names(given):
    assert language_name(given) == "German"


@pytest.mark.parametrize("given", ["", "klingon", "de-AT"])
def test_other_languages_are_refused_with_those_that_are_known(given):
    with pytest.raises(RequestError, match=r"German \(de\)"):
        language_name(given)
