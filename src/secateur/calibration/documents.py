"""Documents, and the rules that every source of text shares: what is kept, how it is hashed, how it is split.

Where a document comes from is `sources`; how documents become tokens is `packing`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

TRAIN = "train"
HELD_OUT = "held_out"
SPLITS = (TRAIN, HELD_OUT)

MINIMUM_CHARACTERS = 200  # a shorter file is an empty module or a re-export: mostly its licence header
MAXIMUM_LINE = 1000  # a longer line means minified or generated text
MAXIMUM_FILE_BYTES = 500_000
HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Document:
    """One file of text; `name` is package/path, the same on every machine."""

    name: str
    text: str


@dataclass(frozen=True)
class Provenance:
    """Where the text of one domain came from; `sha256` covers the names and texts of this split's documents."""

    domain: str
    source: str
    version: str
    licence: str
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """The documents of one split ("train" or "held_out") of one domain, sorted by name."""

    domain: str
    split: str
    documents: tuple[Document, ...]
    provenance: tuple[Provenance, ...]


def documents_hash(documents: Iterable[Document]) -> str:
    """Return the SHA-256 over names and texts, in the order given; lengths keep neighbours apart."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name.encode(), document.text.encode()):
            digest.update(b"%d:" % len(part))
            digest.update(part)
    return digest.hexdigest()


def decode_source(content: bytes) -> str | None:
    """Return a source file's text with plain newlines, or None for what nobody wrote by hand.

    None is: not UTF-8, binary, under 200 characters, over 500 kB, a line over 1,000 characters, or marked as generated.
    """
    if len(content) > MAXIMUM_FILE_BYTES or b"\0" in content:
        return None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # a checkout on Windows gives the same documents
    if len(text) < MINIMUM_CHARACTERS or max(map(len, text.split("\n"))) > MAXIMUM_LINE:
        return None
    head = text[:1000].casefold()
    if "@generated" in head or "do not edit" in head:
        return None
    return text


def split_documents(documents: Iterable[Document]) -> dict[str, tuple[Document, ...]]:
    """Split by file: a document is held out when the SHA-256 of its name says so, about one in eight.

    The name alone decides, so a file stays on its side when others come and go. With two documents or more neither
    side is empty: the one whose hash is nearest crosses over.
    """
    ranked = sorted(documents, key=lambda document: (_name_hash(document), document.text))
    bound = (1 << 64) // HELD_OUT_ONE_IN
    held_out = sum(_name_hash(document) < bound for document in ranked)
    if len(ranked) > 1:
        held_out = min(max(held_out, 1), len(ranked) - 1)
    return disjoint({HELD_OUT: ranked[:held_out], TRAIN: ranked[held_out:]})


def disjoint(splits: Mapping[str, Iterable[Document]]) -> dict[str, tuple[Document, ...]]:
    """Return both splits sorted by name, less each held-out document that has the name or the text of a train one."""
    train = sorted(splits[TRAIN], key=_order)
    names, texts = {document.name for document in train}, {document.text for document in train}
    held_out = [d for d in splits[HELD_OUT] if d.name not in names and d.text not in texts]
    return {TRAIN: tuple(train), HELD_OUT: tuple(sorted(held_out, key=_order))}


def dump_documents(documents: Iterable[Document]) -> bytes:
    """Return documents as JSON lines with `name` and `text`."""
    lines = (json.dumps({"name": document.name, "text": document.text}) for document in documents)
    return "".join(line + "\n" for line in lines).encode()


def parse_documents(content: bytes) -> Iterator[Document]:
    """Yield what `dump_documents` wrote; raises ValueError, KeyError or TypeError where it is damaged."""
    for line in content.decode().splitlines():
        record = json.loads(line)
        yield Document(str(record["name"]), str(record["text"]))


def _name_hash(document: Document) -> int:
    return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big")


def _order(document: Document) -> tuple[str, str]:
    return document.name, document.text
