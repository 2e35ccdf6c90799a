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


@pytest.mark.skipif(not shutil.which("make") or not shutil.which("g++"), reason="needs make and g++")
def test_native_code_under_sanitizers(tmp_path):
    output = make("sanitize", SANITIZED=tmp_path, CXX="g++")
    assert "damaged ones refused" in output


@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"),
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_under_emulation(tmp_path):
    output = make("neon", ARM=tmp_path)
    assert "neon neon-base reference on" in output
    assert "\nneon-base reference on" in output
