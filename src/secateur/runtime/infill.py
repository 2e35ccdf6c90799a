"""Fill-in-the-middle: prompts that show a model what stands before and after the text that it is to write.

Families mark the parts with control tokens of their own, and are known by those that the tokenizer has. Whether a model
was trained with them nothing says: chat models often inherit the tokens of the code model beside them.

Here, unlike in a plain prompt, the caller's text is text only: files are full of strings such as `<|fim_middle|>`, and
one of them would end the prefix or the answer.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from secateur.errors import ModelError
from secateur.runtime.text import Codec, check_text


@dataclass(frozen=True)
class Family:
    """How a family of models marks the parts of an infill (Bavarian et al. 2022).

    Attributes
    ----------
    prefix, suffix
        Control tokens before the two parts.
    middle
        The control token after them, before the answer; None where the answer follows the second part at once.
    suffix_first
        Whether the suffix comes before the prefix.
    ends
        What may follow the answer, beside the tokens above and those that end any text; not every member has all.
    """

    name: str
    prefix: str
    suffix: str
    middle: str | None
    suffix_first: bool = False
    ends: tuple[str, ...] = ()

    def tokens(self) -> tuple[str, ...]:
        """Return the control tokens without which there is no infill."""
        return (self.prefix, self.suffix, *((self.middle,) if self.middle else ()))


FAMILIES = (
    Family(
        "Qwen2.5-Coder, CodeGemma", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
        ends=("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<|file_separator|>"),
    ),
    Family(
        "StarCoder", "<fim_prefix>", "<fim_suffix>", "<fim_middle>",
        ends=("<|endoftext|>", "<fim_pad>", "<file_sep>", "<repo_name>", "<filename>"),
    ),
    Family("SantaCoder", "<fim-prefix>", "<fim-suffix>", "<fim-middle>", ends=("<|endoftext|>", "<fim-pad>")),
    Family("DeepSeek-Coder", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ends=("<|EOT|>",)),  # noqa: RUF001 - spelled so
    Family("CodeLlama", "▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",)),
    Family("Codestral", "[PREFIX]", "[SUFFIX]", None, suffix_first=True, ends=("[MIDDLE]",)),
    Family("Seed-Coder", "<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", suffix_first=True),
)  # fmt: skip

_VISIBLE_SPACE = "\u2581"  # how sentencepiece writes a space
_ANCHOR = "\u263a"  # a character that no token joins with what follows


@dataclass(frozen=True)
class Infill:
    """An encoded request: the token ids of the prompt, and those that end the answer beside the usual ones."""

    prompt_ids: list[int]
    end_ids: frozenset[int]


def encode_infill(prefix: str, suffix: str, codec: Codec) -> Infill:
    """Encode a request for the text between `prefix` and `suffix`; both may be empty.

    What begins any text of this tokenizer begins the prompt, and stands nowhere else in it.

    Raises
    ------
    ModelError
        When the tokenizer has the tokens of no family.
    ConfigError
        When a part is no text.
    """
    check_text("prompt", prefix)
    check_text("suffix", suffix)
    family = find_family(codec)
    control = {*codec.special_tokens(), *family.tokens(), *family.ends}
    before = [*_ids([family.prefix], codec), *_encode(prefix, codec, control, begins=True)]
    after = [*_ids([family.suffix], codec), *_encode(suffix, codec, control, begins=False)]
    parts = (after, before) if family.suffix_first else (before, after)
    middle = _ids([family.middle] if family.middle else [], codec)
    ends = frozenset(_ids((*family.tokens(), *family.ends), codec))
    return Infill([*codec.encode(""), *parts[0], *parts[1], *middle], ends)


def find_family(codec: Codec) -> Family:
    """Return the family whose control tokens a tokenizer has; raises `ModelError` when there is none."""
    for family in FAMILIES:
        if len(_ids(family.tokens(), codec)) == len(family.tokens()):
            return family
    names = ", ".join(family.name for family in FAMILIES)
    raise ModelError(
        "this model has no tokens for fill-in-the-middle, so it takes no suffix; leave the suffix out, or use a model "
        f"of one of these families: {names}"
    )


def _ids(tokens: Iterable[str], codec: Codec) -> list[int]:
    """Return the ids of those tokens that the vocabulary has."""
    return [found for token in tokens if (found := codec.token_id(token)) is not None]


def _encode(text: str, codec: Codec, control: Iterable[str], *, begins: bool) -> list[int]:
    """Return the token ids of a text in which control tokens are text like any other.

    `begins`: whether it gets the space that some tokenizers put before a text. CodeLlama and Codestral were trained
    with it before the prefix, and without it before the suffix.
    """
    token_ids: list[int] = []
    spaced = _puts_space_first(codec)
    for piece in _cut(text, control):
        if spaced and not begins:
            token_ids += codec.encode_plain(_ANCHOR + piece)[len(codec.encode_plain(_ANCHOR)) :]
        else:
            token_ids += codec.encode_plain(piece)
        begins = False
    return token_ids


def _puts_space_first(codec: Codec) -> bool:
    first = codec.encode_plain("a")[0]
    return first in (codec.token_id(_VISIBLE_SPACE), codec.token_id(_VISIBLE_SPACE + "a"))


def _cut(text: str, control: Iterable[str]) -> Iterator[str]:
    """Yield a text in pieces, none of which holds a control token: each one is cut after its first character."""
    spellings = {spelling for token in control for spelling in (token, token.replace(_VISIBLE_SPACE, " "))}
    if found := [spelling for spelling in spellings if spelling in text]:
        anywhere = re.compile(f"(?={'|'.join(re.escape(spelling) for spelling in found)})")
        cuts = [match.start() + 1 for match in anywhere.finditer(text)]
        yield from (text[start:end] for start, end in pairwise([0, *cuts, len(text)]) if start < end)
    elif text:
        yield text
