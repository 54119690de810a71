"""The demo's world as seeded conversations, each question with one right answer.

`conversations` yields the training corpus, and `prompts` the held-out examination, whose values and phrasings are kept
out of the corpus (`draw.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import words
from draw import Draw
from phrases import (
    ASK_ALL,
    ASK_CONVERSION,
    ASK_FACT,
    ASK_FIELDS,
    ASK_NAME,
    ASK_NOTHING,
    ASK_SUM,
    ASK_TIME,
    ASK_WEATHER,
    NEED,
    NO_SENTENCE,
    OUTSIDE,
    OUTSIDE_PHRASES,
    RECORDS,
    SMALL_TALK,
    SYSTEMS,
    TELL_FACT,
    TELL_NAME,
    TOOL_ERRORS,
)
from toolbox import Tool, convert, number, shown, toolbox, unit_pair

Message = dict[str, Any]


@dataclass
class Dialogue:
    """A conversation in progress.

    Attributes:
        draw: the source of its random values.
        tools: the declared tools.
        name: the user's name, once given.
        facts: the facts that the user has given, by key.
        messages: the messages so far.
    """

    draw: Draw
    tools: list[Tool] = field(default_factory=list)
    name: str | None = None
    facts: dict[str, str] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def user(self, text: str) -> None:
        """Adds a message of the user."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Adds an answer of the assistant."""
        self.messages.append({"role": "assistant", "content": text})

    def tool(self, kind: str) -> Tool | None:
        """The declared tool of a kind, if any."""
        return next((tool for tool in self.tools if tool.kind == kind), None)

    def call(self, tool: Tool, values: tuple[Any, ...], result: str, answer: str) -> None:
        """Adds a call, the tool's result in one of several formats, and the answer. One call in twenty fails."""
        draw = self.draw
        self.messages.append(tool.call(*values))
        if draw.chance(0.05):
            error = draw.one(TOOL_ERRORS)
            result, answer = "error: " + error, f"The tool failed: {error}."
            forms = ["{}"]
        else:
            forms = ["{}", "{}", '{{"result": {}}}', '{{"result":{}}}', '{{"value": {}}}', '{{"answer": {}}}']
            if not result.replace(".", "").replace("-", "").isdigit():
                forms = ["{}", '"{}"', '{{"result": "{}"}}', '{{"result":"{}"}}']
        self.messages.append({"role": "tool", "content": draw.one(forms).format(result)})
        self.answer(answer)


def small_talk(talk: Dialogue) -> None:
    """A greeting, thanks, or a question about the demo."""
    kind = talk.draw.one(list(SMALL_TALK))
    answer, phrases = SMALL_TALK[kind]
    polite = talk.draw.chance(0.2) and kind in ("identity", "abilities", "real model")
    talk.user(talk.draw.phrase(phrases, polite))
    talk.answer(answer)


def outside(talk: Dialogue) -> None:
    """A question from outside the demo's world."""
    draw = talk.draw
    slots = {
        "t": draw.apart(words.TOPICS) if draw.chance(0.8) else draw.made_up().lower(), "u": draw.one(words.TOPICS),
        "c": draw.apart(words.COUNTRIES), "l": draw.one(words.LANGUAGES), "j": draw.one(words.JOBS), "n": draw.name(),
        "y": str(1500 + int(draw.rng.random() * 550)), "i": draw.one(words.ITEMS), "x": draw.city(),
    }  # fmt: skip
    talk.user(draw.phrase(OUTSIDE_PHRASES, **slots))
    talk.answer(OUTSIDE)


OPERATIONS: dict[str, tuple[list[str], Callable[[float, float], float]]] = {
    "+": ([
        "{a}+{b}", "{a} + {b}", "{a} plus {b}", "the sum of {a} and {b}", "{a} and {b} together",
    ], lambda a, b: a + b),
    "-": ([
        "{a}-{b}", "{a} - {b}", "{a} minus {b}", "the difference of {a} and {b}", "{a} less {b}",
    ], lambda a, b: a - b),
    "*": (["{a}*{b}", "{a} * {b}", "{a} times {b}", "{a} x {b}", "the product of {a} and {b}", "{a} multiplied by {b}"],
          lambda a, b: a * b),
    "/": (["{a}/{b}", "{a} / {b}", "{a} divided by {b}", "{a} over {b}", "the quotient of {a} and {b}"],
          lambda a, b: a / b),
}  # fmt: skip


