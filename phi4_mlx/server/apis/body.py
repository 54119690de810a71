"""Readers for the fields that several APIs share: sampling, stop strings, content, tools and response formats."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.apis.fields import Fields, check_json, shown
from phi4_mlx.server.apis.wire import WireError
from phi4_mlx.server.limits import (
    API_PENALTY_LIMIT,
    API_TEMPERATURE_LIMIT,
    BIAS_ENTRIES_LIMIT,
    BIAS_LIMIT,
    CHOICES_LIMIT,
    PARTS_LIMIT,
    SCHEMA_CHARS_LIMIT,
    STOP_CHARS_LIMIT,
    STOPS_LIMIT,
)
from phi4_mlx.terminal.limits import MAX_TOKENS_LIMIT, REPETITION_PENALTY_RANGE, SEED_LIMIT, TOP_K_LIMIT
from phi4_mlx.tools.declarations import MAX_TOOLS_BYTES, check_tools

D = TypeVar("D")

TEXT_PARTS = ("text", "input_text", "output_text")
TOOL_MODES = ("none", "auto", "required")  # values of tool_choice that do not name a tool


def read_sampling(fields: Fields, vocabulary: int) -> Sampling:
    """The sampling settings: OpenAI's fields, and in every API also `top_k`, `min_p` and `repetition_penalty`."""
    top_p = fields.number("top_p", 1.0, 0, 1)
    if top_p == 0:
        fields.refuse("top_p", "must be over 0 and at most 1; for the likeliest token use temperature 0")
    seed = fields.integer("seed", None, -(2**63), SEED_LIMIT)
    return Sampling(
        temp=fields.number("temperature", 1.0, 0, API_TEMPERATURE_LIMIT),
        top_p=top_p,
        min_p=fields.number("min_p", 0.0, 0, 1),
        top_k=max(0, fields.integer("top_k", 0, -1, TOP_K_LIMIT)),  # some clients send -1 to keep all tokens
        seed=None if seed is None else seed % (SEED_LIMIT + 1),
        repetition_penalty=fields.number("repetition_penalty", None, *REPETITION_PENALTY_RANGE),
        presence_penalty=fields.number("presence_penalty", None, -API_PENALTY_LIMIT, API_PENALTY_LIMIT) or None,
        frequency_penalty=fields.number("frequency_penalty", None, -API_PENALTY_LIMIT, API_PENALTY_LIMIT) or None,
        logit_bias=_logit_bias(fields.child("logit_bias"), vocabulary),
    )


def _logit_bias(biases: Fields, vocabulary: int) -> dict[int, float]:
    if len(biases.values) > BIAS_ENTRIES_LIMIT:
        raise WireError(400, f"logit_bias must have at most {BIAS_ENTRIES_LIMIT:,} tokens, not {len(biases.values):,}")
    for token in biases.values:
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) < vocabulary):
            raise WireError(400, f"logit_bias names token {shown(token)}; ids go from 0 to {vocabulary - 1:,}")
    return {int(token): biases.number(token, 0.0, -BIAS_LIMIT, BIAS_LIMIT) for token in biases.values}


def read_stop(fields: Fields, name: str = "stop") -> tuple[str, ...]:
    """Stop strings: one, or a list."""
    if isinstance(fields.get(name), str):
        fields = Fields({name: [fields.get(name)]}, fields.path)
    return fields.texts(name, STOPS_LIMIT, STOP_CHARS_LIMIT)


def read_model(fields: Fields) -> str:
    """The name of the model."""
    return fields.needed_name("model")


def read_max_tokens(fields: Fields, name: str = "max_tokens") -> int | None:
    """The longest answer in tokens; None for as many as fit."""
    return fields.integer(name, None, 1, MAX_TOKENS_LIMIT)


def read_text(fields: Fields, name: str = "content", default: D | None = None) -> str | D | None:
    """The text of a field that is a string or a list of text parts; the parts are joined.

    Args:
        fields: the message, or another object with content.
        name: the field.
        default: the result if the field is absent.
    """
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        fields.refuse(name, f"must be text or a list of parts, not {shown(value)}")
    return "".join(map(_part_text, fields.children(name, PARTS_LIMIT)))


def _part_text(part: Fields) -> str:
    kind = part.text("type", "")
    if kind == "refusal":
        return part.text("refusal", "")
    if kind not in TEXT_PARTS:
        part.refuse("type", f"is {shown(kind)}; this model reads only text")
    return part.needed_text("text")


