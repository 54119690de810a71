"""Writes small data sets in the formats of the public ones, with questions made up for this: `python make.py FOLDER`.

Each is a folder named like the data set on Hugging Face, whose README.md lists its configs, so that `--data FOLDER`
finds it. Nothing here is taken from the data sets themselves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

COLOURS = ["red", "blue", "green", "white", "black", "brown"]
MMLU = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management
    marketing medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology public_relations
    security_studies sociology us_foreign_policy virology world_religions
""".split()  # noqa: SIM905
MMLU_PRO = [
    "biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history", "law",
    "math", "other", "philosophy", "physics", "psychology",
]  # fmt: skip
BBH = """
    boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
    geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
    logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
    penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting
""".split()  # noqa: SIM905
MMMLU = """
    AR_XY BN_BD DE_DE ES_LA FR_FR HI_IN ID_ID IT_IT JA_JP KO_KR PT_BR SW_KE YO_NG ZH_CN
""".split()  # noqa: SIM905
MATH = """
    algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus
""".split()  # noqa: SIM905
MGSM = ["bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh"]


def write(folder: Path, configs: Sequence[str], splits: Mapping[str, Rows]) -> None:
    """Writes a data set whose configs all have the same rows."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["---", "configs:"]
    for config in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    for split, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)


def box(number: int) -> tuple[str, list[str], int]:
    """A question about a coloured box, with four options and the place of the right one."""
    colour = COLOURS[number % len(COLOURS)]
    options = [COLOURS[(number + step) % len(COLOURS)] for step in (1, 2, 3)]
    place = number % 4
    return (
        f"Box {number} is {colour}. Which colour is box {number}?",
        [*options[:place], colour, *options[place:]],
        place,
    )


def arc(number: int) -> dict[str, Any]:
    """ARC: labels are letters in most questions and numbers in some."""
    query, options, place = box(number)
    labels = ["1", "2", "3", "4"] if number % 5 == 3 else ["A", "B", "C", "D"]
    choices = {"text": options, "label": labels}
    return {"id": f"own-{number}", "question": query, "choices": choices, "answerKey": labels[place]}


def openbookqa(number: int) -> dict[str, Any]:
    """OpenBookQA."""
    row = arc(number) | {"question_stem": box(number)[0]}
    return {name: row[name] for name in ("id", "question_stem", "choices", "answerKey")}


def hellaswag(number: int) -> dict[str, Any]:
    """HellaSwag: the label is text, and empty in the test split."""
    _, options, place = box(number)
    context = f"A painter opens tin {number} of {COLOURS[number % 6]} paint."
    endings = [f"The wall becomes {option}." for option in options]
    return {
        "ind": number, "activity_label": "Painting", "ctx_a": context, "ctx_b": "", "ctx": context, "endings": endings,
        "source_id": f"own~{number}", "split": "val", "split_type": "indomain", "label": str(place),
    }  # fmt: skip


def piqa(number: int) -> dict[str, Any]:
    """PIQA."""
    right, wrong = f"Turn the lid of jar {number} to the left.", f"Paint the lid of jar {number}."
    pair = (right, wrong) if number % 2 == 0 else (wrong, right)
    return {"goal": f"How is jar {number} opened?", "sol1": pair[0], "sol2": pair[1], "label": number % 2}


def social_iqa(number: int) -> dict[str, Any]:
    """Social IQa: the label counts from 1."""
    names = ["Kim", "Lee", "Sam"]
    answers = [f"{name} was kind" for name in names]
    right = number % 3
    return {
        "context": f"{names[right]} gave away {number + 2} cakes.", "question": "Who was kind?",
        "answerA": answers[0], "answerB": answers[1], "answerC": answers[2], "label": str(right + 1),
    }  # fmt: skip


def winogrande(number: int) -> dict[str, Any]:
    """Winogrande."""
    options = ("cup", "pot") if number % 2 == 0 else ("pot", "cup")
    sentence = f"Tea {number} did not fit from the pot into the cup because the _ was too small."
    return {"sentence": sentence, "option1": options[0], "option2": options[1], "answer": str(number % 2 + 1)}


def boolq(number: int) -> dict[str, Any]:
    """BoolQ as in SuperGLUE."""
    passage = f"Lamp {number} is {'on' if number % 2 else 'off'}."
    return {"passage": passage, "question": f"is lamp {number} on", "idx": number, "label": number % 2}


def truthfulqa(number: int) -> dict[str, Any]:
    """TruthfulQA's multiple choice."""
    choices = [
        f"{number} and {number} is {2 * number}",
        f"It is {2 * number}",
        f"It is {2 * number + 1}",
        "Nobody knows",
    ]
    return {
        "question": f"What is {number} and {number}?",
        "mc1_targets": {"choices": choices, "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": choices, "labels": [1, 1, 0, 0]},
    }


def mmlu(number: int) -> dict[str, Any]:
    """MMLU."""
    query, options, place = box(number)
    return {"question": query, "subject": "own", "choices": options, "answer": place}


def mmlu_pro(number: int) -> dict[str, Any]:
    """MMLU-Pro."""
    query, options, place = box(number)
    thought = f"A: Let's think step by step. The text names the colour. The answer is ({'ABCD'[place]})."
    return {
        "question_id": number, "question": query, "options": options, "answer": "ABCD"[place], "answer_index": place,
        "cot_content": thought, "category": MMLU_PRO[number % len(MMLU_PRO)], "src": "own",
    }  # fmt: skip


