import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.calibration.documents import Document
from secateur.calibration.packing import CalibrationSet, build_calibration_set
from secateur.calibration.spans import encode_start, random_numbers, read_spans
from secateur.errors import ConfigError, CorpusError
from tests.calibration.texts import byte_tokenizer, source, write_data, write_folder

BEGIN, END = 0, 1


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECATEUR_DATA", raising=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for domain in ("python", "java"):
        write_data(tmp_path, domain)
    return tmp_path


def build(data: Path, *mixture: tuple[str, float], **options: Any) -> CalibrationSet:
    settings = {"samples": 8, "sequence_length": 64, "seed": 0, "data": data, **options}
    tokenizer = settings.pop("tokenizer", None) or byte_tokenizer()
    return build_calibration_set(mixture or (("python", 1.0),), tokenizer, **settings)


def text_of(token_ids: Any) -> str:
    return str(byte_tokenizer().decode([int(token) for token in np.ravel(token_ids)]))


def test_golden_sample(data: Path) -> None:
    calibration = build(data)
    assert (calibration.samples, calibration.sequence_length) == (8, 64)
    assert calibration.token_ids.dtype == np.dtype("int64")
    assert text_of(calibration.token_ids[:2]) == (
        "python train7: line 12 of 30\n"
        "python train7: line 13 of 30\n"
        "</s>thon python train19: line 14 of 30\n"
        "python train19: line 15 of 30\n"
        "</s>pyt"
    )
    assert calibration.sha256 == "ae12005493f7cf787007fb2e6d724ba686d3ec93867d555e5fe0fec90a58729c"
    assert calibration.mixture == (("python", 1.0),)
    assert calibration.provenance[0].source == "data folder"


def test_hash_covers_shape_and_ids(data: Path) -> None:
    calibration = build(data)
    content = b"8x64\n" + b"".join(int(token).to_bytes(8, "little") for token in calibration.token_ids.ravel())
    assert calibration.sha256 == hashlib.sha256(content).hexdigest()


def test_seed_decides(data: Path) -> None:
    assert build(data, seed=1).sha256 == build(data, seed=1).sha256
    assert build(data, seed=1).sha256 != build(data, seed=2).sha256


def test_only_train_files_are_read(data: Path) -> None:
    text = text_of(build(data, samples=40, sequence_length=128).token_ids)
    assert "python train" in text
    assert "held_out" not in text


def test_mixture_is_exact_by_tokens_and_the_order_does_not_matter(tmp_path: Path) -> None:
    for name, letter in (("one", "a"), ("two", "b"), ("six", "c")):
        write_folder(tmp_path / name, [f"{i}.py" for i in range(30)])
        for file in (tmp_path / name).iterdir():
            file.write_text((letter * 20 + "\n") * 40)
    parts = [(str(tmp_path / "one"), 0.7), (str(tmp_path / "two"), 0.2), (str(tmp_path / "six"), 0.1)]
    tokenizer = byte_tokenizer(end=False)  # joins with newlines, so that only letters and newlines occur
    calibration = build(tmp_path, *parts, samples=9, sequence_length=37, tokenizer=tokenizer)
    # 333 tokens: 233.1, 66.6 and 33.3, of which the second gains the one that is left.
    text = text_of(calibration.token_ids)
    streams = {"a": 233, "b": 67, "c": 33}
    for letter, count in streams.items():
        rows = [row for row in calibration.token_ids if letter in text_of(row)]
        assert abs(text.count(letter) * 21 / 20 - count) < 12
        assert len(rows) >= count // 37
    assert (
        build(tmp_path, *parts[::-1], samples=9, sequence_length=37, tokenizer=tokenizer).sha256 == calibration.sha256
    )


