"""The Berkeley Function-Calling Leaderboard: its questions, its right answers and its AST checker, from bfcl-eval.

bfcl-eval pins dozens of packages that neither its data nor its AST checker needs, so it is installed without them. Two
of its modules are replaced while the checker is imported: one imports a client for every provider, the other creates
folders beside the package. Its parsers of answers, which evaluate what the model wrote as Python, are never imported.

Source: https://github.com/ShishirPatil/gorilla/tree/main/berkeley-function-call-leaderboard (Apache 2.0).
"""

from __future__ import annotations

import copy
import io
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from phi4_mlx.data.jsonl import read_lines
from phi4_mlx.errors import RequestError, message_of
from phi4_mlx.files.json_file import JsonObject

INSTALL = "pip install --no-deps bfcl-eval==2026.3.23"

NON_LIVE = (
    "simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple", "irrelevance",
)  # fmt: skip
LIVE = (
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance",
)  # fmt: skip
LANGUAGES = {"simple_java": "java", "simple_javascript": "javascript"}
"""Category -> language of its functions; Python elsewhere."""

Calls = list[dict[str, JsonObject]]
"""Calls in the leaderboard's form: [{name: arguments}]."""
Truth = dict[str, dict[str, list[Any]]]
"""A right call: {name: {argument: right values}}, in which "" allows to leave an optional argument out."""


@dataclass(frozen=True)
class Case:
    """A question.

    Attributes:
        name: its id, such as "live_simple_0-0-0".
        category: one of `NON_LIVE` or `LIVE`.
        messages: the conversation up to the answer.
        functions: the declarations as the checker reads them, with the leaderboard's names of types.
        tools: the declarations as the model reads them, in OpenAI's form.
        truth: the right calls; none where only the presence of a call is scored.
    """

    name: str
    category: str
    messages: list[JsonObject]
    functions: list[JsonObject]
    tools: list[JsonObject]
    truth: list[Truth]


class Leaderboard:
    """The installed bfcl-eval.

    Attributes:
        version: of bfcl-eval.
    """

    def __init__(self) -> None:
        """Imports the checker.

        Raises:
            RequestError: bfcl-eval is missing, or of a version whose modules are others.
        """
        try:
            self.version = metadata.version("bfcl-eval")
            with _replaced_modules():
                checker, enums, types, utils = map(
                    import_module,
                    (
                        "bfcl_eval.eval_checker.ast_eval.ast_checker", "bfcl_eval.constants.enums",
                        "bfcl_eval.constants.type_mappings", "bfcl_eval.utils",
                    ),
                )  # fmt: skip
            self._check: Callable[..., JsonObject] = checker.ast_checker
            self._languages: Callable[[str], Any] = enums.Language
            self._types: Mapping[str, str] = types.GORILLA_TO_OPENAPI
            self._with_hints: Callable[[list[JsonObject]], list[JsonObject]] = (
                utils.add_language_specific_hint_to_function_doc
            )
        except metadata.PackageNotFoundError:
            raise RequestError(f"the task bfcl needs the package bfcl-eval: {INSTALL}") from None
        except (ImportError, AttributeError) as error:
            raise RequestError(
                f"the installed bfcl-eval {self.version} is not the one that the task bfcl reads "
                f"({message_of(error)}): {INSTALL}"
            ) from None

    @cached_property
    def _folder(self) -> Path:
        return Path(str(import_module("bfcl_eval").__file__)).parent / "data"

    def cases(self, category: str) -> list[Case]:
        """The questions of a category.

        Raises:
            RequestError: a file is missing or damaged.
        """
        truth: dict[str, list[Truth]] | None = None
        try:
            if not category.endswith("relevance"):
                right = self._folder / "possible_answer" / f"BFCL_v4_{category}.json"
                truth = dict(read_lines(right, lambda line, _: (line["id"], line["ground_truth"])))
            asked = self._folder / f"BFCL_v4_{category}.json"
            return read_lines(asked, lambda line, _: self._case(category, line, truth))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise RequestError(
                f"the data of bfcl-eval {self.version} on {category} is not as expected "
                f"({type(error).__name__}: {message_of(error)}): {INSTALL}"
            ) from None

    def _case(self, category: str, line: JsonObject, truth: Mapping[str, list[Truth]] | None) -> Case:
        (hinted,) = self._with_hints([copy.deepcopy(line)])
        tools = [{"type": "function", "function": self._declared(function)} for function in hinted["function"]]
        functions, name = line["function"], line["id"]
        right = [] if truth is None else [_with_required(call, functions) for call in truth[name]]
        return Case(name, category, line["question"][0], functions, tools, right)

    def _declared(self, function: JsonObject) -> JsonObject:
        return {**function, "parameters": self.json_schema(function["parameters"])}

    def json_schema(self, schema: Any) -> Any:
        """A schema with JSON's names of types for the leaderboard's at every level; an unknown type is a string."""
        if not isinstance(schema, dict):
            return schema
        mapped = dict(schema)
        if isinstance(schema.get("type"), str):
            mapped["type"] = self._types.get(schema["type"], "string")
        for key in ("items", "additionalProperties"):
            if key in schema:
                mapped[key] = self.json_schema(schema[key])
        if isinstance(schema.get("properties"), dict):
            mapped["properties"] = {name: self.json_schema(each) for name, each in schema["properties"].items()}
        return mapped

    def mistake(self, case: Case, calls: Calls) -> str | None:
        """The checker's objection to calls that answer a case with a `truth`, or None."""
        language = self._languages(LANGUAGES.get(case.category, "python"))
        try:
            with redirect_stdout(io.StringIO()):  # it prints what it cannot convert
                verdict = self._check(case.functions, calls, case.truth, language, case.category, "")
        except Exception as error:  # the checker trips over values of shapes that no right answer has
            return f"a value has a shape that no right answer has ({type(error).__name__}: {message_of(error)})"
        if verdict["valid"]:
            return None
        return f"{verdict['error_type']}: {' '.join(str(verdict['error']).split())[:500]}"


def _with_required(call: Truth, functions: list[JsonObject]) -> Truth:
    """A right call without the permission to leave out a required argument, by which the checker takes "" as right."""
    required = {name for each in functions if each["name"] in call for name in each["parameters"]["required"]}
    return {
        function: {
            name: [value for value in values if value != "" or name not in required] or values
            for name, values in arguments.items()
        }
        for function, arguments in call.items()
    }


@contextmanager
def _replaced_modules() -> Iterator[None]:
    """Puts the few values that the checker reads in place of two modules, until the end of the block."""
    models, places = ModuleType("bfcl_eval.constants.model_config"), ModuleType("bfcl_eval.constants.eval_config")
    keep = SimpleNamespace(underscore_to_dot=False)  # our parser leaves the dots in names as they are
    models.MODEL_CONFIG_MAPPING = defaultdict(lambda: keep)  # type: ignore[attr-defined]
    before = {module.__name__: sys.modules.get(module.__name__) for module in (models, places)}
    sys.modules.update({models.__name__: models, places.__name__: places})
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
