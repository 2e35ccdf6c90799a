import gzip
import os
from pathlib import Path

import pytest

from secateur.calibration import installed
from secateur.calibration.documents import HELD_OUT, TRAIN, documents_hash
from secateur.calibration.installed import (
    InstalledArchive,
    InstalledEnglish,
    JdkSource,
    StandardLibrary,
    TorchHeaders,
)
from secateur.calibration.paths import path_source
from secateur.calibration.sources import DataFolder, WikiTextFolder, data_folder, read_json_lines
from secateur.calibration.trees import read_tree
from secateur.errors import CorpusError
from tests.calibration.texts import source, write_data, write_folder, write_json_lines, zipped


def names(documents: object) -> list[str]:
    return sorted(document.name for document in documents)  # type: ignore[attr-defined]


def test_data_folder_renders_its_lines(tmp_path: Path) -> None:
    folder = DataFolder("data folder", "", "java", write_data(tmp_path, "java", train=3, held_out=2))
    assert folder.missing() is None
    assert (folder.version(), folder.licence()) == ("pack 1", "MIT")
    splits = folder.splits()
    assert names(splits[TRAIN]) == ["pack 1/train0.x", "pack 1/train1.x", "pack 1/train2.x"]
    assert splits[HELD_OUT][1].text == source("java held_out1")
    assert documents_hash(splits[TRAIN]) == "ddd5fbd13eda49e3350460b17923d12a2560d32d3aaa37df704f7d96d351da75"


def test_data_folder_drops_short_and_shared_texts(tmp_path: Path) -> None:
    shared = source("shared")
    write_json_lines(
        tmp_path / "corpora/java.train.jsonl.gz", [{"path": "a", "text": shared}, {"path": "b", "text": "x"}]
    )
    held_out = [{"path": "c", "text": shared}, {"path": "d", "text": source("d")}]
    write_json_lines(tmp_path / "corpora/java.held_out.jsonl.gz", held_out)
    splits = DataFolder("data folder", "", "java", tmp_path).splits()
    assert (names(splits[TRAIN]), names(splits[HELD_OUT])) == (["a"], ["d"])


def test_data_folder_with_one_split_only_is_an_error(tmp_path: Path) -> None:
    write_data(tmp_path, "java")
    (tmp_path / "corpora/java.held_out.jsonl.gz").unlink()
    with pytest.raises(CorpusError, match=r"java\.held_out\.jsonl\.gz is missing beside its other split"):
        DataFolder("data folder", "", "java", tmp_path).missing()


def test_data_folder_comes_from_the_argument_then_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    assert data_folder(None) is None
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    assert data_folder(None) == tmp_path
    (tmp_path / "b").mkdir()
    assert data_folder(tmp_path / "b") == tmp_path / "b"
    with pytest.raises(CorpusError, match="the data folder given does not exist"):
        data_folder(tmp_path / "none")
    monkeypatch.setenv("SECATEUR_DATA", "/none")
    with pytest.raises(CorpusError, match="the data folder that SECATEUR_DATA names does not exist"):
        data_folder(None)