def read_arguments(fields: Fields, name: str = "arguments") -> str:
    """The arguments of an earlier tool call: a JSON object in a string."""
    text = fields.text(name, "") or "{}"  # some clients send an empty string for no arguments
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        fields.refuse(name, f"must be a JSON object in a string, not {shown(text)}")
    check_json(value, fields.where(name))
    Fields(value, fields.where(name))  # refuses any other type
    return text


def tool_call(call_id: str, name: str, arguments: str) -> JsonObject:
    """A tool call in OpenAI's form."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def read_tools(fields: Fields, kind: str = "function") -> list[Fields]:
    """The tools of a body; their only type is `kind`, because this server runs no tools of its own."""
    tools = fields.children("tools", MAX_TOOLS_BYTES)  # each takes more than one byte
    for tool in tools:
        tool.one_of("type", (kind,), kind)
    return tools


def read_tool(fields: Fields, schema: str = "parameters") -> JsonObject:
    """A tool in OpenAI's form.

    Args:
        fields: the object with the tool's name, description and schema.
        schema: the name of the schema's field.
    """
    function: JsonObject = {"name": fields.needed_name("name")}
    if function["name"] in TOOL_MODES:
        fields.refuse("name", f"must not be {function['name']!r}, which has another meaning as tool_choice")
    if fields.has("description"):
        function["description"] = fields.text("description", "", 0, SCHEMA_CHARS_LIMIT)
    if fields.has(schema):
        parameters = read_schema(fields, schema)
        # Without a type, `check_tools` would take "properties" for the name of an argument.
        function["parameters"] = {"type": "object", **parameters} if "properties" in parameters else parameters
    try:
        return check_tools([{"type": "function", "function": function}])[0]
    except RequestError as error:
        raise WireError(400, str(error), fields.path) from None


def read_tool_choice(fields: Fields, function: str | None = None) -> str:
    """OpenAI's tool_choice: a word of `TOOL_MODES`, or the name of a tool.

    Args:
        fields: the body.
        function: the field of tool_choice that contains the name; None if the name is in tool_choice itself.
    """
    choice = fields.get("tool_choice")
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        return fields.one_of("tool_choice", TOOL_MODES)
    given = fields.child("tool_choice")
    given.one_of("type", ("function",))
    return (given if function is None else given.child(function)).needed_name("name")


def check_tool_choice(fields: Fields, tools: Sequence[JsonObject], choice: str) -> str:
    """The tool choice for an `Ask`, after a check against the tools.

    Args:
        fields: the body.
        tools: its tools, in OpenAI's form.
        choice: a word of `TOOL_MODES`, or the name of a tool.
    """
    names = [tool["function"]["name"] for tool in tools]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        fields.refuse("tools", f"has two tools called {shown(twice)}")
    if not tools and choice not in ("none", "auto"):
        fields.refuse("tool_choice", "asks for a call, but there are no tools")
    if choice not in (*TOOL_MODES, *names):
        fields.refuse("tool_choice", f"names {shown(choice)}, which is not among the tools")
    return choice if tools else "none"


def read_schema(fields: Fields, name: str) -> JsonObject:
    """A JSON schema of limited size; the compiler of grammars checks the rest."""
    schema = Fields(fields.get(name), fields.where(name)).values
    size = len(json.dumps(schema, ensure_ascii=False))
    if size > SCHEMA_CHARS_LIMIT:
        fields.refuse(name, f"must be at most {SCHEMA_CHARS_LIMIT:,} characters of JSON, not {size:,}")
    return schema


def read_response_format(fields: Fields, name: str = "response_format") -> tuple[Any, ...] | None:
    """The format that an answer must follow, as in `Ask.response_format`.

    In addition to OpenAI's text, json_object and json_schema there are {"type": "regex", "pattern"},
    {"type": "choice", "choices"} and {"type": "grammar", "grammar"}. The schema may also be in the format itself, as
    in the Responses API.
    """
    if not fields.has(name):
        return None
    given = fields.child(name)
    kind = given.one_of("type", ("text", "json_object", "json_schema", "regex", "choice", "grammar"))
    if kind == "text":
        return None
    if kind == "json_object":
        return (kind,)
    if kind == "json_schema":
        holder = given.child("json_schema") if given.has("json_schema") else given
        holder.need("schema")
        return (kind, read_schema(holder, "schema"))
    if kind == "choice":
        given.need("choices")
        return (kind, given.texts("choices", CHOICES_LIMIT, STOP_CHARS_LIMIT, 1))
    source = "pattern" if kind == "regex" else "grammar"
    return (kind, given.needed_text(source, 1, SCHEMA_CHARS_LIMIT))
