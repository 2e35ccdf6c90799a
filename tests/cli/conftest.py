import tempfile
from pathlib import Path

import pytest
from transformers.utils import logging

from secateur.cli import main
from tests.cli.running import write_sources
from tests.tiny import save_tiny


@pytest.fixture(autouse=True, scope="package")
def _quiet_transformers():
    """What `console.quiet_libraries` asks for can only be heard before transformers is imported."""
    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with the model `base`, the sources `text` and the sub-model `child`; no test writes into it."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "base", "llama")
    write_sources(folder / "text")
    small = ["--samples", "4", "--sequence-length", "64", "--threads", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["derive", f"{folder}/base", "--for", f"{folder}/text", *small, "-o", f"{folder}/child"])
    assert not ended.value.code
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """The folder that a test works in; caches and temporary files go into it as well, so that litter shows."""
    folder = tmp_path / "work"
    for name in ("cache", "tmp"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setenv("SECATEUR_CACHE", str(folder / "cache"))
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    monkeypatch.chdir(folder)
    return folder
