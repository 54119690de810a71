"""The demo's calculator and unit converter, with the formats of results that its training corpus has.

`questions.jsonl` is written by `python tests/bench/tools.py --write tests/data/evaluation/tools --count 12`.
"""

from __future__ import annotations

import ast
import operator

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
# Size of each unit in the base unit of its dimension. Source: examples/demo/words.py.
_SIZES = {
    "km": 1000.0, "kilometers": 1000.0, "kilometres": 1000.0, "m": 1.0, "meters": 1.0, "metres": 1.0, "cm": 0.01,
    "centimeters": 0.01, "miles": 1609.344, "mi": 1609.344, "feet": 0.3048, "ft": 0.3048, "inches": 0.0254,
    "in.": 0.0254, "yards": 0.9144, "yd": 0.9144, "kg": 1.0, "kilograms": 1.0, "kilos": 1.0, "g": 0.001, "grams": 0.001,
    "pounds": 0.45359237, "lb": 0.45359237, "lbs": 0.45359237, "ounces": 0.028349523, "oz": 0.028349523, "tons": 1000.0,
    "tonnes": 1000.0, "liters": 1.0, "litres": 1.0, "l": 1.0, "ml": 0.001, "milliliters": 0.001, "gallons": 3.785411784,
    "gal": 3.785411784, "cups": 0.2365882365, "pints": 0.473176473, "hours": 3600.0, "h": 3600.0, "minutes": 60.0,
    "min": 60.0, "seconds": 1.0, "s": 1.0, "days": 86400.0, "weeks": 604800.0, "km/h": 1.0, "kmh": 1.0, "mph": 1.609344,
    "m/s": 3.6, "knots": 1.852,
}  # fmt: skip
_TEMPERATURES = ("celsius", "fahrenheit", "kelvin")


def calculate(expression: str) -> str:
    """Evaluates sums, differences, products and quotients of numbers."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return float(node.value)
        raise ValueError(f"{expression!r} is not arithmetic")

    return _shown(value(ast.parse(expression, mode="eval").body))


def calculate_result(expression: str) -> str:
    return f'{{"result": {calculate(expression)}}}'


def calculate_result_dense(expression: str) -> str:
    return f'{{"result":{calculate(expression)}}}'


def calculate_value(expression: str) -> str:
    return f'{{"value": {calculate(expression)}}}'


def calculate_answer(expression: str) -> str:
    return f'{{"answer": {calculate(expression)}}}'


def convert(value: float, source: str, target: str) -> str:
    """Converts between units."""
    if source in _TEMPERATURES:
        kelvin = {"celsius": value + 273.15, "kelvin": value, "fahrenheit": (value - 32) / 1.8 + 273.15}[source]
        celsius = kelvin - 273.15
        return _shown({"celsius": celsius, "kelvin": kelvin, "fahrenheit": celsius * 1.8 + 32}[target])
    return _shown(value * _SIZES[source] / _SIZES[target])


def convert_result(value: float, source: str, target: str) -> str:
    return f'{{"result": {convert(value, source, target)}}}'


def convert_result_dense(value: float, source: str, target: str) -> str:
    return f'{{"result":{convert(value, source, target)}}}'


def convert_value(value: float, source: str, target: str) -> str:
    return f'{{"value": {convert(value, source, target)}}}'


def convert_answer(value: float, source: str, target: str) -> str:
    return f'{{"answer": {convert(value, source, target)}}}'


def _shown(value: float) -> str:
    """At most four decimals, without trailing zeros."""
    text = f"{value:.4f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
