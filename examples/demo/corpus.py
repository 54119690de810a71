"""The demo's whole world as seeded conversations: what people ask there, and the one right answer.

`conversations(seed, count, ...)` yields training material, `prompts(seed, count)` the held-out examination. Names,
numbers and phrasings of the two never meet (`draw.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

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
    """A conversation under way: its draws, its tools, what the user has told, and the messages so far."""

    draw: Draw
    tools: list[Tool] = field(default_factory=list)
    name: str | None = None
    facts: dict[str, str] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def user(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})

    def tool(self, kind: str) -> Tool | None:
        """The declared tool of a kind."""
        return next((tool for tool in self.tools if tool.kind == kind), None)

    def call(self, tool: Tool, values: tuple[Any, ...], result: str, answer: str) -> None:
        """A call, the tool's result in one of the forms that tools have, and the answer; some tools fail."""
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
    kind = talk.draw.one(list(SMALL_TALK))
    answer, phrases = SMALL_TALK[kind]
    polite = talk.draw.chance(0.2) and kind in ("identity", "abilities", "real model")
    talk.user(talk.draw.phrase(phrases, polite))
    talk.answer(answer)


def outside(talk: Dialogue) -> None:
    """A question from beyond the world."""
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
    """A sum by a calculator, or refused for want of one."""
    draw = talk.draw
    sign, a, b = draw.one("+-*/"), draw.decimal(), draw.decimal()
    said, work = OPERATIONS[sign]
    if sign == "/" and float(b) == 0:
        b = "8"
    asked, written, result = draw.one(said).format(a=a, b=b), f"{a} {sign} {b}", work(float(a), float(b))
    if draw.chance(0.12):
        asked, written, result = longer_sum(draw, a, sign, b)
    talk.user(draw.phrase(ASK_SUM, e=asked))
    tool = talk.tool("calculate")
    if tool is None:
        return talk.answer(NEED.format("calculator"))
    talk.call(tool, (written,), shown(result), f"The answer is {shown(result)}.")


def longer_sum(draw: Draw, a: str, sign: str, b: str) -> tuple[str, str, float]:
    """Three numbers: as asked, as a calculator wants them, and the result."""
    c, other, bracketed = draw.number(3), draw.one("+-*"), draw.chance(0.5)
    first, second = OPERATIONS[sign][1], OPERATIONS[other][1]
    if not bracketed and other == "*" and sign in "+-":
        result = first(float(a), second(float(b), float(c)))
    else:
        result = second(first(float(a), float(b)), float(c))
    written = f"({a} {sign} {b}) {other} {c}" if bracketed else f"{a} {sign} {b} {other} {c}"
    return (written.replace(" ", "") if draw.chance(0.5) else written), written, result


def conversion(talk: Dialogue) -> None:
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
    """The weather or the time in a city."""
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
    """Fields of a sentence as JSON, in the order asked for; null for a field that is not there."""
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
    talk.name = talk.draw.name()
    talk.user(talk.draw.phrase(TELL_NAME, n=talk.name))
    talk.answer(f"Nice to meet you, {talk.name}.")


def own_name(talk: Dialogue) -> None:
    talk.user(talk.draw.phrase(ASK_NAME))
    talk.answer(f"Your name is {talk.name}." if talk.name else "You have not told me your name.")


def new_fact(draw: Draw) -> tuple[str, str]:
    """("the code of the blue door", "4711"), or an owner by name."""
    thing = f"the {draw.one(words.ADJECTIVES)} {draw.one(words.OBJECTS)}"
    if draw.chance(0.3):
        return f"the {draw.one(['owner', 'keeper', 'guard'])} of {thing}", draw.name()
    return f"the {draw.one(['code', 'number', 'key', 'price', 'password'])} of {thing}", draw.code()


def telling(talk: Dialogue) -> None:
    key, value = new_fact(talk.draw)
    talk.facts[key] = value
    talk.user(talk.draw.phrase(TELL_FACT, f=f"{key} is {value}"))
    talk.answer(f"Noted: {key} is {value}.")


def recall(talk: Dialogue) -> None:
    """A fact told before, as often as not the oldest; or one never told."""
    draw = talk.draw
    key = new_fact(draw)[0]
    if talk.facts and draw.chance(0.85):
        told = list(talk.facts)
        key = told[0] if draw.chance(0.5) else draw.one(told)
    talk.user(draw.phrase(ASK_FACT, k=key))
    talk.answer(f"{key.capitalize()} is {talk.facts[key]}." if key in talk.facts else f"You have not told me {key}.")