def test_wikitext_is_cut_at_its_first_headings(tmp_path: Path) -> None:
    body = " " + "word " * 60 + "\n"
    text = f" \n = One = \n \n{body} = = Part = = \n{body} = Two ( x ) = \n{body} = Stub = \n short\n"
    folder = WikiTextFolder("data folder", "", tmp_path)
    for name, content in ((folder.train_file, text), (folder.held_out_file, text.replace("word", "term"))):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    splits = folder.splits()
    assert names(splits[TRAIN]) == ["wikitext2_valid/000 One", "wikitext2_valid/001 Two ( x )"]
    assert splits[TRAIN][0].text == f" = One = \n \n{body} = = Part = = \n{body}"
    assert names(splits[HELD_OUT]) == ["wikitext2_test/000 One", "wikitext2_test/001 Two ( x )"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not a JSON object"),
        ("[1]", "line 2: expected an object with a string 'text'"),
        ('{"tex": "a"}', "line 2: expected an object with a string 'text'"),
        ('{"text": 1}', "line 2: expected an object with a string 'text'"),
        ('{"text": "\\ud800"}', "line 2: half of a surrogate pair"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=message):
        list(read_json_lines(tmp_path / "a.jsonl"))


def test_damaged_gzip_is_an_error(tmp_path: Path) -> None:
    file = write_json_lines(tmp_path / "a.jsonl.gz", [{"text": "x" * 1000}])
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(CorpusError, match="cannot be read"):
        list(read_json_lines(file))


def test_folder_renders_its_sources_and_nothing_else(tmp_path: Path) -> None:
    good = ["a.py", "src/b.JS", "src/deep/c.cpp"]
    bad = [".hidden.py", ".git/d.py", "node_modules/e.js", "src/f.min.js", "g.json", "venv/h.py", "i.png"]
    write_folder(tmp_path, good + bad)
    (tmp_path / "binary.py").write_bytes(b"\0" * 300)
    (tmp_path / "minified.js").write_text("x" * 5000)
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    folder = path_source(tmp_path)
    documents = list(folder.documents())
    assert names(documents) == sorted(good)
    assert {document.text for document in documents} == {source(name) for name in good}
    assert folder.name == f"folder {tmp_path.name}"


def test_folder_that_is_too_large_is_sampled_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [f"{i}.py" for i in range(20)]
    write_folder(tmp_path, every)
    monkeypatch.setattr("secateur.calibration.trees.MAXIMUM_TOTAL_BYTES", 10 * len(source("10.py")))
    some = names(read_tree(tmp_path, {".py"}))
    assert 8 <= len(some) <= 11
    assert some != sorted(every)[: len(some)]
    assert some == names(read_tree(tmp_path, {".py"}))


def test_json_lines_file_keeps_short_texts_and_names_lines(tmp_path: Path) -> None:
    records = [
        {"text": "short"},
        {"text": "  "},
        {"package": "p", "path": "q", "text": "x"},
        {"path": "q", "text": "y"},
    ]
    for name in ("a.jsonl", "a.jsonl.gz"):
        documents = list(path_source(write_json_lines(tmp_path / name, records)).documents())
        assert [(d.name, d.text) for d in documents] == [("line 1", "short"), ("p/q", "x"), ("q", "y")]


def test_paths_that_are_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(CorpusError, match="give a folder of source files, or a file named"):
        path_source(tmp_path / "a.txt")
    with pytest.raises(CorpusError, match="no source file"):
        path_source(tmp_path).documents()
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(CorpusError, match="no line with text"):
        path_source(tmp_path / "a.jsonl").documents()


def test_standard_library_leaves_tests_and_tables_out(tmp_path: Path) -> None:
    good = ["os.py", "json/decoder.py", "unittest/case.py"]
    bad = ["test/a.py", "json/tests/b.py", "site-packages/c.py", "encodings/d.py", "_sysconfigdata__linux.py"]
    library = StandardLibrary(folder=write_folder(tmp_path, [*good, *bad, "config-3/e.py", "idlelib/f.py"]))
    assert library.missing() is None
    assert names(library.documents()) == sorted(f"python/{name}" for name in good)
    assert StandardLibrary(folder=tmp_path / "json").missing() == f"no source in {tmp_path / 'json'}"


def test_standard_library_of_this_interpreter_answers() -> None:
    splits = StandardLibrary().splits()
    assert "python/argparse.py" in names([*splits[TRAIN], *splits[HELD_OUT]])
    assert sum(len(document.text) for document in splits[TRAIN]) > 3_000_000


def test_torch_headers_without_generated_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    include = tmp_path / "torch/include"
    write_folder(
        include, ["c10/a.h", "ATen/b.h", "ATen/ops/c.h", "torch/csrc/generated/d.h", "pybind11/e.h", "c10/f.txt"]
    )
    monkeypatch.setattr(installed, "_package_folder", lambda name: tmp_path / name)
    assert TorchHeaders().missing() is None
    assert names(TorchHeaders().documents()) == ["torch/ATen/b.h", "torch/c10/a.h"]
    monkeypatch.setattr(installed, "_package_folder", lambda name: tmp_path / "none")
    assert TorchHeaders().missing() == "torch has no include folder here"


@pytest.fixture
def jdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A JDK with a release file, alone on this machine."""
    home = tmp_path / "jdk"
    (home / "lib").mkdir(parents=True)
    (home / "release").write_text('IMPLEMENTOR="X"\nJAVA_VERSION="21.0.5"\n')
    members = {
        name: source(name).encode() for name in ("java.base/java/util/A.java", "java.base/sun/B.java", "java/C.java")
    }
    (home / "lib/src.zip").write_bytes(zipped(members))
    monkeypatch.setattr(installed, "JDK_FOLDERS", ())
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("JAVA_HOME", str(home))
    return home


def test_jdk_renders_java_base(jdk: Path) -> None:
    assert JdkSource().missing() is None
    assert JdkSource().version() == "21.0.5"
    documents = list(JdkSource().documents())
    assert names(documents) == ["jdk/java/C.java", "jdk/java/util/A.java"]
    assert documents[0].text == source("java.base/java/util/A.java")


def test_jdk_beside_java_on_the_path(jdk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME")
    assert "no lib/src.zip" in str(JdkSource().missing())
    write_folder(jdk, ["bin/java"])
    (jdk.parent / "java").symlink_to(jdk / "bin/java")
    monkeypatch.setattr("shutil.which", lambda name: os.fspath(jdk.parent / name))
    assert JdkSource().missing() is None


def test_jdk_with_a_damaged_archive(jdk: Path) -> None:
    (jdk / "lib/src.zip").write_bytes(b"no zip")
    with pytest.raises(CorpusError, match=r"src\.zip cannot be read"):
        list(JdkSource().documents())


def test_jdk_with_a_dangling_link(jdk: Path) -> None:
    (jdk / "lib/src.zip").unlink()
    (jdk / "lib/src.zip").symlink_to(jdk / "gone.zip")
    assert "no lib/src.zip" in str(JdkSource().missing())


def test_installed_english_is_named_and_sorted() -> None:
    documents = list(InstalledEnglish().documents())
    found = [document.name for document in documents]
    assert found == sorted(found)
    assert {"python-reference/assert", "description/numpy", "description/pytest"} <= set(found)
    assert all(len(document.text) >= 200 for document in documents)


def test_installed_archive_renders_like_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "top", ["lib/a.js", "lib/node_modules/b.js", "other/c.js"])
    monkeypatch.setattr(installed, "_package_folder", lambda name: tmp_path / name)
    archive = InstalledArchive("n", "get it", "no-such-package", "top", r"top/(lib/[a-z]+\.js)", "MIT")
    assert (archive.missing(), archive.version()) == (None, "no-such-package==unknown")
    assert [(d.name, d.text) for d in archive.documents()] == [("no-such-package/lib/a.js", source("lib/a.js"))]
    monkeypatch.undo()
    assert archive.missing() == "no-such-package is not installed"