def arithmetic(talk: Dialogue) -> None:
    """A calculation with a tool, or a refusal if no calculator is declared."""
    draw = talk.draw
    sign, a, b = draw.one("+-*/"), draw.decimal(), draw.decimal()
    templates, work = OPERATIONS[sign]
    if sign == "/" and float(b) == 0:
        b = "8"
    asked, written, result = draw.one(templates).format(a=a, b=b), f"{a} {sign} {b}", work(float(a), float(b))
    if draw.chance(0.12):
        asked, written, result = longer_sum(draw, a, sign, b)
    talk.user(draw.phrase(ASK_SUM, e=asked))
    tool = talk.tool("calculate")
    if tool is None:
        return talk.answer(NEED.format("calculator"))
    talk.call(tool, (written,), shown(result), f"The answer is {shown(result)}.")


def longer_sum(draw: Draw, a: str, sign: str, b: str) -> tuple[str, str, float]:
    """Three numbers: (the question's expression, the calculator's expression, the result)."""
    c, other, bracketed = draw.number(3), draw.one("+-*"), draw.chance(0.5)
    first, second = OPERATIONS[sign][1], OPERATIONS[other][1]
    if not bracketed and other == "*" and sign in "+-":
        result = first(float(a), second(float(b), float(c)))
    else:
        result = second(first(float(a), float(b)), float(c))
    written = f"({a} {sign} {b}) {other} {c}" if bracketed else f"{a} {sign} {b} {other} {c}"
    return (written.replace(" ", "") if draw.chance(0.5) else written), written, result


def conversion(talk: Dialogue) -> None:
    """A unit conversion with a tool, or a refusal if none is declared."""
    draw = talk.draw
    value = draw.decimal()
    source, target, source_size, target_size = unit_pair(draw)
    talk.user(draw.phrase(ASK_CONVERSION, v=value, f=source, t=target))
    tool = talk.tool("convert")
    if tool is None:
        return talk.answer(NEED.format("unit conversion"))
    result = shown(convert(float(value), source, target, source_size, target_size))
    talk.call(tool, (number(value), source, target), result, f"{value} {source} is {result} {target}.")


def lookup(talk: Dialogue) -> None:
    """The weather or the time in a city, with a tool or refused."""
    draw = talk.draw
    weather = draw.chance(0.5) if bool(talk.tool("weather")) == bool(talk.tool("clock")) else bool(talk.tool("weather"))
    city = draw.city()
    talk.user(draw.phrase(ASK_WEATHER if weather else ASK_TIME, c=city))
    tool = talk.tool("weather" if weather else "clock")
    if tool is None:
        return talk.answer(NEED.format("weather" if weather else "clock"))
    if weather:
        result = f"{draw.one(words.WEATHER)}, {int(draw.rng.random() * 45) - 9} degrees"
        return talk.call(tool, (city,), result, f"The weather in {city}: {result}.")
    result = f"{int(draw.rng.random() * 24):02d}:{int(draw.rng.random() * 60):02d}"
    talk.call(tool, (city,), result, f"It is {result} in {city}.")


def extraction(talk: Dialogue) -> None:
    """Fields of a sentence as JSON, in the requested order; null for a missing field."""
    draw = talk.draw
    if draw.chance(0.03):
        talk.user(draw.phrase(ASK_NOTHING))
        return talk.answer(NO_SENTENCE)
    sentences, fields, absent = RECORDS[draw.one(list(RECORDS))]
    values = {name: field_value(draw, name) for name in fields}
    sentence = draw.one(sentences).format(**{k: v if isinstance(v, str) else str(v) for k, v in values.items()})
    if draw.chance(0.25):
        talk.user(draw.phrase(ASK_ALL, s=sentence))
        return talk.answer(json.dumps(values))
    wanted = list(fields)
    draw.rng.shuffle(wanted)
    wanted = wanted[: 1 + int(draw.rng.random() * len(wanted))]
    if draw.chance(0.2):
        wanted[-1] = draw.one(absent)
    listed = wanted[0]
    if len(wanted) > 1:
        listed = ", ".join(wanted[:-1]) + draw.one([" and ", ", ", ", and "]) + wanted[-1]
    if draw.chance(0.25):
        listed = "the " + listed
    talk.user(draw.phrase(ASK_FIELDS, s=sentence, k=listed))
    talk.answer(json.dumps({name: values.get(name) for name in wanted}))


