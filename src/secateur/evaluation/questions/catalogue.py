"""The tasks of lm-eval that have a name here, and where their documents lie.

A task is asked as lm-eval asks it. Its documents come from a data folder where they are there, and else from the hub,
where lm-eval itself gets them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from secateur.evaluation.questions.documents import choices, goals, six_lines, two_beginnings, word_problems, yes_or_no


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
    own_settings
        In place of that, the file below lm-eval's tasks whose settings serve as they are: documents have the same
        fields.
    metric
        The one by which models are compared, as lm-eval calls it: METRIC or METRIC,FILTER.
    shots
        How many solved examples stand before each question.
    """

    name: str
    description: str
    stock: str
    file: str = ""
    read: Callable[[str], Iterator[dict[str, Any]]] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    own_settings: str = ""
    metric: str = "acc"
    shots: int = 0


def _metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


_MULTIPLE_CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}\nAnswer:",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "metric_list": _metrics("acc", "acc_norm"),
}
_ONLY_ACC = {"metric_list": _metrics("acc")}
# Winogrande asks for the likelihood of the end behind either beginning: lm-eval reads a number here as "many inputs".
_BEGINNINGS = {"doc_to_text": "gold", "doc_to_target": "query", **_ONLY_ACC}


def _choice(name: str, description: str, stock: str, file: str, read: Any = choices, **config: Any) -> Question:
    return Question(name, description, stock, f"commonsense/{file}", read, {**_MULTIPLE_CHOICE, **config})


QUESTIONS: dict[str, Question] = {
    one.name: one
    for one in (
        Question(
            "gsm8k",
            "1,319 word problems of school mathematics, after 8 that are solved step by step; share of right results",
            "gsm8k_cot",
            "gsm8k/test.jsonl",
            word_problems,
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
        _choice("piqa", "1,838 everyday goals, and which of two ways works", "piqa", "piqa.jsonl", goals),
        _choice("winogrande", "1,267 sentences, and whom their end is about", "winogrande", "winogrande.jsonl",
                two_beginnings, **_BEGINNINGS),
        Question("rte", "277 pairs of sentences, and whether one follows from the other (only from the hub)", "rte"),
    )
}  # fmt: skip
