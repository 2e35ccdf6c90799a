"""What tests of programs need of the machine. On CI it has to be there; elsewhere its absence is said and skipped."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest

from secateur.errors import SandboxError
from secateur.evaluation.programs.languages import Toolchain, toolchain
from secateur.evaluation.programs.program import Language
from secateur.evaluation.sandbox.running import Sandbox
from tests.evaluation.programs.mini import save_mini

_T = TypeVar("_T")


def _there(make: Callable[[], _T]) -> _T:
    try:
        return make()
    except SandboxError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error}")


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    """A sandbox."""
    return _there(Sandbox)


@pytest.fixture(scope="session")
def toolchain_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Language], Toolchain]]:
    """Gives the toolchain of a language; what it prepares lies in a folder of the tests."""
    before = os.environ.get("SECATEUR_CACHE")
    os.environ["SECATEUR_CACHE"] = str(tmp_path_factory.mktemp("toolchains"))
    yield cache(lambda language: _there(lambda: toolchain(language)))
    os.environ.pop("SECATEUR_CACHE")
    if before is not None:
        os.environ["SECATEUR_CACHE"] = before


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with the benchmark of `mini`."""
    return save_mini(tmp_path / "data")
