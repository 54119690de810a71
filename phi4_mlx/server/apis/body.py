"""Readers for the fields that several APIs share: sampling, stop strings, content, tools and response formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.apis.fields import Fields, shown
from phi4_mlx.server.apis.wire import WireError
from phi4_mlx.server.limits import (
    API_PENALTY_LIMIT,
    API_TEMPERATURE_LIMIT,
    BIAS_ENTRIES_LIMIT,
    BIAS_LIMIT,
    BRACKETS_LIMIT,
    CHOICES_LIMIT,
    NAME_CHARS_LIMIT,
    PRIORITY_LIMIT,
    SCHEMA_CHARS_LIMIT,
    STOP_CHARS_LIMIT,
    STOPS_LIMIT,
)
from phi4_mlx.terminal.limits import MAX_TOKENS_LIMIT, REPETITION_PENALTY_RANGE, SEED_LIMIT, TOP_K_LIMIT
from phi4_mlx.tools.declarations import check_tools

LEAST_TOP_P = 1e-6
TOOL_MODES = ("none", "auto", "required")  # values of tool_choice that do not name a tool


API_SAMPLING = Sampling(temp=1.0)  # OpenAI's defaults


def read_sampling(fields: Fields, vocabulary: int, defaults: Sampling = API_SAMPLING) -> Sampling:
    """The sampling settings: OpenAI's fields, and in every API also `top_k`, `min_p` and `repetition_penalty`."""
    top_p = fields.number("top_p", defaults.top_p, 0, 1)
    if top_p < LEAST_TOP_P:  # the likeliest token alone; a float32 may not hold less
        fields.ignored.add(fields.where("top_p"))
        top_p = LEAST_TOP_P
    seed = fields.integer("seed", None, -(2**63), SEED_LIMIT)
    return Sampling(
        temp=fields.number("temperature", defaults.temp, 0, API_TEMPERATURE_LIMIT),
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
    """Stop strings: one, or a list; empty ones are left out."""
    given = fields.get(name)
    given = [given] if isinstance(given, str) else given
    if isinstance(given, list) and "" in given:
        if given != [""]:
            fields.ignored.add(fields.where(name))
        given = [each for each in given if each != ""]
    return Fields({name: given}, fields.path).texts(name, STOPS_LIMIT, STOP_CHARS_LIMIT)


def read_model(fields: Fields) -> str:
    """The name of the model; "" for none."""
    return fields.text("model", "", 0, NAME_CHARS_LIMIT)


def read_max_tokens(fields: Fields, name: str = "max_tokens") -> int | None:
    """The longest answer in tokens; None for as many as fit, which clients also write as 0 or -1."""
    value = fields.get(name)
    if type(value) is int and not 1 <= value <= MAX_TOKENS_LIMIT:
        return None
    return fields.integer(name, None, 1, MAX_TOKENS_LIMIT)


def read_priority(fields: Fields) -> int:
    """The priority: requests of a lower number are served first, as in vLLM."""
    return fields.integer("priority", 0, -PRIORITY_LIMIT, PRIORITY_LIMIT)


def tool_call(call_id: str, name: str, arguments: str) -> JsonObject:
    """A tool call in OpenAI's form."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def read_tools(
    fields: Fields, kind: str = "function", schema: str = "parameters"
) -> tuple[list[JsonObject], list[str]]:
    """The tools of a body that can be called, in OpenAI's form, and the names of the others.

    Only tools of the type `kind` can be called: this server runs no tools of its own. The others are left out, as is
    a second tool of the same name.

    Args:
        fields: the body.
        kind: the type of the tools that can be called.
        schema: as for `read_tool`.
    """
    tools, others = dict[str, JsonObject](), []
    for given in fields.children("tools", BRACKETS_LIMIT):
        if given.text("type", kind) != kind:
            others.append(given.get("name") if isinstance(given.get("name"), str) else given.get("type"))
            given.ignore()
            continue
        tool = read_tool(given, schema)
        if tools.setdefault(tool["function"]["name"], tool) is not tool:
            given.ignore()
    return list(tools.values()), others


def read_tool(fields: Fields, schema: str = "parameters") -> JsonObject:
    """A tool in OpenAI's form.

    Args:
        fields: the object with the tool's name, description and schema, or with that object as its field "function":
            clients mix up the forms of chat completions and responses.
        schema: the name of the schema's field.
    """
    if fields.has("function"):
        fields = fields.child("function")
    function: JsonObject = {"name": fields.needed_name("name")}
    if function["name"] in TOOL_MODES:
        fields.refuse("name", f"must not be {function['name']!r}, which has another meaning as tool_choice")
    if fields.has("description"):
        function["description"] = fields.text("description", "", 0, SCHEMA_CHARS_LIMIT)
    if fields.has("strict") and isinstance(fields.get("strict"), bool):
        function["strict"] = fields.get("strict")
    if fields.has(schema):
        given = read_schema(fields, schema)
        parameters = {key: value for key, value in given.items() if value is not None}
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
    if choice is None or choice == {}:
        return "auto"
    if isinstance(choice, str):
        return "required" if choice == "any" else fields.one_of("tool_choice", TOOL_MODES)
    given = fields.child("tool_choice")
    kind = given.text("type", "")
    if kind == "function":
        return (given if function is None else given.child(function)).needed_name("name")
    if kind == "allowed_tools":
        holder = given.child(kind) if given.has(kind) else given
        return holder.one_of("mode", TOOL_MODES, "auto")
    if not kind:
        given.refuse("type", "is missing")
    fields.ignore("tool_choice")  # a tool that another server runs
    return "auto"


def check_tool_choice(fields: Fields, tools: Sequence[JsonObject], choice: str, others: Sequence[str] = ()) -> str:
    """The tool choice for an `Ask`, after a check against the tools.

    Args:
        fields: the body.
        tools: its tools, in OpenAI's form.
        choice: a word of `TOOL_MODES`, or the name of a tool.
        others: the names of the tools that were left out; a choice of one of them becomes "auto".
    """
    names = [tool["function"]["name"] for tool in tools]
    if choice not in names and (choice in others or (choice == "required" and others and not tools)):
        fields.ignore("tool_choice")
        choice = "auto"
    if not tools and choice not in ("none", "auto"):
        fields.refuse("tool_choice", "asks for a call, but there are no tools")
    if choice not in (*TOOL_MODES, *names):
        fields.refuse("tool_choice", f"names {shown(choice)}, which is not among the tools")
    return choice if tools else "none"


def read_schema(fields: Fields, name: str) -> JsonObject:
    """A JSON schema, which the compiler of grammars checks."""
    return Fields(fields.get(name), fields.where(name)).values


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
    if kind == "json_object" and not given.has("schema"):
        return (kind,)
    if kind in ("json_object", "json_schema"):
        holder = _schema_holder(given)
        for said in ("type", "name", "description"):
            holder.get(said)
        holder.need("schema")
        return ("json_schema", read_schema(holder, "schema"))
    if kind == "choice":
        given.need("choices")
        return (kind, given.texts("choices", CHOICES_LIMIT, STOP_CHARS_LIMIT, 1))
    source = "pattern" if kind == "regex" else "grammar"
    return (kind, given.needed_text(source, 1, SCHEMA_CHARS_LIMIT))


def demands_format(fields: Fields, name: str = "response_format") -> bool:
    """True if the format is demanded as it is: "strict" beside its schema is true."""
    return fields.has(name) and _schema_holder(fields.child(name)).get("strict") is True


def _schema_holder(given: Fields) -> Fields:
    """The object with the schema: the format itself, or its field json_schema."""
    return given.child("json_schema") if given.has("json_schema") else given
