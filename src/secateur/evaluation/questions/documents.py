"""Files of questions as they are published, read into documents of lm-eval's tasks."""

import json
import re
from collections.abc import Iterator
from typing import Any

Documents = list[dict[str, Any]]


def word_problems(text: str) -> Iterator[dict[str, Any]]:
    """Give GSM8K's questions, each with the answer that ends in `#### RESULT`."""
    for one in _records(text):
        yield {"question": _text(one["question"]), "answer": _text(one["answer"])}


def choices(text: str, *, remove: str = "") -> Iterator[dict[str, Any]]:
    """Give query, choices and the number of the right one; `remove` is a pattern of what is no part of a query."""
    for one in _records(text):
        query = re.sub(remove, "", _text(one["query"])) if remove else _text(one["query"])
        yield _choice(query, one["choices"], one["gold"])


def goals(text: str) -> Iterator[dict[str, Any]]:
    """Give PIQA's goals; the files end each with a line break."""
    yield from choices(text, remove=r"\s+\Z")


def yes_or_no(text: str) -> Iterator[dict[str, Any]]:
    """Give passages with their question; choices are always no and yes."""
    for one in choices(text, remove=r"\APassage: "):
        if [choice.strip() for choice in one["choices"]] != ["no", "yes"]:
            raise ValueError(f"choices are {one['choices']}, expected no and yes")
        yield one


def two_beginnings(text: str) -> Iterator[dict[str, Any]]:
    """Give the two beginnings of a sentence, how it goes on, and the number of the right beginning."""
    for one in _records(text):
        yield _choice(_text(one["continuation"]).strip(), one["context_options"], one["gold"])


def six_lines(text: str) -> Iterator[dict[str, Any]]:
    """Give HellaSwag's documents from groups of six lines: the beginning, the number of the right ending, four endings.

    Text in brackets is left over from WikiHow's pages, and taken away as lm-eval does. The words that an ending goes on
    from begin with a capital letter there (`he` becomes `He`), which is done, too.
    """
    lines = text.split("\n")
    lines = lines[:-1] if lines and not lines[-1] else lines
    if len(lines) % 6:
        raise ValueError(f"{len(lines)} lines are no groups of six")
    for place in range(0, len(lines), 6):
        beginning, gold, *endings = lines[place : place + 6]
        yield _choice(_plain(_capital(beginning)), [_plain(one) for one in endings], int(gold))


def _plain(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _capital(text: str) -> str:
    """Capitalise the words behind the last full stop if they begin with a small letter: they are another field."""
    before, stop, rest = text.rpartition(". ")
    return before + stop + rest.capitalize() if stop and rest[:1].islower() else text


def _records(text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is no object")
            yield record


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} where text is expected")
    return value


def _choice(query: str, found: object, gold: object) -> dict[str, Any]:
    if not isinstance(found, list) or len(found) < 2:
        raise ValueError(f"choices are {found!r}, expected two or more")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(found):
        raise ValueError(f"the right choice is {gold!r} of {len(found)}")
    return {"query": query, "choices": [_text(one) for one in found], "gold": gold}
