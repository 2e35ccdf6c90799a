"""The command line that puts a program into a sandbox (bubblewrap), and whether this machine can."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from secateur.errors import SandboxError
from secateur.evaluation.sandbox import seccomp
from secateur.evaluation.sandbox.limits import Limits

WORK = "/program-in-a-box"  # the folder of a program, in memory: a name that hides no folder of the host
_NOBODY = 65534
FIRST_USER = 1_900_000_000  # users that no system gives to anybody
_PASSWD = f"program:x:65534:65534::{WORK}:/bin/false\n".encode()
# Of /etc: how libraries are found, alternatives of commands, and how Java is set up.
_SETTINGS = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "java*")
# A shell is the first process, with the program's rights: bubblewrap's own would have more, and could be written into.
# The program itself would as the first one not be ended by signals. When the shell ends all ends.
_FIRST_PROCESS = ("/bin/sh", "-c", '"$@"; exit $?', "sh")
_ROOTS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


@dataclass(frozen=True)
class Job:
    """A program to run.

    Attributes
    ----------
    command
        What is run, in the folder of the program.
    files
        {name: content} of the files in that folder, which it may remove.
    input
        What it reads on its standard input, once; at most 4,096 bytes.
    folders
        Folders of the host that are shown read-only, in their own places: where a compiler or an interpreter lives.
    limits
        What it may use.
    """

    command: tuple[str, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    input: bytes = b""
    folders: tuple[Path, ...] = ()
    limits: Limits = field(default_factory=Limits)


def bubblewrap() -> str:
    """Return the path of bubblewrap.

    Raises
    ------
    SandboxError
        When it is not installed, or there is no filter for this processor.
    """
    found = shutil.which("bwrap")
    if found is None or shutil.which("prlimit") is None:
        missing = "bubblewrap" if found is None else "prlimit (util-linux)"
        raise SandboxError(
            f"{missing} is not installed, and without a sandbox no generated program is run; install it "
            "(Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap)"
        )
    if not seccomp.known_machine():
        raise SandboxError("the sandbox knows x86_64 and aarch64 processors, and this is neither")
    return found


@dataclass(frozen=True)
class Box:
    """What runs a job in a sandbox.

    Attributes
    ----------
    command, inherited
        The command, and the descriptors that it inherits.
    status
        The end of a pipe from which `was_entered` is read.
    """

    command: list[str]
    inherited: tuple[int, ...]
    status: int

    def was_entered(self) -> bool:
        """Return whether a command that has ended by itself had set up its sandbox and run the job in it.

        Only bubblewrap can say so, not the program: the job does not inherit that pipe.
        """
        os.set_blocking(self.status, False)
        try:
            return b'"exit-code"' in os.read(self.status, 4096)
        except BlockingIOError:
            return False


@contextmanager
def confined(job: Job, slot: int) -> Iterator[Box]:
    """Give what runs a job in a sandbox.

    `slot` is a small number that no other running job has: as root it decides as which user the program runs.
    """
    with ExitStack() as open_files:
        inherited: list[int] = []
        status, said = os.pipe()
        for descriptor in (status, said):
            open_files.callback(os.close, descriptor)
        inherited.append(said)

        def memory_file(content: bytes) -> str:
            descriptor = os.memfd_create("secateur")
            open_files.callback(os.close, descriptor)
            with os.fdopen(descriptor, "wb", closefd=False) as writer:
                writer.write(content)
            os.lseek(descriptor, 0, os.SEEK_SET)
            inherited.append(descriptor)
            return str(descriptor)

        command = [
            bubblewrap(),
            "--json-status-fd",
            str(said),
            "--seccomp",
            memory_file(seccomp.program()),
            *_namespaces(),
            *_system(job.folders),
        ]
        command += ["--perms", "0444", "--file", memory_file(_PASSWD), "/etc/passwd"]
        command += ["--perms", "0777", "--size", str(job.limits.files), "--tmpfs", WORK]
        for name, content in job.files.items():
            command += ["--perms", "0444", "--file", memory_file(content), f"{WORK}/{name}"]
        command += ["--remount-ro", "/", "--chdir", WORK, *_environment(), "--"]
        command += [*job.limits.prlimit(), *_dropped(slot), *_FIRST_PROCESS, *job.command]
        yield Box(command, tuple(inherited), status)


def _namespaces() -> list[str]:
    apart = ["--as-pid-1", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    apart += ["--hostname", "box", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if os.geteuid() == 0:  # not in a user namespace: there root's number of processes has no limit
        return [*apart, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return [*apart, "--unshare-user", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]


def _dropped(slot: int) -> list[str]:
    """Return the command by which root becomes a user without rights that nothing else runs as."""
    if os.geteuid() != 0:
        return []
    user = str(FIRST_USER + 64 * (os.getpid() % 1_000_000) + slot)
    return [
        "setpriv",
        f"--reuid={user}",
        f"--regid={user}",
        "--clear-groups",
        "--inh-caps=-all",
        "--no-new-privs",
        "--pdeathsig=KILL",
        "--",
    ]


def _system(folders: Sequence[Path]) -> list[str]:
    """Return arguments that show the system's programs, devices and processes, and the folders of a job."""
    shown = ["--ro-bind", "/usr", "/usr"]
    for name in _ROOTS:
        path = Path("/", name)
        if path.is_symlink():
            shown += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            shown += ["--ro-bind", str(path), str(path)]
    shown += ["--perms", "0755", "--dir", "/etc"]
    for path in sorted(path for name in _SETTINGS for path in Path("/etc").glob(name)):
        shown += ["--ro-bind", str(path), str(path)]
    for folder in folders:
        for parent in list(folder.parents)[-2::-1]:  # which would be nobody's to look into
            shown += ["--perms", "0755", "--dir", str(parent)]
        shown += ["--ro-bind", str(folder), str(folder)]
    # The folder of shared memory is not writable, and no memory is mapped from /dev/zero: it would count for nobody.
    return [*shown, "--dev", "/dev", "--dev-bind", "/dev/null", "/dev/zero", "--remount-ro", "/dev", "--proc", "/proc"]


def environment_in(folder: str) -> dict[str, str]:
    """Return the environment of a program that works in a folder, but for where commands are found."""
    settings = {"LANG": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0"}
    return {"HOME": folder, "TMPDIR": folder, **settings}


def _environment() -> list[str]:
    pairs = {"PATH": "/usr/local/bin:/usr/bin:/bin", **environment_in(WORK)}
    return ["--clearenv", *[part for name, value in pairs.items() for part in ("--setenv", name, value)]]
