"""What runs natively from Python, once more under sanitizers."""

import json

import pytest

from secateur.runtime import kernels
from tests.runtime.native_models import NATIVE
from tests.runtime.sanitized import VALUES, make_models, run_python

CASES = 100
EVERYWHERE = ("test_engine.py", "test_native_model.py", "test_misuse.py")
OVERREAD = """
import numpy as np
from secateur.runtime.kernels import load_library
array = np.zeros(6400, np.uint8)
load_library().sct_read_memory(None, array.ctypes.data, 6464)
"""


def test_an_overread_of_python_s_memory_is_seen(sanitized):
    done = run_python(sanitized, "-c", OVERREAD)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_engine(sanitized, tmp_path, isa):
    files = (*EVERYWHERE, "test_kernels.py", "test_native_loading.py") if isa == kernels.isa() else EVERYWHERE
    arguments = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={tmp_path / 'inner'}")
    done = run_python(
        sanitized, "-m", "pytest", *arguments, *(f"tests/runtime/{file}" for file in files), SECATEUR_ISA=isa
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def test_corrupted_models(sanitized, tmp_path):
    make_models(tmp_path, NATIVE)
    for values in VALUES:
        done = run_python(sanitized, "-m", "tests.runtime.corruptions", str(tmp_path / values), "--count", str(CASES))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        counts = json.loads(done.stdout)
        assert counts["refused"] + counts["ran"] == CASES
