"""The same model with fewer tokens: the rows of the others leave embedding and head, and text is split into the rest.

For tokenizers of byte pairs (BPE): a token is made by merges, so those that lead to it are kept with it, and a text
that had a token that is gone is split into the pieces from which it would have been made. Every text can still be
written. Ids are counted anew, in the old order. What comes out is an ordinary folder, which is kept in the cache.
"""

import hashlib
import json
import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.errors import ConfigError, ModelError
from secateur.files import atomic_folder, cache_folder, sha256_file
from secateur.models.safetensors_writer import Lazy, write_safetensors
from secateur.models.source import ModelFolder, Trimming, cached_model, load_tokenizer, read_json
from secateur.models.weights import WeightReader, load_skeleton

VERSION = 2  # part of the cache's key: raise it when the folder that is made of a model changes
COPIED = ("LICENSE*", "NOTICE*", "USE_POLICY*", "chat_template.jinja", "special_tokens_map.json")
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CONFIGS = ("config.json", "generation_config.json")
_POSITIONS = ("pos", "wpe")  # in the names of tables that no token is looked up in
# Settings of generation that name tokens by old ids, and are of no use to a sub-model.
_LISTS_OF_TOKENS = {"suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids", "sequence_bias"}
# What a tokenizer has to give back unchanged, whatever is left of its vocabulary.
_SAMPLES = ("def f(x):\n\treturn [x] * 2  # naïve\n", "日本語 🙂 ǅ\r\n", "  The quick brown fox; 12345.678e-9\n\n")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a smaller vocabulary keeps.

    Attributes
    ----------
    token_ids
        int64, ascending: their ids in the larger one.
    size
        Rows of the larger model's embedding.
    """

    token_ids: NDArray[np.int64]
    size: int

    def sha256(self) -> str:
        """Return the hash of the ids as little-endian int32."""
        return hashlib.sha256(self.token_ids.astype("<i4").tobytes()).hexdigest()


def check_vocabulary(folder: ModelFolder, count: int) -> int:
    """Return how many tokens a model has; raises what can be said before any text is read.

    Raises
    ------
    ConfigError
        When `count` is not smaller than the vocabulary.
    ModelError
        When the tokenizer is none of byte pairs, or the model looks tokens up in a further matrix.
    """
    model = load_skeleton(folder)
    size = int(model.get_input_embeddings().weight.shape[0])
    if count >= size:
        raise _too_many(folder, size, count)
    _byte_pairs(folder.path)
    for name, module in model.named_modules():
        tables = isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
        if tables and len(module.weight) > size // 2 and not any(one in name for one in _POSITIONS):
            raise ModelError(f"model {folder.name!r} looks tokens up in {name!r} too: leave --vocabulary out")
    return size


def _too_many(folder: ModelFolder, size: int, count: int) -> ConfigError:
    return ConfigError(f"model {folder.name!r} has {size:,} tokens: leave --vocabulary {count} out, or give fewer")


def choose_vocabulary(
    folder: ModelFolder, needed: Sequence[int], others: Iterable[int], count: int, pieces: "Pieces | None" = None
) -> Vocabulary:
    """Choose at most `count` tokens: all that are needed, and others in their order, each with what it is made of.

    `pieces` are those of the model, where they are there already.

    Raises
    ------
    ConfigError
        When `count` is not smaller than the vocabulary, or too small for the tokens that are needed.
    ModelError
        As `check_vocabulary`.
    """
    pieces = pieces or Pieces(folder)
    size = pieces.size
    if count >= size:
        raise _too_many(folder, size, count)
    kept: set[int] = set()
    for token in needed:
        kept |= pieces.of(token)
    kept |= pieces.letters
    kept = {token for token in kept if token < size}
    if len(kept) > count:
        raise ConfigError(
            f"--vocabulary {count} is too small for model {folder.name!r}: without {len(kept):,} of its tokens not "
            "every text could be written; give more"
        )
    for token in others:
        added = pieces.of(int(token)) - kept
        if len(kept) + len(added) <= count and all(one < size for one in added):
            kept |= added
        if len(kept) == count:
            break
    return Vocabulary(np.array(sorted(kept), dtype=np.int64), size)


class Pieces:
    """What the tokens of a model are made of, and how many there are; raises `ModelError` as `check_vocabulary`."""

    def __init__(self, folder: ModelFolder) -> None:
        self.size = check_vocabulary(folder, 1)
        model = _byte_pairs(folder.path)["model"]
        self.vocabulary: dict[str, int] = model["vocab"]
        self.words = {index: word for word, index in self.vocabulary.items()}
        self.made = _made(_merges(model))
        # Where bytes stand in for what is unknown, they do; elsewhere a letter that is lost could not be written.
        self.by_bytes = bool(model.get("byte_fallback"))
        self.letters = {index for word, index in self.vocabulary.items() if len(word) == 1 and not self.by_bytes}

    def of(self, token: int) -> set[int]:
        """Return a token and those from which merges make it."""
        found, waiting = {token}, [self.words[token]] if token in self.words else []
        while waiting:
            for part in self.made.get(waiting.pop(), ()):
                if part in self.vocabulary and self.vocabulary[part] not in found:
                    found.add(self.vocabulary[part])
                    waiting.append(part)
        return found

    def count(self, token: int, kept: Container[int]) -> int:
        """Return into how many of the kept tokens one is split, going back over merges; 1 where it is kept."""
        found, waiting = 0, [token]
        while waiting:
            one = waiting.pop()
            word = self.words.get(one, "")
            parts = () if one in kept else self.made.get(word, ())
            waiting += [self.vocabulary[part] for part in parts if part in self.vocabulary]
            if not parts:
                found += len(word.encode()) if self.by_bytes and one not in kept else 1
        return found


def _made(merges: Sequence[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Return for each word the two that are merged into it at last; some tokenizers list every way to split one."""
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    made: dict[str, tuple[str, str]] = {}
    several: set[str] = set()
    for left, right in merges:
        if left + right in made:
            several.add(left + right)
        made.setdefault(left + right, (left, right))
    for word in several:
        parts = list(word)
        while len(parts) > 2:
            pairs = list(pairwise(parts))
            best = min(range(len(pairs)), key=lambda place: ranks.get(pairs[place], len(ranks)))
            if pairs[best] not in ranks:
                break
            parts[best : best + 2] = ["".join(pairs[best])]
        if len(parts) == 2:
            made[word] = (parts[0], parts[1])
    return made


