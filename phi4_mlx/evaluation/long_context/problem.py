"""Problems: what is hidden in a text, what is asked about it, and the right answer. One function for each kind."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from phi4_mlx.evaluation.long_context.language import Language

Form = Literal["word", "number", "uuid", "name", "count"]

VALUES: tuple[Form, ...] = ("word", "number", "uuid")
_CONSONANTS = "BCDFGHJKLMNPQRSTVWXZ"  # names of variables: three of them spell no word
_DISTRACTORS = 4
_SEVERAL = 3  # values or keys that are asked for at once
_LINKS = 4  # variables of a chain
_COMMON = 3  # items that are asked for
_COMMON_TIMES = 5


@dataclass(frozen=True)
class Insert:
    """A sentence to hide.

    Attributes:
        text: the sentence.
        depth: its place in the text, from 0 (the beginning) to 1 (the end).
    """

    text: str
    depth: float


@dataclass(frozen=True)
class Problem:
    """A question about hidden sentences.

    Attributes:
        kind: a key of `KINDS`.
        language: of all texts.
        form: of the values in the answer.
        inserts: the sentences to hide.
        question: stands after the text.
        truths: the right values.
        wrong: other values of that form in the text.
    """

    kind: str
    language: Language
    form: Form
    inserts: tuple[Insert, ...]
    question: str
    truths: tuple[str, ...]
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Attributes:
        make: (draw, language, form, depth) -> the problem. The first sentence that matters stands at `depth`, other
            ones that matter evenly between it and the end, and distractors anywhere.
        texts: the templates that it needs.
        forms: the forms of values that it can have; None for those of the language.
    """

    make: Callable[[random.Random, Language, Form, float], Problem]
    texts: tuple[str, ...]
    forms: tuple[Form, ...] | None = None

    def forms_in(self, language: Language) -> tuple[Form, ...]:
        """The forms of values in a language, empty if it lacks the texts."""
        if not set(self.texts) <= language.texts.keys():
            return ()
        own = tuple(form for form in VALUES if form in language.forms)
        return own if self.forms is None else tuple(form for form in self.forms if form in own or form not in VALUES)


def spread(count: int, depth: float) -> list[float]:
    """Depths of `count` sentences: the first at `depth`, the last at the end."""
    return [depth + (1 - depth) * n / max(1, count - 1) for n in range(count)]


def values(draw: random.Random, language: Language, form: Form, count: int) -> list[str]:
    """Different values of a form."""
    if form == "word":
        return draw.sample(language.words, count)
    if form == "number":
        low = 10 ** (language.digits - 1)
        return [str(n) for n in draw.sample(range(low, 10 * low), count)]
    if form == "uuid":
        return [str(uuid.UUID(int=draw.getrandbits(128), version=4)) for _ in range(count)]
    names: list[str] = []
    while len(names) < count:
        name = "".join(draw.sample(_CONSONANTS, 3))
        names += [name] * (name not in names)
    return names


def _needle(draw: random.Random, language: Language, form: Form, depth: float, distractors: int = 0) -> Problem:
    """One key with one value, and other keys with other values."""
    keys = draw.sample(language.keys, 1 + distractors)
    found = values(draw, language, form, 1 + distractors)
    depths = [depth, *(draw.random() for _ in range(distractors))]
    inserts = [
        Insert(language.texts["needle"].format(key=key, value=value), at)
        for key, value, at in zip(keys, found, depths, strict=True)
    ]
    question = language.texts["ask_value"].format(key=keys[0])
    return Problem("needle", language, form, tuple(inserts), question, (found[0],), tuple(found[1:]))


def _distracted(draw: random.Random, language: Language, form: Form, depth: float) -> Problem:
    return replace(_needle(draw, language, form, depth, _DISTRACTORS), kind="needle-distracted")


def _several_values(draw: random.Random, language: Language, form: Form, depth: float) -> Problem:
    """One key with several values, among other keys."""
    key, *others = draw.sample(language.keys, 1 + _DISTRACTORS)
    found = values(draw, language, form, _SEVERAL + _DISTRACTORS)
    truths, wrong = found[:_SEVERAL], found[_SEVERAL:]
    templates = [language.texts["needle"], *[language.texts["another"]] * (_SEVERAL - 1)]
    inserts = [
        Insert(template.format(key=key, value=value), at)
        for template, value, at in zip(templates, truths, spread(_SEVERAL, depth), strict=True)
    ]
    inserts += [
        Insert(language.texts["needle"].format(key=other, value=value), draw.random())
        for other, value in zip(others, wrong, strict=True)
    ]
    question = language.texts["ask_values"].format(key=key)
    return Problem("needle-values", language, form, tuple(inserts), question, tuple(truths), tuple(wrong))


