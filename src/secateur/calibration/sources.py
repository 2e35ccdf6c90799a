"""What a source of text is, and the one that the user names: a data folder.

The other sources are `installed` (what is on the machine), `clients` (the user's npm and pip) and `paths`.
"""

import bz2
import gzip
import json
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.calibration.documents import (
    HELD_OUT,
    MINIMUM_CHARACTERS,
    SPLITS,
    TRAIN,
    Document,
    disjoint,
    split_documents,
)
from secateur.errors import CorpusError
from secateur.files import user_path

DATA_VARIABLE = "SECATEUR_DATA"


class SourceUnavailableError(CorpusError):
    """A source that cannot answer on this machine; the next one is tried. Any other error stops the search."""


@dataclass(frozen=True)
class Source(ABC):
    """One place where the text of a domain can come from; `how_to_get` is the command or step that provides it."""

    name: str
    how_to_get: str

    @abstractmethod
    def missing(self) -> str | None:
        """Return why this source cannot answer here, or None; reads and downloads nothing large."""

    @abstractmethod
    def version(self) -> str:
        """Return the version of the text; call only when nothing is missing."""

    @abstractmethod
    def licence(self) -> str:
        """Return the licences of the text as SPDX names, as far as they are known."""

    @abstractmethod
    def documents(self) -> Iterable[Document]:
        """Return all documents; raises `SourceUnavailableError` to pass on to the next source."""

    def splits(self) -> dict[str, tuple[Document, ...]]:
        """Return the documents of each split; a source that has its own split overrides this."""
        return split_documents(self.documents())


def data_folder(data: Path | None) -> Path | None:
    """Return the data folder: `data`, else the environment's SECATEUR_DATA, else None; it must exist."""
    given = str(data) if data is not None else os.environ.get(DATA_VARIABLE, "")
    if not given:
        return None
    folder = user_path(given)
    if not folder.is_dir():
        origin = "given" if data is not None else f"that {DATA_VARIABLE} names"
        raise CorpusError(f"the data folder {origin} does not exist: {given!r}; pass a folder, or leave it out")
    return folder


@dataclass(frozen=True)
class DataFolder(Source):
    """FOLDER/corpora/DOMAIN.train.jsonl.gz and DOMAIN.held_out.jsonl.gz: lines with package, licence, path, text."""

    domain: str
    folder: Path | None

    def missing(self) -> str | None:
        """Both files or neither: one alone is an error, because falling back in silence would surprise its owner."""
        if self.folder is None:
            return f"none given with --data or {DATA_VARIABLE}"
        files = [self._file(split) for split in SPLITS]
        absent = [file for file in files if not file.is_file()]
        if len(absent) == 1:
            raise CorpusError(f"{absent[0]} is missing beside its other split; add it, or take both away")
        return f"{self.folder} has no corpora/{files[0].name}" if absent else None

    def version(self) -> str:
        """The packages that the lines name."""
        return self._field("package")

    def licence(self) -> str:
        """The licences that the lines name."""
        return self._field("licence")

    def documents(self) -> Iterable[Document]:
        """Both splits together."""
        return [document for split in self.splits().values() for document in split]

    def splits(self) -> dict[str, tuple[Document, ...]]:
        """The split of the files themselves, less held-out documents that the train file has too."""
        return disjoint({split: list(self._read(split)) for split in SPLITS})

    def _file(self, split: str) -> Path:
        return (self.folder or Path()) / "corpora" / f"{self.domain}.{split}.jsonl.gz"

    def _read(self, split: str) -> Iterator[Document]:
        for number, record in read_json_lines(self._file(split)):
            if len(record["text"]) >= MINIMUM_CHARACTERS:
                yield Document(record_name(record) or f"{split} line {number}", record["text"])

    def _field(self, field: str) -> str:
        found = {str(record.get(field, "")) for split in SPLITS for _, record in read_json_lines(self._file(split))}
        return ", ".join(sorted(found - {""})) or "unknown"


@dataclass(frozen=True)
class WikiTextFolder(Source):
    """WikiText-2 articles: the validation file is train, and articles of the test file are held out.

    The test file is a benchmark: it only evaluates, and no calibration set is ever drawn from it.
    """

    folder: Path | None
    train_file: str = "text/general/wikitext2_valid.txt.gz"
    held_out_file: str = "benchmarks/wikitext2_test.txt.gz"

    def missing(self) -> str | None:
        """Both files are needed."""
        if self.folder is None:
            return f"none given with --data or {DATA_VARIABLE}"
        absent = [file for file in (self.train_file, self.held_out_file) if not (self.folder / file).is_file()]
        return f"{self.folder} has no {' and no '.join(absent)}" if absent else None

    def version(self) -> str:
        """WikiText-2 was published once."""
        return "WikiText-2 v1"

    def licence(self) -> str:
        """As Wikipedia."""
        return "CC-BY-SA-3.0"

    def documents(self) -> Iterable[Document]:
        """Both splits together."""
        return [document for split in self.splits().values() for document in split]

    def splits(self) -> dict[str, tuple[Document, ...]]:
        """The split of the files themselves."""
        folder = self.folder or Path()
        files = {TRAIN: self.train_file, HELD_OUT: self.held_out_file}
        return disjoint({split: list(_articles(folder / file)) for split, file in files.items()})


def read_bytes(file: Path) -> bytes:
    """Return a file's content, unpacked if its name ends in .gz or .bz2; raises `CorpusError` if it cannot be read."""
    try:
        content = file.read_bytes()
        unpack = {".gz": gzip.decompress, ".bz2": bz2.decompress}.get(file.suffix)
        return content if unpack is None else unpack(content)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CorpusError(f"{file} cannot be read: {error}") from error


def read_json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, record) of each line that is not blank; each record has a string `text`.

    Raises `CorpusError` that names the line.
    """
    for number, line in enumerate(read_bytes(file).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:
            raise CorpusError(f"{file}, line {number}: not a JSON object in UTF-8 ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise CorpusError(f"{file}, line {number}: expected an object with a string 'text', got {line[:60]!r}")
        try:
            (record["text"] + record_name(record)).encode()
        except UnicodeEncodeError as error:
            raise CorpusError(f"{file}, line {number}: half of a surrogate pair is no text ({error})") from error
        yield number, record


def record_name(record: dict[str, Any]) -> str:
    """Return package/path of a record, or of the two whichever it has."""
    return "/".join(str(record[field]) for field in ("package", "path") if record.get(field))


def _articles(file: Path) -> Iterator[Document]:
    """Cut WikiText at its level-one headings, ` = Title = `."""
    try:
        text = read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file} is not UTF-8: {error}") from error
    heads = list(re.finditer(r"^ = ([^=\n]+) = *\n", text, flags=re.MULTILINE))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    stem = file.name.split(".")[0]
    for number, (head, end) in enumerate(zip(heads, ends, strict=True)):
        article = text[head.start() : end]
        if len(article) >= MINIMUM_CHARACTERS:
            yield Document(f"{stem}/{number:03d} {head[1]}", article)
