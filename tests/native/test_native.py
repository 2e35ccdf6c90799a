import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(target, **variables):
    command = ["make", "-j2", target, *(f"{name}={value}" for name, value in variables.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_native_code_under_sanitizers(sanitized):
    output = make("sanitize", SANITIZED=sanitized, CXX="g++")
    for said in ("damaged ones refused", "reference on 16 models", "sampling on 20000 distributions"):
        assert said in output


@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"),
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_under_emulation(tmp_path):
    output = make("neon", ARM=tmp_path)
    for said in ("40 weights", "4 models"):
        assert f"neon neon-base reference on {said}" in output
        assert f"\nneon-base reference on {said}" in output
