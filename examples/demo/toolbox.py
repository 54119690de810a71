"""Tools that a prompt may declare: a few kinds, with many names, arguments and descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import words
from draw import Draw, held_out

# kind -> (stems of its name, lists of argument names, descriptions)
KINDS: dict[str, tuple[list[str], list[list[str]], list[str]]] = {
    "calculate": (
        ["calculate", "calculator", "calc", "compute", "evaluate", "arithmetic", "math", "solve", "reckon", "do_math"],
        [["expression"], ["expr"], ["formula"], ["input"], ["problem"], ["query"], ["text"], ["sum"], ["exp"],
         ["calculation"]],
        [
            "Evaluates an arithmetic expression.", "Computes an arithmetic expression.", "Does arithmetic.",
            "A calculator.", "Calculates a result.", "Works out sums, products and quotients.",
            "Evaluate a mathematical expression.",
        ],
    ),
    "convert": (
        ["convert", "convert_units", "unit_converter", "conversion", "units", "change_units", "measure", "converter"],
        [["value", "from", "to"], ["amount", "from_unit", "to_unit"], ["number", "source", "target"],
         ["quantity", "unit", "into"], ["x", "start", "goal"], ["value", "from_unit", "to_unit"]],
        ["Converts units.", "Converts a value from one unit to another.", "Unit conversion.", "Convert between units.",
         "Changes a quantity into another unit.", "Convert a measurement to another unit."],
    ),
    "weather": (
        ["weather", "get_weather", "forecast", "current_weather", "sky"],
        [["city"], ["place"], ["location"], ["town"], ["where"]],
        [
            "The weather in a city.", "Gets the current weather.", "Looks up the weather.",
            "Weather forecast for a place.",
        ],
    ),
    "clock": (
        ["clock", "get_time", "time_in", "current_time", "local_time"],
        [["city"], ["place"], ["location"], ["town"], ["where"]],
        [
            "The time in a city.", "Gets the local time.", "Tells what time it is somewhere.",
            "Looks up the current time.",
        ],
    ),
}  # fmt: skip
# The kind of a tool comes first in its name, where a causal model reads it first. The made-up word {w} can only be
# copied; entries with it are repeated, so that they are drawn more often.
SUFFIXES = [
    "{}_tool", "{}2", "{}_v{d}", "{}_now", "{}_service", "{}_api", "{}_{d}", "{}_function", "{}_helper", "{}_plus",
    "{}_local", "{}_{w}", "{}_{w}", "{}_{w}_{d}", "{}_{w}", "{}_{w}",
]
ARGUMENT_NOTES = {
    "expression": "what to evaluate", "value": "the number", "city": "the name of the city",
    "from": "unit to convert from", "to": "unit to convert to",
    "a": "first number", "b": "second number", "amount": "how much",
}  # fmt: skip


@dataclass(frozen=True)
class Tool:
    """One declared tool.

    Attributes:
        kind: a key of `KINDS`.
        name: its name in the declaration.
        arguments: the names of its arguments.
        declaration: the tool in the format of the chat completions API.
    """

    kind: str
    name: str
    arguments: tuple[str, ...]
    declaration: dict[str, Any]

    def call(self, *values: Any) -> dict[str, Any]:
        """The assistant's message that calls it."""
        arguments = dict(zip(self.arguments, values, strict=True))
        function = {"name": self.name, "arguments": arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def declare(draw: Draw, kind: str) -> Tool:
    """A tool of a kind, with a name from this stream's part."""
    stems, signatures, descriptions = KINDS[kind]
    name = draw.one(stems)  # a plain stem may be in training and in held-out prompts
    if draw.held_out or draw.chance(0.7):
        slots = {"d": draw.one("23456789"), "w": draw.made_up().lower()}
        while held_out(name := draw.one(SUFFIXES).format(draw.one(stems), **slots)) != draw.held_out:
            pass
    arguments = tuple(signatures[int(draw.rng.random() * len(signatures))])
    notes = draw.chance(0.3)
    properties: dict[str, Any] = {}
    for i, argument in enumerate(arguments):
        properties[argument] = {"type": "number" if kind == "convert" and i == 0 else "string"}
        if notes and argument in ARGUMENT_NOTES:
            properties[argument]["description"] = ARGUMENT_NOTES[argument]
    function = {
        "name": name,
        "description": draw.one(descriptions),
        "parameters": {"type": "object", "properties": properties, "required": list(arguments)},
    }
    return Tool(kind, name, arguments, {"type": "function", "function": function})


def toolbox(draw: Draw) -> list[Tool]:
    """One to three tools of different kinds, at least one for arithmetic or conversion."""
    kinds = list(KINDS)
    draw.rng.shuffle(kinds)
    kinds = kinds[: 1 + int(draw.rng.random() * 3)]
    if not {"calculate", "convert"} & set(kinds):
        kinds[0] = draw.one(["calculate", "convert"])
    return [declare(draw, kind) for kind in kinds]


def number(text: str) -> int | float:
    """The JSON number of a text."""
    return float(text) if "." in text else int(text)


def shown(value: float) -> str:
    """A result as a tool prints it: at most four decimals, without trailing zeros."""
    text = f"{value:.4f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def unit_pair(draw: Draw) -> tuple[str, str, float, float]:
    """(source, target, size of each in base units) of one dimension; sizes are 0 for temperatures."""
    dimension = words.DIMENSIONS[int(draw.rng.random() * 6) % 5]
    if draw.chance(0.15):
        names = list(words.TEMPERATURE)
        draw.rng.shuffle(names)
        return names[0], names[1], 0.0, 0.0
    units = list(dimension)
    draw.rng.shuffle(units)
    source, target = units[:2]
    return draw.one(source), draw.one(target), dimension[source], dimension[target]


def convert(value: float, source: str, target: str, source_size: float, target_size: float) -> float:
    """The value in the target unit; sizes as from `unit_pair`."""
    if source_size:
        return value * source_size / target_size
    kelvin = {"celsius": value + 273.15, "kelvin": value, "fahrenheit": (value - 32) / 1.8 + 273.15}[source]
    return {"celsius": kelvin - 273.15, "kelvin": kelvin, "fahrenheit": (kelvin - 273.15) * 1.8 + 32}[target]
