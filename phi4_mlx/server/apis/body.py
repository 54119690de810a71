"""Readers of a request's JSON: each names its field, the value and the limit when it refuses, and never guesses.

Limits are checked where a field is read, before anything is made of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from phi4_mlx.errors import RequestError
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.apis.wire import WireError
from phi4_mlx.terminal.limits import MAX_TOKENS_LIMIT
from phi4_mlx.tools.declarations import MAX_PROPERTIES, MAX_TOOLS, check_tools

D = TypeVar("D")

ANSWERS_LIMIT = 8  # n: answers to one prompt
MESSAGES_LIMIT = 10_000
STOPS_LIMIT = 16
STOP_CHARS_LIMIT = 1_000
TOP_LOGPROBS_LIMIT = 20
BIAS_ENTRIES_LIMIT = 1_024
TEMPERATURE_LIMIT = 2.0
PENALTY_LIMIT = 2.0
TOP_K_LIMIT = 2**31 - 1
NAME_CHARS_LIMIT = 256  # of a model, a tool, an id
DEPTH_LIMIT = 200  # of the body; arguments and schemas nest, and Python's own stack ends at 1,000
SHOWN_CHARS = 60  # of a value that an error quotes
SCHEMA_CHARS_LIMIT = 65_536  # of a schema, a tool, a pattern or a grammar, as JSON
PARTS_LIMIT = 1_000  # of one message
CHOICES_LIMIT = 1_000

TEXT_PARTS = ("text", "input_text", "output_text")


def shown(value: Any) -> str:
    """A value as an error quotes it, on one line and short."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return repr(value if len(value) <= SHOWN_CHARS else value[:SHOWN_CHARS] + "...")
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of over 30 digits"  # Python itself refuses to write one of over 4,300
    if isinstance(value, (int, float)):
        return f"{value}"
    return f"a list of {len(value)}" if isinstance(value, list) else "an object"