def field_value(draw: Draw, name: str) -> str | int:
    """A random value for a field of a record."""
    if name in ("name", "customer", "person", "traveller"):
        return draw.name()
    if name in ("city", "origin", "destination"):
        return draw.city()
    if name in ("age", "quantity", "room", "price"):
        return int(draw.number({"age": 2, "quantity": 3, "room": 3, "price": 4}[name]))
    if name == "time":
        return f"{int(draw.rng.random() * 24)}:{int(draw.rng.random() * 60):02d}"
    if name == "phone":
        return "-".join((draw.code()[:3], draw.code()[:3], draw.code()[:3]))
    return draw.one({"job": words.JOBS, "item": words.ITEMS, "day": words.DAYS}[name])


def introduction(talk: Dialogue) -> None:
    """The user gives a name."""
    talk.name = talk.draw.name()
    talk.user(talk.draw.phrase(TELL_NAME, n=talk.name))
    talk.answer(f"Nice to meet you, {talk.name}.")


def own_name(talk: Dialogue) -> None:
    """The user asks for the name given earlier, if any."""
    talk.user(talk.draw.phrase(ASK_NAME))
    talk.answer(f"Your name is {talk.name}." if talk.name else "You have not told me your name.")


def new_fact(draw: Draw) -> tuple[str, str]:
    """(key, value), such as ("the code of the blue door", "4711"); the value may be a name."""
    thing = f"the {draw.one(words.ADJECTIVES)} {draw.one(words.OBJECTS)}"
    if draw.chance(0.3):
        return f"the {draw.one(['owner', 'keeper', 'guard'])} of {thing}", draw.name()
    return f"the {draw.one(['code', 'number', 'key', 'price', 'password'])} of {thing}", draw.code()


def telling(talk: Dialogue) -> None:
    """The user gives a fact to remember."""
    key, value = new_fact(talk.draw)
    talk.facts[key] = value
    talk.user(talk.draw.phrase(TELL_FACT, f=f"{key} is {value}"))
    talk.answer(f"Noted: {key} is {value}.")


def recall(talk: Dialogue) -> None:
    """The user asks for an earlier fact, half the time the oldest, or for one that was never given."""
    draw = talk.draw
    key = new_fact(draw)[0]
    if talk.facts and draw.chance(0.85):
        known = list(talk.facts)
        key = known[0] if draw.chance(0.5) else draw.one(known)
    talk.user(draw.phrase(ASK_FACT, k=key))
    talk.answer(f"{key.capitalize()} is {talk.facts[key]}." if key in talk.facts else f"You have not told me {key}.")


def document(talk: Dialogue, facts: int = 0) -> None:
    """A page of facts with a question about one of them at its end."""
    draw = talk.draw
    page = dict(new_fact(draw) for _ in range(facts or 2 + int(draw.rng.random() * 6)))
    talk.facts.update(page)
    key = next(iter(page)) if draw.chance(0.3) else draw.one(list(page))
    lines = " ".join(f"{k.capitalize()} is {v}." for k, v in page.items())
    question = draw.phrase(ASK_FACT, False, k=key)
    talk.user(draw.one(["Read this. ", "Here is a page. ", "Text: ", "", "Some facts. "]) + lines + " " + question)
    talk.answer(f"{key.capitalize()} is {page[key]}.")


class Skill(NamedTuple):
    """A kind of turn: the function that adds it, and its weights in a draw without and with tools."""

    add: Callable[[Dialogue], None]
    weight: float
    weight_with_tools: float


SKILLS = {
    "small talk": Skill(small_talk, 3.0, 0.8),
    "outside": Skill(outside, 2.0, 0.6),
    "arithmetic": Skill(arithmetic, 1.2, 4.0),
    "conversion": Skill(conversion, 0.8, 3.0),
    "lookup": Skill(lookup, 0.4, 1.2),
    "extraction": Skill(extraction, 4.0, 1.0),
    "introduction": Skill(introduction, 0.5, 0.1),
    "own name": Skill(own_name, 0.4, 0.1),
    "telling": Skill(telling, 0.9, 0.15),
    "recall": Skill(recall, 1.2, 0.15),
    "document": Skill(document, 1.6, 0.05),
}


def begin(draw: Draw, tools: bool) -> Dialogue:
    """A new conversation, in 45 % of cases with a system message."""
    talk = Dialogue(draw, toolbox(draw) if tools else [])
    if draw.chance(0.45):
        text = draw.one(SYSTEMS).format(c=draw.city(), d=draw.one(words.DAYS), n=draw.name())
        talk.messages.append({"role": "system", "content": text})
    return talk


