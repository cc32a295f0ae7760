"""From a row of a public source to a record, byte for byte as LLM-Adapters phrased its data sets.

Instruction wording: the JSON files of AGI-Edgerunners/LLM-Adapters (ODC-By 1.0). Where options contain brackets, AQuA
follows the spacing of those files (every bracket got a blank outside), odd as it looks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from inlay.tasks.equations import worked
from inlay.tasks.task import Record, Row

LETTERS = "ABCDE"


def _choice(instruction: str, options: Sequence[str], index: int) -> Record:
    """The record of a multiple-choice question whose gold option is `options[index]`, counted from 0."""
    if not 0 <= index < len(options):
        raise ValueError(f"label {index + 1} of {len(options)} options")
    text = f"{instruction}Answer format: {'/'.join(options)}"
    return Record(text, "", f"the correct answer is {options[index]}", options[index])


def _listed(word: str, texts: Sequence[str]) -> str:
    return " ".join(f"{word}{i}: {text}" for i, text in enumerate(texts, 1))


def _names(word: str, count: int) -> list[str]:
    return [f"{word}{i}" for i in range(1, count + 1)]


def boolq(row: Row) -> Record:
    """`google/boolq`. The passage is left out, as published: the question is asked closed-book."""
    head = f"Please answer the following question with true or false, question: {row['question']}?\n\n"
    return _choice(head, ["true", "false"], 0 if row["answer"] else 1)


def piqa(row: Row) -> Record:
    """`piqa`: label 0 or 1."""
    head = f"Please choose the correct solution to the question: {row['goal']}\n\n"
    head += f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}\n\n"
    return _choice(head, _names("solution", 2), int(row["label"]))


def _answers(question: str, texts: Sequence[str], index: int) -> Record:
    head = f"Please choose the correct answer to the question: {question}\n\n{_listed('Answer', texts)}\n\n"
    return _choice(head, _names("answer", len(texts)), index)


def siqa(row: Row) -> Record:
    """`social_i_qa`: label "1", "2" or "3"."""
    texts = [row["answerA"], row["answerB"], row["answerC"]]
    return _answers(f"{row['context']} {row['question']}", texts, int(row["label"]) - 1)


def _science(question: str, row: Row) -> Record:
    choices = row["choices"]
    return _answers(question, choices["text"], list(choices["label"]).index(row["answerKey"]))


def arc(row: Row) -> Record:
    """`allenai/ai2_arc`: three to five choices, keys A-E or 1-5."""
    return _science(row["question"], row)


def obqa(row: Row) -> Record:
    """`allenai/openbookqa`, without the fact."""
    return _science(row["question_stem"], row)


def hellaswag(row: Row) -> Record:
    """`Rowan/hellaswag`: label "0" to "3"; `[header]`, `[title]` and `[step]` marks stay in."""
    head = "Please choose the correct ending to complete the given sentence: "
    head += f"{row['activity_label']}: {row['ctx']}\n\n{_listed('Ending', row['endings'])}\n\n"
    return _choice(head, _names("ending", 4), int(row["label"]))


def winogrande(row: Row) -> Record:
    """`allenai/winogrande`: answer "1" or "2". Only a blank stands before `Answer format`."""
    head = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    head += f"{row['sentence']}\n\n{_listed('Option', [row['option1'], row['option2']])} "
    return _choice(head, _names("option", 2), int(row["answer"]) - 1)


def _spoken(value: float | int | str) -> str:
    """A number as one says it: 15.0 is `15`."""
    number = float(value)
    return str(int(number)) if number.is_integer() else str(value)


def solved(row: Row) -> Record:
    """Kojima et al.'s JSON of AddSub, MultiArith, SingleEq: `sQuestion`, `lEquations`, `lSolutions`; blanks kept."""
    answer = row["lSolutions"][0]
    chain = worked(row["lEquations"][0], answer) if row.get("lEquations") else None
    return Record(row["sQuestion"], "", chain or f"The answer is {_spoken(answer)}", str(answer))


def multiarith(row: Row) -> Record:
    """`ChilleD/MultiArith`: `question`, `final_ans`."""
    answer = str(row["final_ans"]).replace(",", "").strip()
    return Record(row["question"], "", f"The answer is {_spoken(answer)}", str(float(answer)))


def gsm8k(row: Row) -> Record:
    """`openai/gsm8k`: the solution without its calculator marks, then the number behind `####`."""
    chain, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("the answer has no '####'")
    answer = answer.strip().replace(",", "")
    chain = re.sub(r"<<[^<>]*>>", "", chain).strip()
    return Record(row["question"], "", f"{chain}\nThe answer is {answer}", str(float(answer)))


def svamp(row: Row) -> Record:
    """`ChilleD/SVAMP`: body, question and equation."""
    answer = float(row["Answer"])
    chain = worked(str(row.get("Equation", "")), answer) or f"The answer is {_spoken(answer)}"
    return Record(f"{row['Body'].strip()} {row['Question'].strip()}", "", chain, str(answer))


def aqua(row: Row) -> Record:
    """`deepmind/aqua_rat` (raw): options come as `A)text`; every bracket is spaced, as published."""
    options = ("(" + "(".join(row["options"])).replace("(", " (").replace(")", ") ")
    chain = f"{row['rationale'].strip()}\nThe answer is ({row['correct']})."
    return Record(f"{row['question'].strip()} Answer Choices:{options}", "", chain, row["correct"])


def mathqa(row: Row) -> Record:
    """`math_qa`: only the option letters are raised. (The published file raised every a-f: "DAtA inADEquAtE".)"""
    options = re.sub(r"\b([a-e])(?= \) )", lambda m: m[1].upper(), row["options"])
    answer = row["correct"].upper()
    chain = f"{row['Rationale'].strip()}\nThe answer is ({answer})."
    return Record(f"{row['Problem']} The options: {options}", "", chain, answer)


def mawps(row: Row) -> Record | None:
    """MWPToolkit's MAWPS splits: the worked equation is the chain; None where the equation does not give the answer."""
    chain = worked(row["equation"], row["ans"])
    return Record(row["original_text"], "", chain, str(row["ans"])) if chain else None