class Fields:
    """An object of the body, read field by field; null is the same as absent.

    Raises:
        WireError: what is read is of another type or outside its limits; names the field, the value and the limit.
    """

    def __init__(self, value: Any, path: str = "") -> None:
        self.path = path
        if not isinstance(value, dict):
            raise WireError(400, f"{path or 'the body'} must be a JSON object, not {shown(value)}", path or None)
        self.values: dict[str, Any] = value

    def where(self, name: str) -> str:
        """The path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raises the error that says what is wrong with a field."""
        raise WireError(400, f"{self.where(name)} {why}", self.where(name))

    def get(self, name: str) -> Any:
        """A field as it stands."""
        return self.values.get(name)

    def has(self, name: str) -> bool:
        """Whether a field is there, and not null."""
        return self.values.get(name) is not None

    def need(self, *names: str) -> None:
        """Refuses a body without these."""
        for name in names:
            if not self.has(name):
                self.refuse(name, "is missing")

    def forbid(self, why: str, *names: str) -> None:
        """Refuses a body that asks for what is not done."""
        for name in names:
            if self.get(name) not in (None, False, "", [], {}):
                self.refuse(name, f"is not supported here: {why}")

    def text(self, name: str, default: D, least: int = 0, most: int | None = None) -> str | D:
        """A string of `least` to `most` characters."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self.refuse(name, f"must be text, not {shown(value)}")
        if len(value) < least:
            self.refuse(name, "must not be empty")
        if most is not None and len(value) > most:
            self.refuse(name, f"must be at most {most:,} characters, not {len(value):,}")
        return value

    def number(self, name: str, default: D, low: float, high: float) -> float | D:
        """A number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            self.refuse(name, f"must be a number from {low:g} to {high:g}, not {shown(value)}")
        return float(value)

    def whole(self, name: str, default: D, low: int, high: int) -> int | D:
        """A whole number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            self.refuse(name, f"must be a whole number from {low:,} to {high:,}, not {shown(value)}")
        return int(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, f"must be true or false, not {shown(value)}")
        return value

    def items(self, name: str, most: int, least: int = 0) -> list[Any]:
        """A list of `least` to `most` values; empty if absent."""
        value = [] if self.get(name) is None else self.get(name)
        if not isinstance(value, list):
            self.refuse(name, f"must be a list, not {shown(value)}")
        if not least <= len(value) <= most:
            self.refuse(name, f"must hold {least:,} to {most:,} values, not {len(value):,}")
        return value

    def child(self, name: str) -> Fields:
        """An object; an empty one if absent."""
        return Fields(self.get(name) if self.has(name) else {}, self.where(name))

    def children(self, name: str, most: int, least: int = 0) -> list[Fields]:
        """A list of objects."""
        return [Fields(it, f"{self.where(name)}[{i}]") for i, it in enumerate(self.items(name, most, least))]

    def one_of(self, name: str, known: Sequence[str], default: str | None = None) -> str:
        """One of some words."""
        value = default if self.get(name) is None else self.get(name)
        if value not in known:
            self.refuse(name, f"must be one of {', '.join(known)}, not {shown(value)}")
        return str(value)


def read_body(body: Any) -> Fields:
    """The top of a body, known to be sound: no half characters, no NaN, no bottomless nesting."""
    check_json(body, "the body")
    return Fields(body)


def check_json(value: Any, what: str) -> None:
    """Raises WireError if JSON holds half a surrogate pair, NaN or infinity, or nests too deep."""
    layer, depth = [value], 0
    while layer:
        if depth > DEPTH_LIMIT:
            raise WireError(400, f"{what} nests deeper than {DEPTH_LIMIT} levels")
        below: list[Any] = []
        for each in layer:
            if isinstance(each, dict):
                below.extend(each)
                below.extend(each.values())
            elif isinstance(each, list):
                below.extend(each)
            elif isinstance(each, str):
                try:
                    each.encode()
                except UnicodeEncodeError:
                    raise WireError(400, f"{what} holds half a surrogate pair: {shown(each)}") from None
            elif isinstance(each, float) and not math.isfinite(each):
                raise WireError(400, f"{what} holds {each}, which is no JSON number")
        layer, depth = below, depth + 1


def read_sampling(fields: Fields, vocabulary: int) -> Sampling:
    """How tokens are drawn; OpenAI's fields, and `top_k`, `min_p` and `repetition_penalty`, in every API."""
    if fields.has("top_p") and fields.number("top_p", 1.0, 0, 1) == 0:
        fields.refuse("top_p", "must be over 0, and at most 1; temperature 0 takes the likeliest token")
    seed = fields.whole("seed", None, -(2**63), 2**64 - 1)
    return Sampling(
        temp=fields.number("temperature", 1.0, 0, TEMPERATURE_LIMIT),
        top_p=fields.number("top_p", 1.0, 0, 1),
        min_p=fields.number("min_p", 0.0, 0, 1),
        top_k=max(0, fields.whole("top_k", 0, -1, TOP_K_LIMIT)),  # some clients write -1 for all
        seed=None if seed is None else seed % 2**64,
        repetition_penalty=fields.number("repetition_penalty", None, 0.01, 100),
        presence_penalty=fields.number("presence_penalty", None, -PENALTY_LIMIT, PENALTY_LIMIT) or None,
        frequency_penalty=fields.number("frequency_penalty", None, -PENALTY_LIMIT, PENALTY_LIMIT) or None,
        logit_bias=_logit_bias(fields.child("logit_bias"), vocabulary),
    )


def _logit_bias(biases: Fields, vocabulary: int) -> dict[int, float]:
    if len(biases.values) > BIAS_ENTRIES_LIMIT:
        raise WireError(400, f"logit_bias must hold at most {BIAS_ENTRIES_LIMIT:,} tokens, not {len(biases.values):,}")
    for token in biases.values:
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) < vocabulary):
            raise WireError(400, f"logit_bias names token {shown(token)}; ids go from 0 to {vocabulary - 1:,}")
    return {int(token): biases.number(token, 0.0, -100, 100) for token in biases.values}


def read_stop(fields: Fields, name: str = "stop") -> tuple[str, ...]:
    """Stop strings: one, or a list."""
    if isinstance(fields.get(name), str):
        fields = Fields({name: [fields.get(name)]}, fields.path)
    for each in fields.items(name, STOPS_LIMIT):
        if not isinstance(each, str) or not 1 <= len(each) <= STOP_CHARS_LIMIT:
            fields.refuse(name, f"must be texts of 1 to {STOP_CHARS_LIMIT:,} characters, not {shown(each)}")
    return tuple(fields.items(name, STOPS_LIMIT))


def read_model(fields: Fields) -> str:
    """The name of the model."""
    fields.need("model")
    return fields.text("model", "", 1, NAME_CHARS_LIMIT)


def read_max_tokens(fields: Fields, name: str = "max_tokens") -> int | None:
    """The longest answer; None for as long as fits."""
    return fields.whole(name, None, 1, MAX_TOKENS_LIMIT)


