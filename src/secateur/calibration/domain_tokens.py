"""What a domain's text and a tokenizer say of which tokens a model for that domain needs."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from secateur.calibration.documents import Document
from secateur.calibration.spans import no_length_warning, random_numbers

MAX_CHARACTERS = 32_000_000  # of each domain: about half a minute
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # of sentencepiece; those of byte-level tokenizers are its alphabet
ROLES = ("system", "user", "assistant")


def sample(documents: Sequence[Document], seed: int, key: str) -> Iterator[str]:
    """Yield texts in a seeded order until there are enough characters; `key` says whose order it is."""
    draws = random_numbers(seed, f"shortlist of {key}", len(documents))
    left = MAX_CHARACTERS
    for index in sorted(range(len(documents)), key=draws.__getitem__):
        if left <= 0:
            return
        left -= len(documents[index].text)
        yield documents[index].text


def encoded(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Yield the token ids of each text, without special tokens around it."""
    with no_length_warning():
        for text in texts:
            yield list(tokenizer(text, add_special_tokens=False).input_ids)


def chat_texts(tokenizer: Any) -> Iterator[str]:
    """Yield a chat as the tokenizer's template renders it, and the words in the template itself."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return
    yield from template.values() if isinstance(template, dict) else [template]
    for roles in (ROLES, ROLES[1:]):
        messages = [{"role": role, "content": "x"} for role in roles]
        for open_end in (True, False):
            try:
                yield tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_end)
            except Exception:  # noqa: BLE001, S112 - a template raises what it likes about roles that it does not know
                continue


def vocabulary_texts(tokenizer: Any) -> dict[int, str]:
    """Return what each token stands for, alone; a part of a character is no ASCII."""
    return {index: tokenizer.convert_tokens_to_string([token]) for token, index in tokenizer.get_vocab().items()}


def indispensable(tokenizer: Any, words: dict[int, str]) -> Iterator[int]:
    """Yield special and added tokens, the single bytes, and the tokens of white space, which indent lines."""
    alphabet = set(ByteLevel.alphabet())
    yield from tokenizer.all_special_ids
    yield from tokenizer.get_added_vocab().values()
    for token, index in tokenizer.get_vocab().items():
        if token in alphabet or BYTE_TOKEN.fullmatch(token):
            yield index
    yield from (index for index, text in words.items() if text and not text.strip())
