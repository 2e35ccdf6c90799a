"""The tasks of lm-eval that have a name here, and how files that lie on the disk become their documents.

A task is asked as lm-eval asks it. Its documents come from a data folder where they are there, in the layout in which
MosaicML's llm-foundry and OpenAI publish them, and else from the hub, where lm-eval itself gets them.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Documents = list[dict[str, Any]]


@dataclass(frozen=True)
class Question:
    """A task of lm-eval.

    Attributes
    ----------
    name, description
        As users see them.
    stock
        What lm-eval calls it.
    file
        Where its documents lie in a data folder, below `benchmarks`; empty where only the hub has them.
    read
        Gives the documents of the file's text.
    config
        Of lm-eval's task over these documents, beside what all have in common.
    metric
        The one by which models are compared, as lm-eval calls it: METRIC or METRIC,FILTER.
    shots
        How many solved examples stand before each question.
    own_settings
        The file below lm-eval's tasks whose settings serve as they are, where documents have the same fields.
    """

    name: str
    description: str
    stock: str
    file: str = ""
    read: Callable[[str], Iterator[dict[str, Any]]] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    metric: str = "acc"
    shots: int = 0
    own_settings: str = ""


def records(text: str) -> Iterator[dict[str, Any]]:
    """Give the records of JSON lines."""
    import json

    for line in text.split("\n"):
        if line.strip():
            yield json.loads(line)


def choices(text: str, *, remove: str = "") -> Iterator[dict[str, Any]]:
    """Give query, choices and the number of the right one; `remove` is a pattern of what is no part of a query."""
    for one in records(text):
        query = re.sub(remove, "", one["query"]) if remove else one["query"]
        yield {"query": query, "choices": [str(choice) for choice in one["choices"]], "gold": int(one["gold"])}


def yes_or_no(text: str) -> Iterator[dict[str, Any]]:
    """Give passages with their question; choices are always no and yes."""
    for one in choices(text, remove=r"\APassage: "):
        if [choice.strip() for choice in one["choices"]] != ["no", "yes"]:
            raise ValueError(f"choices are {one['choices']}, expected no and yes")
        yield one


def two_beginnings(text: str) -> Iterator[dict[str, Any]]:
    """Give the two beginnings of a sentence, how it goes on, and the number of the right beginning."""
    for one in records(text):
        yield {"choices": list(one["context_options"]), "query": one["continuation"].strip(), "gold": int(one["gold"])}


def six_lines(text: str) -> Iterator[dict[str, Any]]:
    """Give HellaSwag's documents from groups of six lines: the beginning, the number of the right ending, four endings.

    Text in brackets is left over from WikiHow's pages, and taken away as lm-eval does.
    """
    lines = text.split("\n")
    lines = lines[:-1] if lines and not lines[-1] else lines
    if len(lines) % 6:
        raise ValueError(f"{len(lines)} lines are no groups of six")
    for place in range(0, len(lines), 6):
        beginning, gold, *endings = lines[place : place + 6]
        yield {"query": _plain(beginning), "choices": [_plain(one) for one in endings], "gold": int(gold)}


def _plain(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


_MULTIPLE_CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}\nAnswer:",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "metric_list": _metrics("acc", "acc_norm"),
}


def _choice(name: str, description: str, stock: str, file: str, read: Any = choices, **config: Any) -> Question:
    return Question(name, description, stock, f"commonsense/{file}", read, {**_MULTIPLE_CHOICE, **config})


def _goals(text: str) -> Iterator[dict[str, Any]]:
    """PIQA's goals, some of which end in white space."""
    yield from choices(text, remove=r"\s+\Z")


_ONLY_ACC = {"metric_list": _metrics("acc")}
# Winogrande asks for the likelihood of the end behind either beginning: lm-eval reads a number here as "many inputs".
_BEGINNINGS = {"doc_to_text": "gold", "doc_to_target": "query", **_ONLY_ACC}

QUESTIONS: dict[str, Question] = {
    one.name: one
    for one in (
        Question(
            "gsm8k",
            "1,319 word problems of school mathematics, after 8 that are solved step by step; share of right results",
            "gsm8k_cot",
            "gsm8k/test.jsonl",
            records,
            own_settings="gsm8k/gsm8k-cot.yaml",
            metric="exact_match,flexible-extract",
            shots=8,
        ),
        _choice("arc-easy", "2,376 questions of school science, multiple choice", "arc_easy", "arc_easy.jsonl"),
        _choice("arc-challenge", "1,172 harder ones", "arc_challenge", "arc_challenge.jsonl"),
        _choice("boolq", "3,270 yes-or-no questions about a passage", "boolq", "boolq.jsonl", yes_or_no, **_ONLY_ACC),
        _choice("hellaswag", "10,042 beginnings, and which of four endings follows", "hellaswag",
                "hellaswag_val_full.txt", six_lines, doc_to_text="query"),
        _choice("openbookqa", "500 questions of elementary science", "openbookqa", "openbook_qa.jsonl",
                doc_to_text="query"),
        _choice("piqa", "1,838 everyday goals, and which of two ways works", "piqa", "piqa.jsonl", _goals),
        _choice("winogrande", "1,267 sentences, and whom their end is about", "winogrande", "winogrande.jsonl",
                two_beginnings, **_BEGINNINGS),
        Question("rte", "277 pairs of sentences, and whether one follows from the other (only from the hub)", "rte"),
    )
}  # fmt: skip