def test_tokens_of_each_domain_are_exact(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {}

    def pack(corpus: Any, tokenizer: Any, *, count: int, width: int, **_: Any) -> tuple[list[list[int]], list[int]]:
        wanted[corpus.domain] = count
        token = 5 if corpus.domain == "python" else 6
        return [[token] * width for _ in range(count // width)], [token] * (count % width)

    monkeypatch.setattr("secateur.calibration.packing._pack", pack)
    calibration = build(data, ("python", 0.8), ("java", 0.2), samples=7, sequence_length=11)
    assert wanted == {"python": 62, "java": 15}
    assert np.unique(calibration.token_ids, return_counts=True)[1].tolist() == [62, 15]
    assert calibration.token_ids.shape == (7, 11)


def test_every_sequence_begins_with_a_line(data: Path) -> None:
    rows = build(data, ("python", 1), ("java", 1), samples=40).token_ids
    starts = {text_of(row[:6]) for row in rows}
    assert starts == {"python", "java t"}


def test_what_a_sequence_has_no_room_for_goes_on_in_a_later_one(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_folder(folder, [f"{number:02}.py" for number in range(60)])
    for file in folder.iterdir():
        file.write_text("".join(f"{file.stem} {line:02} .\n" for line in range(30)))  # 240 tokens: 2.5 in a sequence
    calibration = build(tmp_path, (str(folder), 1.0), samples=12, sequence_length=600)
    text = "".join(text_of(row) for row in calibration.token_ids)
    lines = [f"{number:02} {line:02} .\n" for number in range(60) for line in range(30)]
    assert sum(line in text for line in lines) > 870  # 7,200 tokens are 896 lines with END; 12 rests lost would be 700
    assert all(text.count(line) <= 1 for line in lines)


def test_what_a_domain_gives_does_not_depend_on_the_others(data: Path) -> None:
    mixed = {row.tobytes() for row in build(data, ("python", 1), ("java", 1), samples=40).token_ids}
    alone = {row.tobytes() for row in build(data, ("python", 1), samples=20).token_ids}
    other = {row.tobytes() for row in build(data, ("java", 1), samples=20).token_ids}
    assert mixed == alone | other


def test_spans_are_joined_with_end(data: Path) -> None:
    rows = build(data, samples=20).token_ids
    assert 15 <= int((rows == END).sum()) <= 40
    assert not (rows == BEGIN).any()
    newline = byte_tokenizer()("\n").input_ids
    without = build(data, samples=20, tokenizer=byte_tokenizer(end=False)).token_ids
    assert not (without == END).any()
    assert (without == newline[0]).sum() > 20


def test_every_sequence_begins_with_begin_where_the_tokenizer_does(data: Path) -> None:
    calibration = build(data, tokenizer=byte_tokenizer(begin=True))
    assert calibration.token_ids.shape == (8, 64)
    assert (calibration.token_ids[:, 0] == BEGIN).all()
    assert not (calibration.token_ids[:, 1:] == BEGIN).any()


def test_corpus_that_is_too_small_says_how_small(tmp_path: Path) -> None:
    write_folder(tmp_path / "few", ["a.py", "b.py"])
    with pytest.raises(CorpusError, match=r"has (\d+) tokens and 6400 are wanted"):
        build(tmp_path, (str(tmp_path / "few"), 1.0), samples=100)


def test_corpus_can_be_used_to_the_last_token(tmp_path: Path) -> None:
    write_folder(tmp_path / "few", ["a.py", "b.py"])
    size = len(source("a.py"))
    for length, fits in ((size, True), (size + 20, False)):
        try:
            build(tmp_path, (str(tmp_path / "few"), 1.0), samples=1, sequence_length=length)
        except CorpusError:
            assert not fits
        else:
            assert fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "0 sequences of 64 tokens"),
        ({"sequence_length": 0}, "8 sequences of 0 tokens"),
        ({"sequence_length": 1, "tokenizer": byte_tokenizer(begin=True)}, "8 sequences of 1 tokens"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_be(data: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(data, **options)


def test_weight_that_gives_no_token(data: Path) -> None:
    with pytest.raises(ConfigError, match="of domain 'java' gives none of 512 tokens"):
        build(data, ("python", 1.0), ("java", 1e-9))


def test_nothing_is_said_about_long_texts(
    data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    transformers = logging.getLogger("transformers")
    monkeypatch.setattr(transformers, "propagate", False)  # where CI is set, records reach caplog's root handler too
    transformers.addHandler(caplog.handler)
    try:
        build(data, tokenizer=tokenizer)
        assert not caplog.records
        byte_tokenizer()("long " * 20)
        assert len(caplog.records) == 1  # others are still told
    finally:
        transformers.removeHandler(caplog.handler)


def test_spans_read_each_document_once_and_whole() -> None:
    documents = [Document(f"f{i}", source(f"f{i}", lines=3 + 7 * i)) for i in range(6)]
    spans = list(read_spans(documents, byte_tokenizer(), limit=100, seed=3, key="k"))
    assert {span.document for span in spans[:6]} == {document.name for document in documents}
    for document in documents:
        mine = [span for span in spans if span.document == document.name]
        assert sorted("".join(span.text for span in mine).split("\n")) == sorted(document.text.split("\n"))
        assert all(span.token_ids == byte_tokenizer()(span.text).input_ids for span in mine)
        assert all(span.text.endswith("\n") for span in mine)
    assert all(50 < len(span.token_ids) <= 100 or span.text.endswith("\n") for span in spans)
    starts = {span.text.split("\n")[0].split("line ")[1].split(" ")[0] for span in spans[:6]}
    assert len(starts) > 1  # not every file from its first line


def test_encode_start_keeps_to_the_limit() -> None:
    tokenizer = byte_tokenizer()
    assert encode_start(tokenizer, "ab\ncd\nef", 6) == ("ab\ncd\n", tokenizer("ab\ncd\n").input_ids)
    assert encode_start(tokenizer, "abcdef", 4)[0] == "abcd"
    assert encode_start(tokenizer, "éa", 1) == ("é", tokenizer("é").input_ids[:1])


def test_random_numbers_are_the_same_in_every_version() -> None:
    assert random_numbers(0, "python", 2) == [14708525472660700088, 2610617741487601898]
    assert random_numbers(0, "python", 3)[:2] == random_numbers(0, "python", 2)
    assert random_numbers(0, "java", 1) != random_numbers(0, "python", 1)


@pytest.mark.parametrize("samples", [32])
def test_standard_library_gives_a_set_of_the_usual_size(samples: int) -> None:
    calibration = build_calibration_set(
        (("python", 1.0),), byte_tokenizer(), samples=samples, sequence_length=512, seed=0
    )
    assert calibration.token_ids.shape == (samples, 512)
    assert len(np.unique(calibration.token_ids, axis=0)) == samples


def test_long_texts_are_cut_before_they_are_tokenised() -> None:
    seen: list[int] = []

    def tokenizer(text: str, **_: Any) -> Any:
        seen.append(len(text))
        return byte_tokenizer()(text)

    encode_start(tokenizer, "x" * 10_000, 10)  # type: ignore[arg-type]
    assert seen == [80, 10]