def _several_keys(draw: random.Random, language: Language, form: Form, depth: float) -> Problem:
    """Several keys, each with a value, among other keys."""
    keys = draw.sample(language.keys, _SEVERAL + _DISTRACTORS)
    found = values(draw, language, form, len(keys))
    depths = [*spread(_SEVERAL, depth), *(draw.random() for _ in range(_DISTRACTORS))]
    inserts = [
        Insert(language.texts["needle"].format(key=key, value=value), at)
        for key, value, at in zip(keys, found, depths, strict=True)
    ]
    asked = language.separator.join(language.quoted.format(key) for key in keys[:_SEVERAL])
    question = language.texts["ask_keys"].format(keys=asked)
    truths, wrong = tuple(found[:_SEVERAL]), tuple(found[_SEVERAL:])
    return Problem("needle-keys", language, form, tuple(inserts), question, truths, wrong)


@dataclass(frozen=True)
class _Chains:
    """Two chains of variables; the first one is asked for."""

    names: tuple[list[str], list[str]]
    values: list[str]
    inserts: tuple[Insert, ...]


def _chains(draw: random.Random, language: Language, depth: float) -> _Chains:
    """Chains whose first variable is given a value, and each other one that of the variable before."""
    names = values(draw, language, "name", 2 * _LINKS)
    starts = values(draw, language, "number", 2)
    inserts = []
    for chain, value, first in ((names[:_LINKS], starts[0], depth), (names[_LINKS:], starts[1], draw.random())):
        sentences = [language.texts["set"].format(name=chain[0], value=value)]
        sentences += [language.texts["copy"].format(name=name, other=other) for other, name in pairwise(chain)]
        inserts += [Insert(text, at) for text, at in zip(sentences, spread(_LINKS, first), strict=True)]
    return _Chains((names[:_LINKS], names[_LINKS:]), starts, tuple(inserts))


def _chain_value(draw: random.Random, language: Language, form: Form, depth: float) -> Problem:
    """A value that is handed from variable to variable; the last one's value is asked for."""
    chains = _chains(draw, language, depth)
    value, wrong = chains.values
    question = language.texts["ask_last"].format(name=chains.names[0][-1])
    return Problem("chain-value", language, form, chains.inserts, question, (value,), (wrong,))


def _chain_names(draw: random.Random, language: Language, form: Form, depth: float) -> Problem:
    """The same chain; the names of all variables that have its value are asked for."""
    chains = _chains(draw, language, depth)
    names, others = map(tuple, chains.names)
    question = language.texts["ask_names"].format(value=chains.values[0])
    return Problem("chain-names", language, form, chains.inserts, question, names, others)


def _items(draw: random.Random, language: Language, words: Sequence[str], most: int) -> list[Insert]:
    """Each word one to `most` times, anywhere."""
    template = language.texts["item"]
    return [Insert(template.format(word=word), draw.random()) for word in words for _ in range(draw.randint(1, most))]


def _count(draw: random.Random, language: Language, form: Form, depth: float) -> Problem:
    """An item's occurrences, among those of other items."""
    word, *others = draw.sample(language.words, 1 + _DISTRACTORS)
    times = draw.randint(2, 9)
    inserts = [Insert(language.texts["item"].format(word=word), at) for at in spread(times, depth)]
    inserts += _items(draw, language, others, 3)
    question = language.texts["ask_count"].format(word=word)
    return Problem("count", language, form, tuple(inserts), question, (str(times),))


def _common(draw: random.Random, language: Language, form: Form, depth: float) -> Problem:
    """The most common items; all others stand there at most half as often."""
    words = draw.sample(language.words, _COMMON + _DISTRACTORS)
    common, others = words[:_COMMON], words[_COMMON:]
    sequence = [word for _ in range(_COMMON_TIMES) for word in draw.sample(common, _COMMON)]
    inserts = [
        Insert(language.texts["item"].format(word=word), at)
        for word, at in zip(sequence, spread(len(sequence), depth), strict=True)
    ]
    inserts += _items(draw, language, others, _COMMON_TIMES // 2)
    question = language.texts["ask_common"]
    return Problem("count-common", language, form, tuple(inserts), question, tuple(common), tuple(others))


KINDS = {
    "needle": Kind(_needle, ("needle", "ask_value")),
    "needle-distracted": Kind(_distracted, ("needle", "ask_value")),
    "needle-values": Kind(_several_values, ("needle", "another", "ask_values"), ("word", "number")),
    "needle-keys": Kind(_several_keys, ("needle", "ask_keys"), ("word", "number")),
    "chain-value": Kind(_chain_value, ("set", "copy", "ask_last"), ("number",)),
    "chain-names": Kind(_chain_names, ("set", "copy", "ask_names"), ("name",)),
    "count": Kind(_count, ("item", "ask_count"), ("count",)),
    "count-common": Kind(_common, ("item", "ask_common"), ("word",)),
}