def smaller_model(folder: ModelFolder, vocabulary: Vocabulary) -> ModelFolder:
    """Return a model with these tokens, made once and kept in the cache; its `trimming` says of which it is one.

    Raises
    ------
    ModelError
        When the smaller tokenizer does not give a text back as the larger one does: nothing is left in the cache.
    OutputError
        When the cache cannot be written.
    """
    files = [folder.path / name for name in (*CONFIGS, TOKENIZER, TOKENIZER_CONFIG) if (folder.path / name).exists()]
    files += [*copied_files(folder.path), *folder.weight_files()]
    hashes = [f"{path.name} {sha256_file(path)}" for path in files]
    key = hashlib.sha256("\n".join((*hashes, vocabulary.sha256(), str(VERSION))).encode()).hexdigest()[:16]
    target = cache_folder() / "models" / f"{Path(folder.name).name}-{len(vocabulary.token_ids)}-{key}"

    def make() -> Path:
        if not target.is_dir():
            with atomic_folder(target) as made:
                _write_tokenizer(folder.path, vocabulary, made)
                _write_configs(folder.path, vocabulary, made)
                _check_tokenizer(folder.path, made, vocabulary)
                _write_weights(folder, vocabulary, made)
        return target

    cached_model(make, folder.name)
    record = {"tokens": len(vocabulary.token_ids), "of": vocabulary.size, "sha256": vocabulary.sha256()}
    return replace(folder, path=target, trimming=Trimming(folder.path, record))


