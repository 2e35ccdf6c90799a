"""The vocabulary of a GGUF from the tokenizer of a Hugging Face folder: what `gguf_tokenizer` reads, written.

A GGUF holds no rule of splitting, only the name of one, so a name is written when its rule splits as the tokenizer
does. And because a tokenizer that is nearly right gives text that is nearly right, the keys are read back before any
weight is written, and both tokenizers have to agree on every short string of characters of different kinds.
"""

import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from secateur.errors import ModelError
from secateur.models.gguf_config import END_TOKENS
from secateur.models.gguf_file import GGUFFile, Value
from secateur.models.gguf_tokenizer import (
    BYTE,
    CONTROL,
    LLAMA3_PRE,
    NORMAL,
    SPACE,
    SPECIAL_ROLES,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    joins,
    splitter,
    write_tokenizer,
)
from secateur.models.gguf_writer import write_gguf
from secateur.models.source import read_json

# One character of each kind that some published way to split tells apart, and words that some keep together.
_KINDS = ("a", "B", "é", "\u0301", "中", "🙂", "1", "½", " ", "\u00a0", "\n", "\r", "\t", ".", "/", "'", "_")
_WORDS = (
    *("123456789", "12 345", "٣٤٥٦", "don't", "DON'T", "we'll", "I'M", "it's 5's", "camelCaseHTTPServer", "👩‍👩‍👧"),
    *("it'sso", "IT'SSO"),
    *("a   b    ", "  \n\n  \n", "x\t\ty\r\n", "f'{a!r}' != \"b\" ...?!\n\n"),
    "def f(x):\n    return x ** 2  # 你好, naïve\n",
)


def probes() -> list[str]:
    """Return texts on which two tokenizers that split differently differ."""
    short = ("".join(kinds) for length in (1, 2, 3) for kinds in itertools.product(_KINDS, repeat=length))
    return [*short, *_WORDS, " ".join(_WORDS)]


@dataclass(frozen=True)
class _Folder:
    """The tokenizer files of a model folder."""

    path: Path
    tokenizer: Tokenizer
    content: dict[str, Any]  # tokenizer.json
    settings: dict[str, Any]  # tokenizer_config.json and special_tokens_map.json
    generation: dict[str, Any]  # generation_config.json


def vocabulary_metadata(folder: Path, config: Mapping[str, Any], architecture: str) -> dict[str, Value]:
    """Return the keys of a GGUF that tell about the vocabulary.

    Parameters
    ----------
    folder
        A model folder with `tokenizer.json`.
    config
        Its configuration; the embedding has `vocab_size` rows, and rows without a token get a filler.
    architecture
        `general.architecture` of the GGUF.

    Raises
    ------
    ModelError
        If the tokenizer is missing, or is of a kind that would come back as another one.
    """
    source = _open(folder)
    tokens, kinds = _tokens(source, config["vocab_size"])
    sentencepiece = source.content["model"].get("byte_fallback")
    keys = _sentencepiece(source, tokens, kinds) if sentencepiece else _byte_level(source)
    keys |= {"tokens": [*tokens], "token_type": [*kinds]}
    for role, name in SPECIAL_ROLES.items():
        if (token := _special(source, name)) is not None:
            keys[f"{role}_token_id"] = token
    keys |= _ends(source, config, tokens, _special(source, "eos_token"))
    keys |= _added(source, keys)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    if (template := _chat_template(source)) is not None:
        metadata["tokenizer.chat_template"] = template
    _check(source, metadata, architecture)
    return metadata


def _open(folder: Path) -> _Folder:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json, from which a GGUF gets its vocabulary; fetch it again")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"the tokenizer in {folder} cannot be read ({error}); fetch the model again") from error
    content = read_json(path)
    if content["model"].get("type") != "BPE":
        raise ModelError(
            f"the tokenizer in {folder} is of the kind {content['model'].get('type')!r}; byte-level and sentencepiece "
            "BPE can be written as a GGUF"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    optional = {
        name: read_json(folder / name) if (folder / name).exists() else {}
        for name in ("special_tokens_map.json", "tokenizer_config.json", "generation_config.json")
    }
    given = {key: value for key, value in optional["tokenizer_config.json"].items() if value is not None}
    return _Folder(
        folder, tokenizer, content, optional["special_tokens_map.json"] | given, optional["generation_config.json"]
    )


def _tokens(source: _Folder, rows: int) -> tuple[list[str], list[int]]:
    """Return text and kind of the token of each row of the embedding, fillers included."""
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [UNUSED] * rows
    vocabulary = source.tokenizer.get_vocab(with_added_tokens=True)
    if (last := max(vocabulary.values(), default=-1)) >= rows:
        raise ModelError(f"the tokenizer in {source.path} has a token {last} but the embedding only {rows} rows")
    bytes_ = source.content["model"].get("byte_fallback")
    for token, i in vocabulary.items():
        tokens[i], kinds[i] = token, BYTE if bytes_ and len(token) == 6 and token.startswith("<0x") else NORMAL
    for i, added in source.tokenizer.get_added_tokens_decoder().items():
        kinds[i] = CONTROL if added.special else USER_DEFINED
    unknown = source.content["model"].get("unk_token")
    if bytes_ and unknown in vocabulary:
        kinds[vocabulary[unknown]] = UNKNOWN
    return tokens, kinds


def _merges(source: _Folder) -> list[tuple[str, str]]:
    """Return the merges in order; a file has them as pairs or, if it is older, as texts with a space."""
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in source.content["model"]["merges"]]
    return [(left, right) for left, right in merges]


