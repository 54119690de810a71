"""Values that the APIs share: errors, events, token counts, the order of tool results."""

from __future__ import annotations

import json
import math

import pytest

from phi4_mlx.server.apis.wire import (
    Call,
    End,
    Usage,
    WireError,
    error_body,
    finite,
    ignored_header,
    in_call_order,
    json_bytes,
    logprobs_json,
    new_id,
    sse,
    token_text,
)
from phi4_mlx.server.engine.protocol import TokenLogprob


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "invalid_request_error"),
        (415, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (501, "server_error"),
        (503, "overloaded_error"),
    ],
)
def test_an_error_has_openais_shape(status: int, kind: str) -> None:
    error = WireError(status, "n must be smaller", "n", "too_many")
    assert error_body(error) == {
        "error": {"message": "n must be smaller", "type": kind, "param": "n", "code": "too_many"}
    }
    assert str(error) == "n must be smaller"


def test_an_error_is_of_limited_length() -> None:
    error = WireError(400, "x" * 33_000_000, "y" * 100_000)
    assert len(error.message) == len(str(error)) == 2_000 and error.message.endswith("x...")
    assert len(json_bytes(error_body(error))) < 4_200


def test_the_header_of_ignored_paths_is_a_line_of_ascii() -> None:
    assert ignored_header(["a", "b[0].c"]) == "a, b[0].c"
    assert ignored_header(["tool 'é\r\nx: y'"]) == "tool '???x: y'"
    long = ignored_header(f"field_{n}" for n in range(1_000))
    assert len(long) <= 1_005 and long.startswith("field_0, ") and long.endswith(", ...")


def test_an_event_is_framed() -> None:
    assert sse({"text": "é\n\n"}) == b'data: {"text":"\xc3\xa9\\n\\n"}\n\n'
    assert sse({}, "ping") == b"event: ping\ndata: {}\n\n"


@pytest.mark.parametrize("text", ["plain", "é😀", "\r\n\x00\x0b\x1c", "a\x85b\u2028c\u2029d", "\ud83d", "x\udc00é"])
def test_json_is_utf8_on_one_line_and_says_the_same(text: str) -> None:
    data = json_bytes({"text": text, text: [text]})
    assert json.loads(data.decode()) == {"text": text, text: [text]}
    assert len(data.decode().splitlines()) == 1


def test_a_prompt_counts_once_for_all_its_answers() -> None:
    ends = [
        End(0, prompt_tokens=10, cached_tokens=0, answer_tokens=1),
        End(1, prompt_tokens=10, cached_tokens=9, answer_tokens=2),  # left by the first answer
        End(2, prompt_tokens=7, cached_tokens=6, answer_tokens=3),
        End(3, prompt_tokens=7, cached_tokens=4, answer_tokens=4),
    ]
    assert Usage.of(ends, 2) == Usage(17, 4, 10)
    assert Usage.of(reversed(ends), 2) == Usage(17, 4, 10)
    assert Usage.of([], 1) == Usage(0, 0, 0)
    assert Usage(17, 4, 10).openai() == {
        "prompt_tokens": 17,
        "completion_tokens": 10,
        "total_tokens": 27,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_tokens_are_shown_as_text_or_bytes() -> None:
    assert token_text("é".encode()) == "é"
    assert token_text(b"\xc3") == "bytes:\\xc3"
    token = TokenLogprob(b"a", -0.5, ((b"a", -0.5), (b"\xff", -math.inf)))
    assert logprobs_json([token]) == [
        {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -0.5, "bytes": [97]},
                {"token": "bytes:\\xff", "logprob": -9999.0, "bytes": [255]},
            ],
        }
    ]
    assert finite(math.nan) == finite(-math.inf) == -9999.0


def test_ids_differ_and_cannot_be_guessed() -> None:
    ids = {new_id("call_") for _ in range(100)}
    assert len(ids) == 100
    assert all(it.startswith("call_") and len(it) == 29 for it in ids)


def test_a_calls_arguments_are_json() -> None:
    assert Call("1", "f", {"city": "Köln", "n": [1, None]}).text == '{"city":"Köln","n":[1,null]}'


def test_results_have_the_order_of_their_calls() -> None:
    def asked(*ids: str) -> dict:
        return {"role": "assistant", "content": "", "tool_calls": [{"id": it} for it in ids]}

    def told(call_id: str) -> dict:
        return {"role": "tool", "tool_call_id": call_id, "content": call_id}

    user = {"role": "user", "content": "x"}
    given = [user, asked("a", "b", "c"), told("?"), told("c"), told("a"), told("b"), user, asked("c", "a"), told("a")]
    wanted = [user, asked("a", "b", "c"), told("a"), told("b"), told("c"), told("?"), user, asked("c", "a"), told("a")]
    assert in_call_order(given) == wanted
    assert in_call_order([*given, told("c")]) == [*wanted[:-1], told("c"), told("a")]
    assert in_call_order([]) == []