def add_turn(talk: Dialogue, skills: list[str] | None = None) -> str:
    """Adds a turn of a skill drawn by weight, and returns the skill's name."""
    names = skills or list(SKILLS)
    weights = [SKILLS[name].weight_with_tools if talk.tools else SKILLS[name].weight for name in names]
    if talk.facts and "recall" in names:
        weights[names.index("recall")] *= 2
    if talk.name and "own name" in names:
        weights[names.index("own name")] *= 2
    skill = talk.draw.rng.choices(names, weights)[0]
    SKILLS[skill].add(talk)
    return skill


def length(messages: list[Message]) -> int:
    """Characters of all messages, including calls."""
    calls = (call for message in messages for call in message.get("tool_calls", []))
    return sum(len(message["content"]) for message in messages) + sum(len(json.dumps(call)) for call in calls)


def conversations(seed: int, count: int, shortest: int, longest: int) -> Iterator[Dialogue]:
    """Training conversations.

    Args:
        seed: the seed; equal seeds give equal conversations.
        count: number of conversations.
        shortest: approximate lower limit of a conversation's length, in characters.
        longest: approximate upper limit, in characters.
    """
    draw = Draw(f"train {seed}")
    for _ in range(count):
        talk = begin(draw, tools=draw.chance(0.45))
        wanted = shortest + draw.rng.random() ** 1.5 * (longest - shortest)
        if longest > 1000 and draw.chance(0.35):
            document(talk, facts=int(wanted / (60 + 60 * draw.rng.random())))
            for _ in range(2 + int(draw.rng.random() * 5)):
                recall(talk)
        add_turn(talk)
        while length(talk.messages) < wanted:
            add_turn(talk)
        yield talk


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt: the messages so far, and the one right next message."""

    category: str
    messages: list[Message]
    tools: list[Tool]
    answer: Message


class Category(NamedTuple):
    """A category of held-out prompts.

    Attributes:
        skills: skills of the last turn.
        tools: whether tools are declared; None draws it.
        part: the message of the last turn to predict.
        earlier: turns before the last one: 1 to `earlier` at random, or exactly `earlier` from 10 up.
    """

    skills: list[str]
    tools: bool | None
    part: Literal["answer", "call", "any"]
    earlier: int


TELLING = ["introduction", "telling", "telling", "small talk", "outside"]
CATEGORIES = {
    "small talk": Category(["small talk"], None, "answer", 0),
    "outside the world": Category(["outside"], None, "answer", 0),
    "arithmetic call": Category(["arithmetic"], True, "call", 0),
    "conversion call": Category(["conversion"], True, "call", 0),
    "answer from a result": Category(["arithmetic", "conversion", "lookup"], True, "answer", 0),
    "no tool declared": Category(["arithmetic", "conversion", "lookup"], False, "answer", 0),
    "fields as JSON": Category(["extraction"], None, "answer", 0),
    "several turns": Category(list(SKILLS), None, "any", 3),
    "memory": Category(["recall", "own name", "document"], False, "answer", 4),
    "past the boundary": Category(list(SKILLS), None, "any", 16),
}


def prompts(seed: int, count: int = 500, categories: list[str] | None = None) -> list[Prompt]:
    """Held-out prompts, one category after the other in rotation."""
    draw = Draw(f"examination {seed}", held_out=True)
    made: list[Prompt] = []
    order = categories or list(CATEGORIES)
    while len(made) < count:
        prompt = examine(draw, order[len(made) % len(order)])
        if prompt is not None:
            made.append(prompt)
    return made


def examine(draw: Draw, category: str) -> Prompt | None:
    """One prompt of a category; None if the drawn turn does not fit, such as a call without its tool."""
    skills, tools, part, earlier = CATEGORIES[category]
    talk = begin(draw, draw.chance(0.45) if tools is None else tools)
    for _ in range(1 + int(draw.rng.random() * earlier) if earlier < 10 else earlier):
        add_turn(talk, TELLING if category == "memory" else None)
    start = len(talk.messages)
    add_turn(talk, skills)
    replies = [i for i in range(start, len(talk.messages)) if talk.messages[i]["role"] == "assistant"]
    at = replies[0] if part == "call" or (part == "any" and draw.chance(0.5)) else replies[-1]
    answer = talk.messages[at]
    if (part == "call") != ("tool_calls" in answer) and part != "any":
        return None
    if category == "answer from a result" and talk.messages[at - 1]["role"] != "tool":
        return None
    return Prompt(category, talk.messages[:at], talk.tools, answer)
