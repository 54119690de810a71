"""Accuracy of a model on held-out prompts of the world of an embedded package.

    python examples/demo/evaluate.py [--package demo-flash] [--model FOLDER] [--beside FOLDER] [--count 500]

An answer is right if the number in its box is; one without a box must match exactly.

`--package demo-multimodal` asks 300 questions about pictures and 200 about sound, some about both, and whether answers
follow a picture that is swapped for another; `--count 30` asks a tenth.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import corpus
import examination
import problems

from phi4_mlx import Tokenizer, load
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.model import LanguageModel

SEED = 1
MULTIMODAL = "demo-multimodal"
PACKAGES = {"demo": corpus.prompts, "demo-flash": problems.examination}


def reply(model: LanguageModel, tokenizer: Tokenizer, prompt: list[int], max_tokens: int = 160) -> list[int]:
    """The greedy answer without its end marker."""
    ids: list[int] = []
    for token, _ in generate_step(prompt, model, max_tokens=max_tokens):
        if token in tokenizer.eos_ids:
            break
        ids.append(token)
    return ids


def question_and_answer(tokenizer: Tokenizer, prompt: corpus.Prompt) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the one right answer)."""
    tools = [tool.declaration for tool in prompt.tools] or None
    asked = tokenizer.apply_chat_template(prompt.messages, tools=tools, add_generation_prompt=True)
    answered = tokenizer.apply_chat_template([*prompt.messages, prompt.answer], tools=tools, add_generation_prompt=True)
    return asked, answered[len(asked) : -2]  # without <|end|> and <|assistant|>


def examine_media(
    model: LanguageModel, tokenizer: Tokenizer, count: int, seed: int, mistakes: int
) -> dict[str, list[int]]:
    """ "medium: category" -> [right, asked]; prints the first `mistakes` wrong answers of each medium."""
    pairs = list(examination.swapped(count // 6, seed))
    media = {
        "pictures": list(examination.about_pictures(count, seed)),
        "sound": list(examination.about_sound(count * 2 // 3, seed)),
        "both": list(examination.about_both(count // 6, seed)),
        "swapped": [case for pair in pairs for case in pair],
    }
    result: dict[str, list[int]] = {}
    for medium, cases in media.items():
        left = mistakes
        for case in cases:
            prompt = tokenizer.apply_chat_template(case.messages)
            given = tokenizer.decode(reply(model, tokenizer, prompt))
            row = result.setdefault(f"{medium}: {case.category}", [0, 0])
            row[0] += given == case.answer
            row[1] += 1
            if given != case.answer and left > 0:
                left -= 1
                print(f"{medium}: {case.content[-1].get('text', '')} right {case.answer!r}, given {given!r}")
    return result


def boxed(text: str) -> str | None:
    """The number in the box of an answer."""
    found = re.search(r"\\boxed\{(-?\d+)\}", text)
    return found and found[1]


def examine(
    model: LanguageModel, tokenizer: Tokenizer, prompts: list[corpus.Prompt], mistakes: int = 0
) -> dict[str, list[int]]:
    """Category -> [right, asked]; prints the first `mistakes` wrong answers."""
    right: Counter[str] = Counter()
    asked = Counter(prompt.category for prompt in prompts)
    for prompt in prompts:
        question, answer = question_and_answer(tokenizer, prompt)
        given = reply(model, tokenizer, question)
        wanted = boxed(tokenizer.decode(answer))
        is_right = given == answer if wanted is None else boxed(tokenizer.decode(given)) == wanted
        right[prompt.category] += is_right
        if not is_right and mistakes > 0:
            mistakes -= 1
            print(f"{prompt.category}: {prompt.messages[-1]['content'][-300:]!r}")
            print(f"  right {tokenizer.decode(answer)!r}\n  given {tokenizer.decode(given)!r}")
    return {category: [right[category], count] for category, count in asked.items()}


def share(result: dict[str, list[int]]) -> float:
    """Percent right."""
    return 100 * sum(right for right, _ in result.values()) / sum(asked for _, asked in result.values())


def main() -> None:
    """Prints wrong answers and a Markdown table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", choices=[*PACKAGES, MULTIMODAL], default="demo", help="the world to ask about")
    parser.add_argument("--model", help="the model to ask (default: the package)")
    parser.add_argument("--beside", type=Path, help="a second model, such as the unquantised one, on the same prompts")
    parser.add_argument("--count", type=int, help="number of prompts (default: 500; 300 about pictures)")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--mistakes", type=int, default=10, help="number of wrong answers to print")
    options = parser.parse_args()
    names = [options.model or options.package] + ([options.beside] if options.beside else [])
    results: dict[str, dict[str, list[int]]] = {}
    for name in names:
        model, tokenizer = load(name)
        if options.package == MULTIMODAL:
            results[str(name)] = examine_media(model, tokenizer, options.count or 300, options.seed, options.mistakes)
        else:
            prompts = PACKAGES[options.package](options.seed, options.count or 500)
            results[str(name)] = examine(model, tokenizer, prompts, options.mistakes)
    print("| category |" + "".join(f" {name} |" for name in results))
    print("|---|" + "---|" * len(results))
    categories = dict.fromkeys(category for result in results.values() for category in result)
    for category in categories:
        cells = (result.get(category, [0, 0]) for result in results.values())
        print(f"| {category} |" + "".join(f" {right} of {asked} |" for right, asked in cells))
    for medium in dict.fromkeys(category.partition(":")[0] for category in categories if ":" in category):
        parts = (
            {key: row for key, row in result.items() if key.startswith(f"{medium}:")} for result in results.values()
        )
        print(f"| {medium} |" + "".join(f" {share(part):.1f} % |" for part in parts))
    print("| all |" + "".join(f" {share(result):.1f} % |" for result in results.values()))
    print(json.dumps({name: {"percent": round(share(result), 2), **result} for name, result in results.items()}))


if __name__ == "__main__":
    main()
