"""An order for a grammar, as plain values that can be sent to the process that makes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.grammar import grammars
from phi4_mlx.grammar.apart import Refused
from phi4_mlx.grammar.grammars import Grammar, type_alone

_SLOW_KINDS = ("regex", "grammar")
_SLOW_KEYWORDS = ('"pattern"', '"patternProperties"', '"multipleOf"', '"allOf"')


@dataclass(frozen=True)
class Order:
    """The grammar of an answer: a format, calls of tools, or either.

    Attributes:
        format: ("json_object",), ("json_schema", schema), ("regex", pattern), ("choice", strings) or
            ("grammar", lark); None for none.
        strict: as for `grammars.json_schema`.
        tools: the tools that may be called; empty for none.
        choice: as for `grammars.tool_calls`.
        parallel: likewise.
    """

    format: Sequence[Any] | None = None
    strict: bool = True
    tools: Sequence[JsonObject] = ()
    choice: str | Mapping[str, Any] = "auto"
    parallel: bool = True

    @cached_property
    def text(self) -> str:
        """The order as one line of JSON; the same for equal orders."""
        return json.dumps({each.name: getattr(self, each.name) for each in fields(self)})

    @staticmethod
    def read(text: str | bytes) -> Order:
        """The order that `text` wrote."""
        return Order(**json.loads(text))

    @property
    def field(self) -> str:
        """The field of a request that is to blame if the grammar is too costly."""
        return "tools" if self.format is None else "response_format"

    @property
    def slow(self) -> bool:
        """True if the grammar may be slow to compile: it has regular expressions, multiples or intersections."""
        return (self.format or ("",))[0] in _SLOW_KINDS or any(word in self.text for word in _SLOW_KEYWORDS)

    def make(self) -> Grammar:
        """Makes the grammar.

        Raises:
            Refused: it cannot be made.
        """
        field = "response_format"
        grammar: Grammar | None = None
        try:
            if self.format is not None:
                grammar = self._format(*self.format)
            if self.tools:
                field = "tools"
                grammar = grammars.tool_calls(self.tools, self.choice, self.parallel, grammar)
        except RequestError as error:
            raise Refused(str(error), field) from None
        return grammar or grammars.json_object()

    def without_schemas(self) -> Order | None:
        """The order without the schemas that are not strict; None if there is none."""
        loose = [tool for tool in self.tools if not tool["function"].get("strict")]
        kind, *given = self.format or ("",)
        loose_format = kind == "json_schema" and not self.strict
        if not loose and not loose_format:
            return None
        anything = {"type": "object", "additionalProperties": True}
        tools = [
            {**tool, "function": {**tool["function"], "parameters": anything}} if tool in loose else tool
            for tool in self.tools
        ]
        return replace(self, tools=tools, format=(kind, type_alone(given[0])) if loose_format else self.format)

    def _format(self, kind: str, *given: Any) -> Grammar:
        if kind == "json_schema":
            return grammars.json_schema(given[0], strict=self.strict)
        if kind == "json_object":
            return grammars.json_object()
        return {"regex": grammars.regex, "choice": grammars.choice, "grammar": grammars.lark_here}[kind](given[0])
