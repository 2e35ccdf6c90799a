import dataclasses
import gzip
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.calibration import clients
from secateur.calibration.clients import Package, PackageSource, cache_file, load_package, render_archive
from secateur.calibration.documents import documents_hash
from secateur.calibration.pins import ALGORITHMS, CAPACITOR_ANDROID, CORDOVA_ANDROID, MATHJS, NODE_WHEEL, THREE
from secateur.calibration.sources import SourceUnavailableError
from secateur.errors import CorpusError
from tests.calibration.texts import source, tarred, zipped

MEMBERS = {
    "package/src/b.js": source("b").encode(),
    "package/src/a.js": source("a").encode(),
    "package/src/tiny.js": b"x\n",
    "package/build/c.js": source("c").encode(),
    "package/../../evil.js": source("evil").encode(),
}
ARCHIVE = tarred(MEMBERS, link="package/src/link.js")
PACKAGE = Package(
    name="@scope/pack",
    version="1.2.3",
    licence="MIT",
    member=r"package/(src/.*\.js)",
    archives=(("pack-1.2.3.tgz", hashlib.sha256(ARCHIVE).hexdigest()),),
    documents_sha256="d68ffd94b857711bb38d6adbad71f6f9491246afb34ad16ca3142bf6291f4401",
)


class Index:
    """Stands for a package index behind the client: writes `content` where the command says, and counts."""

    def __init__(self) -> None:
        self.content = ARCHIVE
        self.file_name = "pack-1.2.3.tgz"
        self.commands: list[list[str]] = []

    def run(self, command: list[str], folder: Path) -> None:
        self.commands.append(command)
        assert not list(folder.iterdir())
        assert str(folder) in command
        (folder / self.file_name).write_bytes(self.content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    index = Index()
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(clients, "run_client", index.run)
    return index


def test_archive_renders_matching_members_by_name() -> None:
    documents = render_archive(PACKAGE, ARCHIVE)
    assert [(document.name, document.text) for document in documents] == [
        ("@scope/pack/src/a.js", source("a")),
        ("@scope/pack/src/b.js", source("b")),
    ]
    assert documents_hash(documents) == PACKAGE.documents_sha256
    assert render_archive(PACKAGE, zipped(MEMBERS)) == documents


@pytest.mark.parametrize("content", [b"", b"neither", ARCHIVE[:-40], b"PK and no more", zipped(MEMBERS)[:-40]])
def test_damaged_archive_is_an_error(content: bytes) -> None:
    with pytest.raises(CorpusError, match=r"the archive of @scope/pack 1\.2\.3 is damaged"):
        render_archive(PACKAGE, content)


def test_commands_only_download(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    load_package(PACKAGE, "npm")
    npm = index.commands[0]
    assert (npm[:4], npm[-1]) == (["/bin/npm", "pack", "--ignore-scripts", "--silent"], "@scope/pack@1.2.3")
    pip = clients.client_command(PACKAGE, "pip", Path("/to"))
    assert pip[:7] == [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    assert pip[-1] == "@scope/pack==1.2.3"


def test_second_time_comes_from_the_cache(index: Index) -> None:
    first = load_package(PACKAGE, "npm")
    assert load_package(PACKAGE, "npm") == first
    assert len(index.commands) == 1
    assert [file.name for file in cache_file(PACKAGE).parent.iterdir()] == [cache_file(PACKAGE).name]


@pytest.mark.parametrize("damage", ["cut", "text", "no gzip", "no name", "no object"])
def test_damaged_cache_is_fetched_again(index: Index, damage: str) -> None:
    first = load_package(PACKAGE, "npm")
    file = cache_file(PACKAGE)
    whole = file.read_bytes()
    damaged = {
        "cut": whole[:-9],
        "text": gzip.compress(gzip.decompress(whole).replace(b"line 3", b"line X")),
        "no gzip": b"x",
        "no name": gzip.compress(b'{"text": "x"}\n'),
        "no object": gzip.compress(b"[1]\n"),
    }
    file.write_bytes(damaged[damage])
    assert load_package(PACKAGE, "npm") == first
    assert len(index.commands) == 2
    assert file.read_bytes() == whole


def test_wrong_archive_is_refused_before_use(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.content = tarred({**MEMBERS, "package/src/z.js": source("z").encode()})
    monkeypatch.setattr(clients, "render_archive", lambda *_: pytest.fail("opened before it was checked"))
    expected, received = PACKAGE.archives[0][1], hashlib.sha256(index.content).hexdigest()
    with pytest.raises(CorpusError, match=f"expected SHA-256 {expected}, received {received}") as error:
        load_package(PACKAGE, "npm")
    assert not isinstance(error.value, SourceUnavailableError)  # nothing else is tried instead
    assert not cache_file(PACKAGE).exists()


def test_archive_of_another_platform_has_to_render_the_same(index: Index) -> None:
    index.file_name, index.content = "pack-1.2.3-other.whl", zipped(MEMBERS)
    assert len(load_package(PACKAGE, "pip")) == 2
    cache_file(PACKAGE).unlink()
    index.content = zipped({**MEMBERS, "package/src/a.js": source("other").encode()})
    with pytest.raises(CorpusError, match=f"expected SHA-256 {PACKAGE.documents_sha256}"):
        load_package(PACKAGE, "pip")


def test_client_that_leaves_nothing_is_passed_over(index: Index) -> None:
    index.file_name = "log.txt"
    with pytest.raises(SourceUnavailableError, match="npm left 0 archives of @scope/pack"):
        load_package(PACKAGE, "npm")


def test_cache_that_cannot_be_written(index: Index, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CorpusError, match="set SECATEUR_CACHE to a folder that can be written"):
        load_package(PACKAGE, "npm")


def test_source_is_there_with_its_client_or_its_cache(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    npm = PackageSource("npm packages", "get npm", "npm", (PACKAGE,))
    assert npm.missing() == "npm is not on PATH"
    load_package(PACKAGE, "npm")
    assert npm.missing() is None
    assert npm.version() == "@scope/pack@1.2.3"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    other = dataclasses.replace(PACKAGE, version="2")
    pip = PackageSource("wheel", "get pip", "pip", (other, other))
    assert (pip.missing(), pip.licence()) == ("this Python has no pip", "MIT")


def test_run_client_reports_what_the_client_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients.run_client([sys.executable, "-c", "import os; assert os.listdir() == []"], tmp_path)
    with pytest.raises(SourceUnavailableError, match="ended with 3: no such package"):
        clients.run_client(
            [sys.executable, "-c", "import sys; print('no such package', file=sys.stderr); sys.exit(3)"], tmp_path
        )
    with pytest.raises(SourceUnavailableError, match="did not start"):
        clients.run_client([str(tmp_path / "none")], tmp_path)
    monkeypatch.setattr(clients, "TIMEOUT_SECONDS", 0.01)
    with pytest.raises(SourceUnavailableError, match=r"took over 0\.01 s"):
        clients.run_client([sys.executable, "-c", "import time; time.sleep(5)"], tmp_path)


def test_pins_are_whole() -> None:
    for package in (THREE, MATHJS, CAPACITOR_ANDROID, CORDOVA_ANDROID, ALGORITHMS, NODE_WHEEL):
        hashes = [package.documents_sha256, *(digest for _, digest in package.archives)]
        assert all(len(digest) == 64 and int(digest, 16) for digest in hashes)
        assert len(set(hashes)) == len(hashes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "package", [THREE, MATHJS, CAPACITOR_ANDROID, CORDOVA_ANDROID, ALGORITHMS, NODE_WHEEL], ids=lambda p: p.name
)
def test_real_packages_are_what_was_pinned(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    client = "pip" if package in {ALGORITHMS, NODE_WHEEL} else "npm"
    assert subprocess.run([sys.executable, "-m", "pip", "--version"], check=False).returncode == 0
    assert len(load_package(package, client)) > 40
