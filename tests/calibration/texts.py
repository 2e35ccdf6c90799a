"""Small tokenizers and made-up sources for the tests of corpora."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(*, begin: bool = False, end: bool = True) -> Any:
    """A tokenizer whose tokens are bytes: id 0 is BOS, id 1 is EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", **({"eos_token": "</s>"} if end else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)


def source(name: str, lines: int = 30) -> str:
    """A file of numbered lines, no two of which, in no two files, are the same."""
    return "".join(f"{name}: line {i} of {lines}\n" for i in range(lines))


def write_folder(folder: Path, names: list[str], lines: int = 30) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source(name, lines))
    return folder


def write_json_lines(file: Path, records: list[dict[str, str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    file.write_bytes(gzip.compress(content, mtime=0) if file.suffix == ".gz" else content)
    return file


def write_data(folder: Path, domain: str, train: int = 20, held_out: int = 5) -> Path:
    """A data folder with one domain, whose files are named by split."""
    for split, count in (("train", train), ("held_out", held_out)):
        records = [
            {"package": "pack 1", "licence": "MIT", "path": f"{split}{i}.x", "text": source(f"{domain} {split}{i}")}
            for i in range(count)
        ]
        write_json_lines(folder / "corpora" / f"{domain}.{split}.jsonl.gz", records)
    return folder


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0)), content)
    return stream.getvalue()


def tarred(members: dict[str, bytes], link: str = "") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        if link:
            entry = tarfile.TarInfo(link)
            entry.type = tarfile.SYMTYPE
            entry.linkname = "/etc/passwd"
            archive.addfile(entry)
    return stream.getvalue()


_LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def word_tokenizer(words: list[str]) -> Any:
    """A byte-level tokenizer that has each of `words` as a token, after the bytes and in this order; then <s>, </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    merges = []
    for word in ("".join(letter for letter, _ in _LETTERS.pre_tokenize_str(word)) for word in words):
        for length in range(2, len(word) + 1):
            if word[:length] not in vocabulary:
                vocabulary[word[:length]] = len(vocabulary)
                merges.append((word[: length - 1], word[length - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>"})