def _byte_level(source: _Folder) -> dict[str, Value]:
    """Return kind, split and merges of a byte-level BPE tokenizer (GPT-2 and its heirs)."""
    merges = _merges(source)
    if any(" " in part for pair in merges for part in pair) or not merges:
        raise ModelError(f"the tokenizer in {source.path} is no byte-level BPE with merges, as a GGUF needs it")
    return {
        "model": "gpt2",
        "pre": _split_name(source),
        "merges": [f"{left} {right}" for left, right in merges],
    }


def _split_name(source: _Folder) -> str:
    """Return `tokenizer.ggml.pre`: the name of the way to split that gives the same words for all probes."""
    texts = probes()
    wanted = [_words(source.tokenizer, text) for text in texts]
    whole_words = bool(source.content["model"].get("ignore_merges"))
    for names in SPLITS:
        other = splitter(names[0])
        if whole_words == (names is LLAMA3_PRE) and all(
            _words(other, text) == words for text, words in zip(texts, wanted, strict=True)
        ):
            return names[0]
    known = ", ".join(names[0] for names in SPLITS)
    raise ModelError(
        f"the tokenizer in {source.path} splits text in a way that has no name here; known are {known}: "
        "export it with `--format dense`, and convert that folder with llama.cpp's own converter"
    )


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return what is merged apart: text normalised, split, and mapped to the characters of the vocabulary."""
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer is not None else text
    if tokenizer.pre_tokenizer is None:
        return [normal]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def _sentencepiece(source: _Folder, tokens: list[str], kinds: list[int]) -> dict[str, Value]:
    """Return kind and scores of a sentencepiece BPE tokenizer.

    llama.cpp joins the two neighbours whose union has the best score. tokenizer.json has no scores; the order of its
    merges is that of the scores.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    merges = _merges(source)
    order = [i for i, _ in itertools.groupby(ids[left + right] for left, right in merges)]
    # What no merge makes is a single character, or is taken whole: it must not win where it could be joined.
    scores = [-float(len(order))] * len(tokens)
    for rank, i in enumerate(order):
        scores[i] = -float(rank)
    possible = {pair for pair in joins(ids, scores) if kinds[ids["".join(pair)]] == NORMAL}
    if len(order) != len({*order}) or possible != {*merges}:
        raise ModelError(
            f"the merges of the tokenizer in {source.path} are not those of sentencepiece, which a GGUF would apply; "
            "export it with `--format dense`"
        )
    words = _words(source.tokenizer, "a")
    return {"model": "llama", "pre": "default", "scores": [*scores], "add_space_prefix": words[0].startswith(SPACE)}


def _special(source: _Folder, name: str) -> int | None:
    """Return the id of a special token, such as `bos_token`."""
    said = source.settings.get(name)
    text = said.get("content") if isinstance(said, dict) else said
    return source.tokenizer.token_to_id(text) if isinstance(text, str) else None


def _ends(source: _Folder, config: Mapping[str, Any], tokens: list[str], eos: int | None) -> dict[str, Value]:
    """Return the ids that end a text: the tokenizer's own, and those that a reader would not know by their names."""
    found: list[Any] = [eos]
    for said in (source.generation.get("eos_token_id"), config.get("eos_token_id")):
        found += said if isinstance(said, list) else [said]
    ends = list(dict.fromkeys(end for end in found if type(end) is int and 0 <= end < len(tokens)))
    others = [end for end in ends[1:] if tokens[end] not in END_TOKENS]
    return dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), [*ends[:1], *others], strict=False))


def _added(source: _Folder, keys: Mapping[str, Value]) -> dict[str, Value]:
    """Return whether encoding a text puts the begin and the end of sequence around it."""
    bare, whole = (source.tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
    bos = len(whole) > len(bare) and whole[0] == keys.get("bos_token_id")
    eos = len(whole) > len(bare) and whole[-1] == keys.get("eos_token_id") and len(whole) - len(bare) > bos
    return {"add_bos_token": bos, "add_eos_token": eos}


def _chat_template(source: _Folder) -> str | None:
    """Return the template for conversations; where there are several, the one named default."""
    path = source.path / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    said = source.settings.get("chat_template")
    if isinstance(said, list):
        said = next((one.get("template") for one in said if one.get("name") == "default"), None)
    return said if isinstance(said, str) else None


def _check(source: _Folder, metadata: Mapping[str, Value], architecture: str) -> None:
    """Read the keys back; raises `ModelError` unless the tokenizer encodes as the one in the folder does."""
    with tempfile.TemporaryDirectory(prefix="secateur-") as name:
        path = Path(name) / "vocabulary.gguf"
        write_gguf(path, architecture, {f"{architecture}.context_length": 1, **metadata}, {})
        write_tokenizer(GGUFFile(path), path.parent)
        written = Tokenizer.from_file(str(path.parent / "tokenizer.json"))
    added = [token.content for token in source.tokenizer.get_added_tokens_decoder().values()]
    texts = [*probes(), *added, *(f"x {token}" for token in added)]
    if metadata.get("tokenizer.ggml.add_space_prefix"):
        # Sentencepiece puts a space before a space too, some tokenizers made from it do not; llama.cpp does.
        texts = [text for text in texts if not text.startswith(" ")]
    for special in (False, True):
        ours, theirs = (one.encode_batch(texts, add_special_tokens=special) for one in (written, source.tokenizer))
        for text, one, other in zip(texts, ours, theirs, strict=True):
            if one.ids != other.ids:
                raise ModelError(
                    f"the tokenizer in {source.path} encodes {text!r} as {other.ids}, the one of a GGUF would as "
                    f"{one.ids}; export it with `--format dense`, and convert that with llama.cpp's own converter"
                )
