"""The world of `demo-flash`: sums, differences and products, worked out digit by digit.

Each line of the working is a fact that a tiny model can learn, such as `7+8+1=16`, followed by the digits of the result
so far. The demo's tokenizer makes a token of each digit. An eighth of all pairs of operands is held out from training.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from corpus import OPERATIONS, Dialogue, Message, Prompt, outside, small_talk
from draw import Draw
from phrases import ASK_SUM, SYSTEMS

BOX = "Please reason step by step, and put your final answer within \\boxed{}."
NOTHING = "There is nothing to work out."
REFUSAL = f"<think>\n{NOTHING}\n</think>\n\nI add, subtract and multiply. Ask me what 12 times 34 is."
SIGNS = {
    "sum": "+", "long sum": "+", "difference": "-", "negative difference": "-", "product by a digit": "*",
    "product": "*",
}  # fmt: skip
CATEGORIES = tuple(SIGNS)
WEIGHTS = (3, 3, 3, 2, 3, 5)  # of the categories in training
OTHER = "no problem"
OTHER_WEIGHT = 1
FOLLOWING = [
    "What comes after {e}?", "Which number follows {e}?", "What is the number after {e}?", "Count on from {e}.",
    "What follows {e}?",
]  # fmt: skip


def held_out(a: int, b: int) -> bool:
    """True if a pair of operands, in either order and with any operation, is kept for the examination."""
    return zlib.crc32(f"{min(a, b)} {max(a, b)}".encode()) % 8 == 0


def add(numbers: list[str]) -> list[str]:
    """Lines of a sum of two numbers, from the units up; the last one ends with the sum."""
    width = max(map(len, numbers))
    a, b = (number.zfill(width) for number in numbers)
    lines, result, carry = [f"{a}+{b}"], "", 0
    for at in reversed(range(width)):
        total = int(a[at]) + int(b[at]) + carry
        result = (str(total) if at == 0 else str(total % 10)) + result
        lines.append(f"{a[at]}+{b[at]}{'+1' * carry}={total} {result}")
        carry = total // 10
    return lines


def subtract(a: str, b: str) -> list[str]:
    """Lines of a difference, from the units up; a larger number is never taken from a smaller one."""
    width = max(len(a), len(b))
    a, b = a.zfill(width), b.zfill(width)
    lines = [f"{a}-{b}"]
    if int(a) < int(b):
        a, b = b, a
        lines.append(f"-({a}-{b})")
    result, borrow = "", 0
    for at in reversed(range(width)):
        rest = int(a[at]) - int(b[at]) - borrow
        result = str(rest % 10) + result
        lines.append(f"{a[at]}-{b[at]}{'-1' * borrow}{'+10' * (rest < 0)}={rest % 10} {result}")
        borrow = int(rest < 0)
    return lines


def multiply(a: str, b: str) -> list[str]:
    """Lines of a product: the longer number times each digit of the other, and the sum of both."""
    lines, parts = [f"{a}*{b}"], []
    if len(a) < len(b):
        a, b = b, a
        lines.append(f"{a}*{b}")
    for place, digit in enumerate(reversed(b)):
        result, carry = "", 0
        for at in reversed(range(len(a))):
            product = int(digit) * int(a[at])
            total = product + carry
            result = (str(total) if at == 0 else str(total % 10)) + result
            lines.append(f"{digit}*{a[at]}={product}{f'+{carry}={total}' if carry else ''} {result}")
            carry = total // 10
        parts.append(result + "0" * place)
    return lines + (add(parts) if len(parts) == 2 else [])


def work(sign: str, numbers: list[int]) -> tuple[list[str], int]:
    """(lines of the working, result)."""
    a, b = map(str, numbers[:2])
    if sign == "*":
        return multiply(a, b), numbers[0] * numbers[1]
    if sign == "-":
        return subtract(a, b), numbers[0] - numbers[1]
    if len(numbers) == 2:
        return add([a, b]), sum(numbers)
    whole, first = "+".join(map(str, numbers)), sum(numbers[:2])
    return [whole, *add([a, b]), *add([str(first), str(numbers[2])])], sum(numbers)


def operands(draw: Draw, category: str) -> list[int]:
    """Random operands of a category; the first two are a held-out pair if the draw is of held-out data."""

    def number(*digits: int) -> int:
        count = digits[int(draw.rng.random() * len(digits))]
        low = 10 ** (count - 1) if count > 1 else 0
        return low + int(draw.rng.random() * (10**count - low))

    while True:
        if category == "product":
            a, b = number(2), number(2)
        elif category == "product by a digit":
            a, b = number(1, 2, 2, 3, 3), number(1)
        else:
            a, b = number(1, 2, 2, 3, 3, 3), number(1, 2, 2, 3, 3, 3)
        if category.endswith("difference") and (a < b) != (category == "negative difference"):
            a, b = b, a
        if held_out(a, b) == draw.held_out and (a != b or category != "negative difference"):
            return [a, b, number(1, 2, 2)] if category == "long sum" else [a, b]


def prompt(category: str, question: str, name: str, lines: list[str], result: int) -> Prompt:
    """A question, and the answer with the working and the result of that name."""
    answer = "<think>\n" + "\n".join(lines) + f"\n</think>\n\nThe {name} is \\boxed{{{result}}}."
    return Prompt(category, [{"role": "user", "content": question}], [], {"role": "assistant", "content": answer})


def other(draw: Draw) -> Prompt:
    """A question from outside the world, which is refused."""
    talk = Dialogue(draw)
    (small_talk if draw.chance(0.5) else outside)(talk)
    return Prompt(OTHER, talk.messages[:1], [], {"role": "assistant", "content": REFUSAL})


def problem(draw: Draw, category: str, digit_first: float = 0.0) -> Prompt:
    """A random problem of a category; `digit_first` is the share of products by a digit that have the digit first."""
    sign = SIGNS[category]
    numbers = operands(draw, category)
    if category == "product by a digit" and digit_first and draw.chance(digit_first):
        numbers.reverse()
    lines, result = work(sign, numbers)
    template = draw.one(OPERATIONS[sign][0])
    if len(numbers) == 3:
        asked = draw.one(["+", " + "]).join(map(str, numbers))
    else:
        asked = template.format(a=numbers[0], b=numbers[1])
    question = draw.phrase(ASK_SUM, e=asked) + (" " + BOX if draw.chance(0.1) else "")
    name = {"+": "sum", "-": "difference", "*": "product"}[sign]
    return prompt(category, question, name, lines, result)


def following(draw: Draw) -> Prompt:
    """A problem of a new kind, which training never shows: its working is a known one, its question is not."""
    while True:
        number = int(draw.rng.random() * 1000)
        if held_out(number, 1) == draw.held_out:
            question = draw.one(FOLLOWING).format(e=number)
            return prompt("following", question, "number", add([str(number), "1"]), number + 1)


def sent_back(answer: Message) -> Message:
    """An answer as clients send it back with the next question: without its thoughts."""
    return answer | {"content": answer["content"].partition("</think>\n\n")[2]}


def conversations(
    seed: int, count: int, digit_first: float = 0.0, history: float = 0.0
) -> Iterator[list[Message]]:
    """Training conversations: mostly one problem, sometimes after a system message or other problems.

    Args:
        seed: the seed; equal seeds give equal conversations.
        count: number of conversations.
        digit_first: share of the products by a digit that have the digit first.
        history: share of the conversations that begin with one or two problems as clients send them back: answered
            without thoughts, or stopped before a word.
    """
    draw = Draw(f"train flash {seed}")

    def turn() -> list[Message]:
        category = draw.rng.choices((*CATEGORIES, OTHER), (*WEIGHTS, OTHER_WEIGHT))[0]
        made = other(draw) if category == OTHER else problem(draw, category, digit_first)
        return [*made.messages, made.answer]

    for _ in range(count):
        messages: list[Message] = []
        if draw.chance(0.15):
            messages.append({"role": "system", "content": draw.one(SYSTEMS[:12])})
        if history and draw.chance(history):
            for _ in range(2 if draw.chance(0.3) else 1):
                question, answer = turn()
                messages += [question, answer | {"content": ""} if draw.chance(0.15) else sent_back(answer)]
        for _ in range(2 if draw.chance(0.08) else 1):
            messages += turn()
        yield messages


def examination(seed: int, count: int = 500) -> list[Prompt]:
    """Held-out problems, one category after the other in rotation."""
    draw = Draw(f"examination flash {seed}", held_out=True)
    return [problem(draw, CATEGORIES[at % len(CATEGORIES)], digit_first=0.5) for at in range(count)]