def document(talk: Dialogue, facts: int = 0) -> None:
    """A page of facts, and at its end a question about one of them."""
    draw = talk.draw
    page = dict(new_fact(draw) for _ in range(facts or 2 + int(draw.rng.random() * 6)))
    talk.facts.update(page)
    key = next(iter(page)) if draw.chance(0.3) else draw.one(list(page))
    lines = " ".join(f"{k.capitalize()} is {v}." for k, v in page.items())
    question = draw.phrase(ASK_FACT, polite=False, k=key)
    talk.user(draw.one(["Read this. ", "Here is a page. ", "Text: ", "", "Some facts. "]) + lines + " " + question)
    talk.answer(f"{key.capitalize()} is {page[key]}.")


# skill -> (maker, weight without tools, with tools)
SKILLS: dict[str, tuple[Callable[[Dialogue], None], float, float]] = {
    "small talk": (small_talk, 3.0, 0.8),
    "outside": (outside, 2.0, 0.6),
    "arithmetic": (arithmetic, 1.2, 4.0),
    "conversion": (conversion, 0.8, 3.0),
    "lookup": (lookup, 0.4, 1.2),
    "extraction": (extraction, 4.0, 1.0),
    "introduction": (introduction, 0.5, 0.1),
    "own name": (own_name, 0.4, 0.1),
    "telling": (telling, 0.9, 0.15),
    "recall": (recall, 1.2, 0.15),
    "document": (document, 1.6, 0.05),
}


def begin(draw: Draw, tools: bool) -> Dialogue:
    """A conversation with nothing said in it yet, perhaps with a system turn."""
    talk = Dialogue(draw, toolbox(draw) if tools else [])
    if draw.chance(0.45):
        text = draw.one(SYSTEMS).format(c=draw.city(), d=draw.one(words.DAYS), n=draw.name())
        talk.messages.append({"role": "system", "content": text})
    return talk


def add_turn(talk: Dialogue, skills: list[str] | None = None) -> str:
    """Adds a turn of a skill drawn by weight, and returns the skill."""
    names = skills or list(SKILLS)
    weights = [SKILLS[name][2 if talk.tools else 1] for name in names]
    if talk.facts and "recall" in names:
        weights[names.index("recall")] *= 2
    if talk.name and "own name" in names:
        weights[names.index("own name")] *= 2
    skill = talk.draw.rng.choices(names, weights)[0]
    SKILLS[skill][0](talk)
    return skill


def length(messages: list[Message]) -> int:
    """Characters of all messages, the calls included."""
    calls = (call for message in messages for call in message.get("tool_calls", []))
    return sum(len(message["content"]) for message in messages) + sum(len(json.dumps(call)) for call in calls)


def conversations(seed: int, count: int, shortest: int, longest: int) -> Iterator[Dialogue]:
    """Training conversations.

    Args:
        seed: the same seed, the same conversations.
        count: how many.
        shortest: characters, at least about; the length of each is drawn between the two.
        longest: characters, at most about.
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
    """An examination question: the messages so far, and the one right next message."""

    category: str
    messages: list[Message]
    tools: list[Tool]
    answer: Message


TELLING = ["introduction", "telling", "telling", "small talk", "outside"]
# category -> (skills of the last turn, with tools, which message of the turn is asked for, turns before it)
CATEGORIES: dict[str, tuple[list[str], bool | None, str, int]] = {
    "small talk": (["small talk"], None, "answer", 0),
    "outside the world": (["outside"], None, "answer", 0),
    "arithmetic call": (["arithmetic"], True, "call", 0),
    "conversion call": (["conversion"], True, "call", 0),
    "answer from a result": (["arithmetic", "conversion", "lookup"], True, "answer", 0),
    "no tool declared": (["arithmetic", "conversion", "lookup"], False, "answer", 0),
    "fields as JSON": (["extraction"], None, "answer", 0),
    "several turns": (list(SKILLS), None, "any", 3),
    "memory": (["recall", "own name", "document"], False, "answer", 4),
    "past the boundary": (list(SKILLS), None, "any", 16),
}


def prompts(seed: int, count: int = 500, categories: list[str] | None = None) -> list[Prompt]:
    """Held-out prompts, the categories in turn."""
    draw = Draw(f"examination {seed}", held_out=True)
    made: list[Prompt] = []
    order = categories or list(CATEGORIES)
    while len(made) < count:
        prompt = examine(draw, order[len(made) % len(order)])
        if prompt is not None:
            made.append(prompt)
    return made


def examine(draw: Draw, category: str) -> Prompt | None:
    """One prompt of a category; None where the draw came to nothing, such as a call without a tool for it."""
    skills, tools, part, before = CATEGORIES[category]
    talk = begin(draw, draw.chance(0.45) if tools is None else tools)
    for _ in range(1 + int(draw.rng.random() * before) if before < 10 else before):
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