def read_text(fields: Fields, name: str = "content", default: D | None = None) -> str | D | None:
    """Text, or a list of text parts, joined.

    Args:
        fields: the message, or another holder of content.
        name: of the field.
        default: for an absent one.
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
        part.refuse("type", f"is {shown(kind)}; this model reads text alone")
    part.need("text")
    return part.text("text", "")


def read_arguments(fields: Fields, name: str = "arguments") -> str:
    """The arguments of an earlier tool call: an object, written as JSON."""
    text = fields.text(name, "") or "{}"  # some clients write nothing for no arguments
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        fields.refuse(name, f"must be an object written as JSON, not {shown(text)}")
    check_json(value, fields.where(name))
    Fields(value, fields.where(name))
    return text


def tool_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call of a conversation, in OpenAI's form."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def read_tool(fields: Fields, schema: str = "parameters") -> dict[str, Any]:
    """A tool in OpenAI's form.

    Args:
        fields: what has its name, its description and its schema.
        schema: the name of the schema's field.
    """
    fields.need("name")
    function: dict[str, Any] = {"name": fields.text("name", "", 1, NAME_CHARS_LIMIT)}
    if function["name"] in ("none", "auto", "required"):
        fields.refuse("name", f"must not be {function['name']!r}, which means something else as tool_choice")
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


def read_tools(fields: Fields, kind: str = "function") -> list[Fields]:
    """The tools of a body, each known to be a function: others would need what this server does not have."""
    tools = fields.children("tools", MAX_TOOLS)
    for tool in tools:
        tool.one_of("type", (kind,), kind)
    return tools


def read_tool_choice(fields: Fields, tools: list[dict[str, Any]], choice: str) -> str:
    """`choice` as `Ask` has it, if it fits the tools.

    Args:
        fields: the body.
        tools: those that were read.
        choice: "none", "auto", "required", or a name.
    """
    names = [tool["function"]["name"] for tool in tools]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        fields.refuse("tools", f"has two tools called {shown(twice)}")
    if not tools and choice not in ("none", "auto"):
        fields.refuse("tool_choice", "asks for a call, but there are no tools")
    if choice not in ("none", "auto", "required", *names):
        fields.refuse("tool_choice", f"names {shown(choice)}, which is not among the tools")
    return choice if tools else "none"


def read_schema(fields: Fields, name: str) -> dict[str, Any]:
    """A JSON schema, of bounded size, that refers to nothing outside itself."""
    schema = Fields(fields.get(name), fields.where(name)).values
    size = len(json.dumps(schema, ensure_ascii=False))
    if size > SCHEMA_CHARS_LIMIT:
        fields.refuse(name, f"must be at most {SCHEMA_CHARS_LIMIT:,} characters of JSON, not {size:,}")
    left: list[Any] = [schema]
    properties = 0
    while left:
        each = left.pop()
        if isinstance(each, dict):
            reference = each.get("$ref", each.get("$dynamicRef"))
            if isinstance(reference, str) and not reference.startswith("#"):
                fields.refuse(name, f"refers to {shown(reference)}; nothing is fetched, only #... is followed")
            below = each.get("properties")
            properties += len(below) if isinstance(below, dict) else 0
            left.extend(each.values())
        elif isinstance(each, list):
            left.extend(each)
    if properties > MAX_PROPERTIES:
        fields.refuse(name, f"must have at most {MAX_PROPERTIES} properties, not {properties:,}")
    return schema


def read_response_format(fields: Fields, name: str = "response_format") -> tuple[Any, ...] | None:
    """What an answer must obey, as `Ask` has it.

    Beside OpenAI's text, json_object and json_schema, whose schema may also stand in the format itself as Responses
    has it, there are {"type": "regex", "pattern"}, {"type": "choice", "choices"} and {"type": "grammar", "grammar"}.
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
        for each in given.items("choices", CHOICES_LIMIT, 1):
            if not isinstance(each, str) or not 1 <= len(each) <= STOP_CHARS_LIMIT:
                given.refuse("choices", f"must be texts of 1 to {STOP_CHARS_LIMIT:,} characters, not {shown(each)}")
        return (kind, tuple(given.get("choices")))
    source = "pattern" if kind == "regex" else "grammar"
    given.need(source)
    return (kind, given.text(source, "", 1, SCHEMA_CHARS_LIMIT))