def _byte_pairs(path: Path) -> dict[str, Any]:
    """Return what the tokenizer is made of: what its class makes of tokenizer.json, which may be something else."""
    backend = getattr(load_tokenizer(path), "backend_tokenizer", None)
    tokenizer = json.loads(backend.to_str()) if backend is not None else {}
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise ModelError(
            f"the tokenizer in {path} is of type {kind!r}, and only one of byte pairs (BPE) can do with fewer tokens: "
            "leave --vocabulary out"
        )
    return tokenizer


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs that are merged, first ones first; older files write them as one string."""
    pairs = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in model["merges"]]
    return [(str(left), str(right)) for left, right in pairs]


def _write_tokenizer(source: Path, vocabulary: Vocabulary, target: Path) -> None:
    tokenizer = _byte_pairs(source)
    model, ids = tokenizer["model"], _new_ids(vocabulary)
    model["vocab"] = {word: ids[index] for word, index in model["vocab"].items() if index in ids}
    words = model["vocab"]
    model["merges"] = [
        [left, right] for left, right in _merges(model) if left in words and right in words and left + right in words
    ]
    tokenizer["added_tokens"] = [
        {**one, "id": ids[one["id"]]} for one in tokenizer.get("added_tokens") or () if one["id"] in ids
    ]
    tokenizer["truncation"] = tokenizer["padding"] = None  # ids of their own, and nothing that a model needs
    tokenizer["post_processor"] = _renumbered(tokenizer.get("post_processor"), ids)
    (target / TOKENIZER).write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    settings = read_json(source / TOKENIZER_CONFIG) if (source / TOKENIZER_CONFIG).exists() else {}
    added = settings.get("added_tokens_decoder")
    if isinstance(added, dict):
        settings["added_tokens_decoder"] = {
            str(ids[int(index)]): token for index, token in added.items() if int(index) in ids
        }
    # Other classes may look for a vocabulary in files of their own, which are left behind.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(target / TOKENIZER_CONFIG, settings)
    for path in copied_files(source):
        shutil.copyfile(path, target / path.name)


def copied_files(source: Path) -> list[Path]:
    """Return the files of a model that one with fewer tokens has as they are."""
    return [path for pattern in COPIED for path in sorted(source.glob(pattern)) if path.is_file()]


def _renumbered(processor: Any, ids: Mapping[int, int]) -> Any:
    """Return a post-processor with the new ids of the tokens that it puts around a text."""
    if isinstance(processor, list):
        return [_renumbered(one, ids) for one in processor]
    if not isinstance(processor, dict):
        return processor
    changed = {key: _renumbered(value, ids) for key, value in processor.items()}
    if processor.get("type") == "TemplateProcessing":
        changed["special_tokens"] = {
            name: {**one, "ids": [_new(ids, index) for index in one["ids"]]}
            for name, one in (processor.get("special_tokens") or {}).items()
        }
    for end in ("sep", "cls"):
        if end in processor:
            changed[end] = [processor[end][0], _new(ids, processor[end][1])]
    return changed


def _new(ids: Mapping[int, int], token: int) -> int:
    if token not in ids:
        raise ModelError(
            f"the tokenizer puts token {token} around a text, which has no row in the model: leave --vocabulary out"
        )
    return ids[token]


def _write_configs(source: Path, vocabulary: Vocabulary, target: Path) -> None:
    ids = _new_ids(vocabulary)
    for name in CONFIGS:
        if not (source / name).exists():
            continue
        config = read_json(source / name)
        for key, value in config.items():
            if key.endswith("_token_id"):
                named = value if isinstance(value, list) else [value]
                found = [ids[one] for one in named if type(one) is int and one in ids]
                config[key] = found if isinstance(value, list) else next(iter(found), None)
        if name == CONFIGS[0]:
            config["vocab_size"] = len(vocabulary.token_ids)
        for key in _LISTS_OF_TOKENS & config.keys():
            del config[key]
        _write_json(target / name, config)


def _write_weights(folder: ModelFolder, vocabulary: Vocabulary, target: Path) -> None:
    model = load_skeleton(folder)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    cut = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if any(module is end for end in ends)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.shape[0] == vocabulary.size
    }
    rows = torch.from_numpy(vocabulary.token_ids)
    tensors: dict[str, Any] = {}
    with WeightReader(folder, model) as reader:
        for name in reader.names():
            shape, dtype = reader.shape(name), reader.mapped(name).dtype
            if name in cut:
                shape = (len(rows), *shape[1:])
            tensors[name] = Lazy(shape, dtype, partial(_read, reader, name, rows if name in cut else None))
        write_safetensors(target / "model.safetensors", tensors, {"format": "pt"})


def _read(reader: WeightReader, name: str, rows: torch.Tensor | None) -> torch.Tensor:
    return reader.mapped(name) if rows is None else reader.mapped(name)[rows]


def _check_tokenizer(source: Path, target: Path, vocabulary: Vocabulary) -> None:
    """Raise `ModelError` when a text comes back from the smaller tokenizer as another one, or in other tokens."""
    larger, smaller, ids = load_tokenizer(source), load_tokenizer(target), _new_ids(vocabulary)
    for text in (*_SAMPLES, *"aZ 0\n"):
        before, after = (one.decode(one(text, add_special_tokens=False).input_ids) for one in (larger, smaller))
        whole = [ids.get(token) for token in larger(text).input_ids]
        if before != after or (None not in whole and smaller(text).input_ids != whole):
            raise ModelError(
                f"with fewer tokens the tokenizer in {source} would read {before!r} otherwise: leave --vocabulary out"
            )


def _new_ids(vocabulary: Vocabulary) -> dict[int, int]:
    return {int(old): new for new, old in enumerate(vocabulary.token_ids)}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
