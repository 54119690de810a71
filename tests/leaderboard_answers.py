"""Right answers of the leaderboard, written as a model that is right would write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phi4_mlx.evaluation.tools.leaderboard import LANGUAGES, Case
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.json_text import json_text
from phi4_mlx.tools.markup import CALLS_CLOSE, CALLS_OPEN

LEFT_OUT = object()
COLLECTIONS = {
    "ArrayList": ("new ArrayList<Object>(Arrays.asList(", "))"), "Array": ("new Object[]{", "}"), "array": ("[", "]"),
}  # fmt: skip


def right_calls(case: Case) -> list[ToolCall]:
    """The first right value of each argument; those that may only be left out are left out."""
    return [ToolCall(name, _arguments(case, name, values)) for call in case.truth for name, values in call.items()]


def _arguments(case: Case, name: str, values: dict[str, list[Any]]) -> JsonObject:
    (function,) = (each for each in case.functions if each["name"] == name)
    schemas, language = function["parameters"]["properties"], LANGUAGES.get(case.category, "python")
    found = {}
    for argument, options in values.items():
        if (value := _first(options)) is not LEFT_OUT:
            schema = schemas.get(argument, {})
            plain = language == "python"
            found[argument] = _plain(value) if plain else source(value, schema["type"], schema.get("items"), language)
    return found


def _first(options: list[Any]) -> Any:
    return next((each for each in options if each != ""), LEFT_OUT)


def _plain(value: Any) -> Any:
    """A value of which the leaderboard lists right values one level down, in objects."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        firsts = {key: _first(options) for key, options in value.items()}
        return {key: each for key, each in firsts.items() if each is not LEFT_OUT}
    return value


def source(value: Any, kind: str, items: Any, language: str) -> Any:
    """A value as source text in Java or JavaScript; a string that stands for a collection is a variable's name."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value}{ {'long': 'L', 'float': 'f' if language == 'java' else '', 'Bigint': 'n'}.get(kind, '')}"
    if isinstance(value, list):
        item = (items or {}).get("type", "any")
        # The checker keeps the quotes of strings in an Array, and has no right answer with them.
        bare = str if kind == "Array" else ()
        parts = [each if isinstance(each, bare) else _literal(each, item, language) for each in value]
        opener, closer = COLLECTIONS[kind]
        return f"{opener}{', '.join(parts)}{closer}"
    if isinstance(value, dict):
        pairs = {key: _literal(each, "any", language) for key, each in _plain(value).items()}
        if language == "java":
            puts = " ".join(f'put("{key}", {each});' for key, each in pairs.items())
            return f"new HashMap<String, Object>() {{{{ {puts} }}}}"
        return "{" + ", ".join(f'"{key}": {each}' for key, each in pairs.items()) + "}"
    return value


def _literal(value: Any, kind: str, language: str) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(_literal(each, kind, language) for each in value)}]"
    return str(source(value, kind, None, language))


def written(calls: Sequence[ToolCall]) -> str:
    """Calls as the model writes them."""
    return CALLS_OPEN + json_text([{"name": call.name, "arguments": call.arguments} for call in calls]) + CALLS_CLOSE
