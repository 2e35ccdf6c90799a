import os
import shutil
import sys

import pytest
from filelock import FileLock

from tests.runtime.sanitized import build


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """Build the native code under sanitizers, once for all workers; return the folder."""
    if sys.platform != "linux" or not shutil.which("make") or not shutil.which("g++"):
        pytest.skip("needs Linux, make and g++")
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with FileLock(root / "sanitized.lock"):
        build(root / "sanitized")
    return root / "sanitized"
