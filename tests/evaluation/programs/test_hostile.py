"""Programs that try to break out of the sandbox, or to pass without being right."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from secateur.evaluation.programs.checking import check
from secateur.evaluation.programs.languages import Toolchain
from secateur.evaluation.programs.program import Language, Program
from secateur.evaluation.sandbox.box import FIRST_USER
from secateur.evaluation.sandbox.running import Sandbox
from tests.evaluation.programs.hostile import Hostile, in_cpp, in_java, in_javascript, in_python

HOSTILE = [*in_python.PROGRAMS, *in_javascript.PROGRAMS, *in_cpp.PROGRAMS, *in_java.PROGRAMS]
BOUND = 130  # seconds that any of them may take, on a machine that does other things too


class Host:
    """What hostile programs aim at, and what became of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret = folder / "secret.txt"
        self.secret.write_text("SECRET")
        self.open_folder = folder / "open"
        self.open_folder.mkdir()
        for path, mode in ((folder, 0o755), (self.open_folder, 0o777), (self.secret, 0o644)):
            path.chmod(mode)
        self.heard: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = self.listener.getsockname()[1]
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind(("127.0.0.1", port))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0secateur-{os.getpid()}")
        self.abstract.listen()
        for name, ear in (("tcp", self.listener), ("udp", self.datagrams), ("unix", self.abstract)):
            threading.Thread(target=self._listen, args=(name, ear), daemon=True).start()
        self.victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.targets = {
            "secret": str(self.secret),
            "folder": str(self.open_folder),
            "port": str(port),
            "socket": f"secateur-{os.getpid()}",
            "pid": str(self.victim.pid),
        }

    def _listen(self, name: str, ear: socket.socket) -> None:
        while True:
            try:
                if name == "udp":
                    ear.recv(10)
                else:
                    ear.accept()
            except OSError:
                return
            self.heard.append(name)

    def harm(self) -> list[str]:
        """Return what was done to the host."""
        found = [f"heard {name}" for name in self.heard]
        found += [f"wrote {path.name}" for path in self.open_folder.iterdir()]
        if self.victim.poll() is not None:
            found.append("ended the victim")
        if self.secret.read_text() != "SECRET":
            found.append("changed the secret")
        return found

    def close(self) -> None:
        """End what was started."""
        self.victim.kill()
        self.victim.wait()
        for ear in (self.listener, self.datagrams, self.abstract):
            ear.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host with a secret, a folder that all may write to, listeners, and a process to be attacked."""
    os.environ["SECATEUR_HOSTILE_TEST"] = "SECRET"
    made = Host(tmp_path_factory.mktemp("host"))
    yield made
    made.close()
    del os.environ["SECATEUR_HOSTILE_TEST"]


def _scale(hostile: Hostile) -> float:
    """Return little time where only time ends a program; any other limit it can reach on a busy machine, too."""
    return 0.5 if "timeout" in hostile.outcomes else 4


@pytest.mark.parametrize("hostile", HOSTILE, ids=[f"{one.language}: {one.name}" for one in HOSTILE])
def test_is_scored_as_failed_and_harms_nothing(
    hostile: Hostile, host: Host, sandbox: Sandbox, toolchain_of: Callable[[Language], Toolchain]
) -> None:
    code = hostile.aimed(host.targets)
    begin = time.monotonic()
    program = Program(hostile.language, code, hostile.checks)
    verdict = check(program, toolchain_of(hostile.language), sandbox, scale=_scale(hostile))
    assert time.monotonic() - begin < BOUND
    assert verdict.outcome in hostile.outcomes, verdict
    assert "SECRET" not in verdict.detail
    assert host.harm() == []


def test_nothing_lives_on(host: Host) -> None:
    """What the programs above have left behind would have spoken by now."""
    time.sleep(3)
    assert host.harm() == []
    left = [process.name() for process in psutil.Process().children(recursive=True) if "bwrap" in process.name()]
    # What has lost its parent is still known by its user, of whom root gives each program one.
    ours = range(first := FIRST_USER + 64 * (os.getpid() % 1_000_000), first + 64)
    for process in psutil.process_iter(["name", "uids"]):
        if process.info["uids"] is not None and process.info["uids"].real in ours:
            left.append(process.info["name"])
    assert left == []


AS_A_USER = (
    "read what the first process was given",
    "read a secret",
    "connect to a listener on loopback",
    "start many processes",
    "leave a daemon behind",
    "make new namespaces",
    "trace the process that watches",
    "ignore signals",
)


@pytest.mark.skipif(os.geteuid() != 0, reason="the tests above have run as a user")
@pytest.mark.parametrize("name", AS_A_USER)
def test_what_root_would_not_need_holds_for_a_user_too(
    name: str, host: Host, toolchain_of: Callable[[Language], Toolchain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a user namespace, as for anybody but root."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    hostile = next(one for one in in_python.PROGRAMS if one.name == name)
    program = Program("python", hostile.aimed(host.targets), hostile.checks)
    verdict = check(program, toolchain_of("python"), Sandbox(), scale=_scale(hostile))
    # The number of root's processes has no limit in a user namespace (anybody else's has one), only their memory has.
    outcomes = (*hostile.outcomes, "passed", "memory") if name == "start many processes" else hostile.outcomes
    assert verdict.outcome in outcomes, verdict
    assert host.harm() == []


def test_one_program_leaves_nothing_for_the_next(
    sandbox: Sandbox, toolchain_of: Callable[[Language], Toolchain]
) -> None:
    code = """
import os
def attempt():
    found = False
    for folder in (os.getcwd(), "/tmp", "/var/tmp", "/dev/shm", "/run"):
        path = os.path.join(folder, "left-behind")
        found = found or os.path.exists(path)
        try:
            open(path, "w").close()
        except OSError:
            pass
    return found
"""
    program = Program("python", code, "assert attempt() is True\n")
    assert [check(program, toolchain_of("python"), sandbox).outcome for _ in range(2)] == ["wrong", "wrong"]
