"""`python -m phi4_mlx.server` as a process: the official clients, and clients that disconnect."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from phi4_mlx.checkpoint import load
from phi4_mlx.generation.stream import generate
from phi4_mlx.tokens.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.e2e.server_process import CITY, ENDLESS, HANG_S, HELLO, Server, audited, send, until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with audited(tmp_path_factory.mktemp("audit"), "--decode-concurrency", "8", "--max-queue", "8") as it:
        yield it


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none is needed", max_retries=0, timeout=HANG_S)


@pytest.fixture
def claude(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none is needed", max_retries=0, timeout=HANG_S)


# -- the clients -----------------------------------------------------------------------------------------------------

WEATHER: list[Any] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the weather in Paris?"},
]
TOOL: dict[str, Any] = {"name": "get_weather", "description": "The weather of a city", "parameters": CITY}
TOOLS: list[Any] = [{"type": "function", "function": TOOL}]
TAG = load_tokenizer(ROOT / "phi4_mlx" / "demo").control_ids["<|tool_call|>"]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_chat_is_what_generate_says(client: openai.OpenAI) -> None:
    model, tokenizer = load("demo")
    whole = generate(model, tokenizer, tokenizer.apply_chat_template(HELLO), max_tokens=60)
    answer = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, max_tokens=60)
    assert answer.choices[0].message.content == whole and answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.total_tokens > answer.usage.completion_tokens > 0
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=HELLO,
            temperature=0,
            max_tokens=60,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert len(chunks) > 4 and chunks[-1].usage == answer.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}  # type: ignore[union-attr]
    )


def test_several_answers_with_stops_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, n=3, seed=5, max_tokens=20, stop=["."], logprobs=True, top_logprobs=2
    )
    again = client.chat.completions.create(model="demo", messages=HELLO, n=3, seed=5, max_tokens=20, stop=["."])
    assert [it.message.content for it in answer.choices] == [it.message.content for it in again.choices]
    assert all("." not in (it.message.content or "") for it in answer.choices)
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content
        assert all(len(it.top_logprobs) == 2 and it.logprob <= 0 for it in choice.logprobs.content)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools_are_called(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": WEATHER,
        "tools": TOOLS,
        "tool_choice": choice,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
    call = answer.message.tool_calls[0].function
    assert call.name == "get_weather" and list(json.loads(call.arguments)) == ["city"]
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed and streamed[0].function.arguments == call.arguments
    # The model continues from the result.
    result = {"role": "tool", "tool_call_id": answer.message.tool_calls[0].id, "content": '{"degrees": 7}'}
    asked |= {"messages": [*WEATHER, answer.message, result], "tool_choice": "none"}
    said = client.chat.completions.create(**asked).choices[0]
    assert said.message.content and not said.message.tool_calls


def test_an_answer_obeys_its_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="demo", messages=HELLO, response_format=form, seed=seed, max_tokens=40
        )
        person = json.loads(answer.choices[0].message.content or "")
        assert list(person) == ["name", "age"] and isinstance(person["age"], int)
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, response_format={"type": "json_object"}, max_tokens=60
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_an_answer_beside_tools_calls_one_or_obeys_its_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    asked: dict[str, Any] = {"model": "demo", "messages": WEATHER, "tools": TOOLS, "response_format": form}
    told = set()
    for choice, bias in [("auto", -100), ("auto", 100), ("required", -100), ("none", 100)]:
        answer = client.chat.completions.create(
            **asked, tool_choice=choice, logit_bias={str(TAG): bias}, seed=1, max_tokens=300
        ).choices[0]
        if answer.finish_reason == "tool_calls":
            assert answer.message.tool_calls and not answer.message.content
            assert list(json.loads(answer.message.tool_calls[0].function.arguments)) == ["city"]
        else:
            assert not answer.message.tool_calls
            assert list(json.loads(answer.message.content or "")) == ["name", "age"]
        told.add((choice, answer.finish_reason))
    assert told == {("auto", "stop"), ("auto", "tool_calls"), ("required", "tool_calls"), ("none", "stop")}
    tool: Any = {"type": "function", **TOOL}
    response = client.responses.create(
        model="demo", input="Say hello.", tools=[tool], text={"format": {"type": "json_object"}}, max_output_tokens=60,
        extra_body={"logit_bias": {str(TAG): -100}},
    )  # fmt: skip
    assert isinstance(json.loads(response.output_text), dict)


def test_completions_and_responses(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=["One two", "Three"], max_tokens=5, temperature=0, n=2)
    assert len(answer.choices) == 4 and answer.choices[0].text == answer.choices[1].text
    streamed = client.completions.create(model="demo", prompt="One two", max_tokens=5, temperature=0, stream=True)
    assert "".join(it.choices[0].text for it in streamed) == answer.choices[0].text
    response = client.responses.create(model="demo", input="Say hello.", temperature=0)
    chat = client.chat.completions.create(model="demo", messages=HELLO, temperature=0)
    assert response.output_text == chat.choices[0].message.content and response.status == "completed"
    with client.responses.stream(model="demo", input="Say hello.", temperature=0) as stream:
        assert "".join(it.delta for it in stream if it.type == "response.output_text.delta") == response.output_text


def test_anthropics_client(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 60, "messages": HELLO, "extra_body": {"temperature": 0}}
    message = claude.messages.create(**asked)
    chat = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, max_tokens=60)
    assert message.content[0].type == "text" and message.content[0].text == chat.choices[0].message.content
    assert message.stop_reason == "end_turn"
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == message.content[0].text
    tool: Any = {"name": "get_weather", "input_schema": CITY}
    asked |= {"messages": WEATHER[1:], "tools": [tool], "tool_choice": {"type": "tool", "name": "get_weather"}}
    called = claude.messages.create(**asked)
    assert called.stop_reason == "tool_use" and called.content[-1].type == "tool_use"
    assert list(called.content[-1].input) == ["city"]
    counted = claude.messages.count_tokens(model="demo", messages=HELLO)
    assert counted.input_tokens == (chat.usage.prompt_tokens if chat.usage else None)


def test_mistakes_are_the_clients_exceptions(
    server: Server, client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="demo", messages=HELLO, temperature=3)
    assert "temperature" in str(bad.value) and bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt=[7] * 5_000)
    assert long.value.code == "context_length_exceeded" and "4096" in str(long.value)
    with pytest.raises(openai.InternalServerError) as none:
        client.embeddings.create(model="demo", input="x")
    assert none.value.status_code == 501 and none.value.response.json()["error"]["message"]
    assert none.value.response.headers["x-should-retry"] == "false"
    assert claude.messages.create(model="none such", max_tokens=5, messages=HELLO).model == "demo"
    with pytest.raises(anthropic.BadRequestError) as bad_too:
        claude.messages.create(model="demo", max_tokens=5, messages=[])
    assert bad_too.value.response.json()["type"] == "error"


def test_models_health_metrics_and_the_page(server: Server, client: openai.OpenAI) -> None:
    assert [it.id for it in client.models.list()] == ["demo"] and client.models.retrieve("demo").id == "demo"
    assert (client.models.retrieve("demo").model_extra or {}) == {
        "context_length": 4096,
        "kind": "demo",
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
    }
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    health = server.get("/health")
    assert health.status_code == 200 and health.json() == {"status": "ok", "restarts": 0, "jobs": 0}
    before = server.metrics()
    drawn = server.ask().json()["usage"]["completion_tokens"]
    after = server.metrics()
    assert after["drawn_tokens_total"] - before["drawn_tokens_total"] == drawn > 0 and after["up"] == 1
    assert after["prefilled_tokens_total"] - before["prefilled_tokens_total"] <= 12
    route = 'answers_total{route="/v1/chat/completions",status="200"}'
    assert after[route] == before.get(route, 0) + 1
    page = server.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert server.get("/nowhere").status_code == 404 and server.get("/v1/chat/completions").status_code == 405
    assert server.post("/health", {}).json()["error"]["type"] == "invalid_request_error"


# -- clients that disconnect -------------------------------------------------------------------------------------------


def drawn_tokens(server: Server) -> float:
    return server.metrics()["drawn_tokens_total"]


def test_a_stream_that_is_closed_is_cancelled(server: Server, client: openai.OpenAI) -> None:
    before = drawn_tokens(server)
    stream = client.chat.completions.create(model="demo", messages=HELLO, stream=True, **ENDLESS)
    for count, _ in enumerate(stream):
        if count == 3:
            break
    assert server.metrics()["answers_under_way"] == 1
    stream.close()
    until(server.idle)
    after = drawn_tokens(server)
    assert after - before < ENDLESS["max_tokens"] / 2
    time.sleep(0.2)
    assert drawn_tokens(server) == after


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_client_that_disconnects_before_its_answer_is_cancelled(server: Server, path: str) -> None:
    body = {"model": "demo", "messages": HELLO, **ENDLESS}
    if path == "/v1/responses":
        limit = {"max_output_tokens": ENDLESS["max_tokens"]}
        body = {"model": "demo", "input": "Say hello.", "logit_bias": ENDLESS["logit_bias"], **limit}
    before = drawn_tokens(server)
    with server.raw() as connection:
        send(connection, path, json.dumps(body))
        until(lambda: server.metrics()["answers_under_way"] == 1)
    until(server.idle)
    assert drawn_tokens(server) - before < ENDLESS["max_tokens"] / 2


def test_a_long_prompt_whose_client_disconnects_is_not_prefilled(server: Server) -> None:
    ids = [n % 900 for n in range(4000)]
    before = server.metrics()["prefilled_tokens_total"]
    with server.raw() as connection:
        send(connection, "/v1/completions", json.dumps({"model": "demo", "prompt": ids, "max_tokens": 50}))
        until(lambda: server.metrics()["jobs"] == 1)
    assert server.ask().status_code == 200
    until(server.idle)
    assert server.metrics()["prefilled_tokens_total"] - before < len(ids)


def test_a_prompt_that_is_too_long_is_refused_before_its_prefill(server: Server) -> None:
    before = server.metrics()["prefilled_tokens_total"]
    answer = server.post("/v1/completions", {"model": "demo", "prompt": [7] * 200_000})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    took = []
    for count in (20_000, 200_000):
        start = time.monotonic()
        assert server.ask("hello " * count).json()["error"]["code"] == "context_length_exceeded"
        took.append(time.monotonic() - start)
    assert took[1] < 40 * took[0]  # encoding a text takes linear time; quadratic would be 100
    assert server.metrics()["prefilled_tokens_total"] == before


def test_more_requests_than_may_wait_are_answered_429(server: Server, client: openai.OpenAI) -> None:
    connections = [server.raw() for _ in range(2)]
    for connection in connections:
        send(connection, "/v1/completions", json.dumps({"model": "demo", "prompt": "x", "n": 8, **ENDLESS}))
    until(lambda: server.metrics()["jobs"] == 16)
    refused = server.ask()
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="demo", messages=HELLO)
    assert server.get("/health").status_code == 200
    for connection in connections:
        connection.close()
    until(server.idle)
    assert server.ask().status_code == 200