def mmmlu(number: int) -> dict[str, Any]:
    """Multilingual MMLU: a test split only, with the subject in a column."""
    query, options, place = box(number)
    named = dict(zip("ABCD", options, strict=True))
    return {"Question": query, **named, "Answer": "ABCD"[place], "Subject": MMLU[number % len(MMLU)]}


def gpqa(number: int) -> dict[str, Any]:
    """GPQA: the right answer has a column of its own."""
    query, options, place = box(number)
    wrong = [option for at, option in enumerate(options) if at != place]
    named = {f"Incorrect Answer {at}": option for at, option in enumerate(wrong, 1)}
    return {"Question": query, "Correct Answer": options[place], **named}


def gsm8k(number: int) -> dict[str, Any]:
    """GSM8K."""
    question = f"A shelf has {number + 2} books, and {number + 3} are added. How many books are there?"
    return {"question": question, "answer": f"There are {2 * number + 5}.\n#### {2 * number + 5}"}


def mgsm(number: int) -> dict[str, Any]:
    """MGSM: the answer in words is empty in the test split."""
    return {
        "question": gsm8k(number)["question"],
        "answer": None,
        "answer_number": 2 * number + 5,
        "equation_solution": None,
    }


def math(number: int) -> dict[str, Any]:
    """MATH, and MATH-500 with the answer in a column."""
    answer = f"\\frac{{{number + 1}}}{{{number + 2}}}"
    solution = f"The quotient of {number + 1} and {number + 2} is $\\boxed{{{answer}}}$."
    problem = f"Divide {number + 1} by {number + 2}."
    return {"problem": problem, "level": "Level 1", "type": "Algebra", "solution": solution, "answer": answer}


def aime(number: int) -> dict[str, Any]:
    """AIME: the answer is a whole number."""
    return {"ID": f"own-{number}", "Problem": f"Find {number} + {number}.", "Solution": "Add.", "Answer": 2 * number}


def bbh(number: int) -> dict[str, Any]:
    """BIG-Bench Hard: options and a list of words, as the patterns of some of its parts expect."""
    text = f"not ( {number % 2 == 0} ) is\nOptions:\n(A) True\n(B) False\nList: pear apple"
    return {"input": text, "target": str(number % 2 == 1)}


def arena(number: int) -> dict[str, Any]:
    """Arena Hard's questions."""
    prompt = f"Write one sentence about {COLOURS[number % 6]} boxes."
    return {
        "question_id": f"own{number}",
        "category": "arena-hard-v0.1",
        "cluster": "Boxes",
        "turns": [{"content": prompt}],
    }


def main(folder: Path) -> None:
    """Writes every data set into a folder."""
    train = range(100, 112)

    def rows(make: Any, numbers: Sequence[int] = range(4)) -> Rows:
        return [make(number) for number in numbers]

    def known(make: Any) -> dict[str, Rows]:
        return {"train": rows(make, train), "validation": rows(make), "test": rows(make, range(4, 8))}

    write(folder / "allenai/ai2_arc", ["ARC-Challenge", "ARC-Easy"], known(arc))
    write(folder / "allenai/openbookqa", ["main"], known(openbookqa))
    write(folder / "Rowan/hellaswag", ["default"], {"train": rows(hellaswag, train), "validation": rows(hellaswag)})
    write(folder / "baber/piqa", ["default"], {"train": rows(piqa, train), "validation": rows(piqa)})
    write(folder / "lighteval/siqa", ["default"], {"train": rows(social_iqa, train), "validation": rows(social_iqa)})
    write(
        folder / "allenai/winogrande",
        ["winogrande_xl"],
        {"train": rows(winogrande, train), "validation": rows(winogrande)},
    )
    write(folder / "aps/super_glue", ["boolq"], {"train": rows(boolq, train), "validation": rows(boolq)})
    write(folder / "truthfulqa/truthful_qa", ["multiple_choice"], {"validation": rows(truthfulqa)})
    write(folder / "cais/mmlu", MMLU, {"dev": rows(mmlu, train[:5]), "test": rows(mmlu, range(2))})
    write(
        folder / "TIGER-Lab/MMLU-Pro",
        ["default"],
        {"validation": rows(mmlu_pro, range(100, 170)), "test": rows(mmlu_pro, range(14))},
    )
    write(folder / "openai/MMMLU", MMMLU, {"test": rows(mmmlu, range(57 * 6))})
    write(folder / "Idavidrein/gpqa", ["gpqa_main", "gpqa_diamond"], {"train": rows(gpqa)})
    write(folder / "openai/gsm8k", ["main"], {"train": rows(gsm8k, train), "test": rows(gsm8k)})
    write(folder / "juletxara/mgsm", MGSM, {"train": rows(mgsm, train[:2]), "test": rows(mgsm, range(2))})
    write(folder / "EleutherAI/hendrycks_math", MATH, {"train": rows(math, train[:2]), "test": rows(math, range(2))})
    write(folder / "HuggingFaceH4/MATH-500", ["default"], {"test": rows(math)})
    write(folder / "Maxwell-Jia/AIME_2024", ["default"], {"train": rows(aime)})
    write(folder / "SaylorTwift/bbh", BBH, {"test": rows(bbh, range(2))})
    questions = folder / "lmarena-ai/arena-hard-auto/data/arena-hard-v0.1/question.jsonl"
    questions.parent.mkdir(parents=True, exist_ok=True)
    questions.write_text("".join(json.dumps(arena(number)) + "\n" for number in range(2)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
