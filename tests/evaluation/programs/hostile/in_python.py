"""In Python."""

from tests.evaluation.programs.hostile import FAILED, WRONG, Hostile

_ATTEMPT = "assert attempt() is True\n"
_HONEST = "assert answer(20) == 42 and abs(answer(20) - 42) < 1e-6\n"


def _tries(name: str, code: str, outcomes: tuple[str, ...] = FAILED) -> Hostile:
    return Hostile(name, "python", code, outcomes, _ATTEMPT)


def _forges(name: str, code: str, outcomes: tuple[str, ...]) -> Hostile:
    return Hostile(name, "python", code, outcomes, _HONEST)


PROGRAMS = (
    _tries("read a secret", 'def attempt():\n    return "SECRET" in open("{secret}").read()\n'),
    _tries("read a secret of the environment", 'import os\ndef attempt():\n    return "SECRET" in str(os.environ)\n', WRONG),
    _tries(
        "read another process",
        """
def attempt():
    found = False
    for name in ("environ", "cmdline", "maps", "root{secret}"):
        try:
            with open("/proc/{pid}/" + name, "rb") as file:
                found = found or bool(file.read(10))
        except OSError:
            pass
    return found
""",
        WRONG,
    ),
    _tries(
        "read a secret through links",
        """
import os
def attempt():
    found = False
    for link in (os.symlink, os.link):
        try:
            link("{secret}", "link-" + link.__name__)
            found = found or "SECRET" in open("link-" + link.__name__).read()
        except OSError:
            pass
    return found
""",
        WRONG,
    ),
    _tries("write outside", 'def attempt():\n    return open("{folder}/mark", "w").write("x") == 1\n'),
    _tries(
        "write among the system's programs",
        """
import os
def attempt():
    done = []
    for folder in ("/usr/bin", "/usr/local/bin", "/usr/lib", "/etc", "/"):
        path = folder + "/secateur-hostile-mark"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
            os.unlink(path)
            done.append(folder)
        except OSError:
            pass
    return bool(done)
""",
        WRONG,
    ),
    _tries(
        "change a setting of the kernel",
        """
def attempt():
    with open("/proc/sys/kernel/core_pattern", "r+") as file:
        value = file.read()
        file.seek(0)
        file.write(value)
    return True
""",
    ),
    _tries(
        "connect to a listener on loopback",
        """
import socket
def attempt():
    socket.create_connection(("127.0.0.1", {port}), 2).sendall(b"mark")
    return True
""",
    ),
    _tries(
        "send a datagram to loopback",
        """
import socket
def attempt():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"mark", ("127.0.0.1", {port}))
    return False  # whether it came is asked by the test
""",
    ),
    _tries(
        "connect to an abstract socket",
        """
import socket
def attempt():
    socket.socket(socket.AF_UNIX).connect(bytes([0]) + b"{socket}")
    return True
""",
    ),
    _tries("open a socket to a hypervisor", "import socket\ndef attempt():\n    return bool(socket.socket(40, 1))\n"),
    _tries(
        "start many processes",
        """
import os, time
def attempt():
    for number in range(300):
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
    return True
""",
    ),
    _tries(
        "start many threads",
        """
import threading, time
def attempt():
    for number in range(300):
        threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
    return True
""",
    ),
    _tries(
        "fork without end for a while",
        """
import os, time
def attempt():
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if os.fork() == 0:
                time.sleep(1)
                os._exit(0)
        except OSError:
            pass
    return True
""",
        ("timeout", "wrong", "error", "memory"),
    ),
    _tries("allocate 2 GiB", 'def attempt():\n    return len(bytearray(b"x") * (2 << 30)) > 0\n'),
    _tries(
        "share 2 GiB",
        """
import mmap
def attempt():
    memory = mmap.mmap(-1, 2 << 30)
    for place in range(0, 2 << 30, 4096):
        memory[place] = 1
    return True
""",
        ("error",),
    ),
    _tries(
        "hold memory that is no process's",
        """
import ctypes, mmap, os
def attempt():
    made = []
    for make in (
        lambda: os.memfd_create("x"),
        lambda: mmap.mmap(-1, 1 << 20),
        lambda: ctypes.CDLL(None, use_errno=True).shmget(0, 1 << 20, 0o1600),
        lambda: mmap.mmap(os.open("/dev/zero", os.O_RDWR), 1 << 20),
    ):
        try:
            made.append(make())
        except OSError:
            pass
    return made != [-1]
""",
        WRONG,
    ),
    _tries(
        "read what the first process was given",
        """
def attempt():
    found = False
    for number in (1, 2, 3):
        try:
            with open(f"/proc/{number}/environ", "rb") as file:
                found = found or b"SECRET" in file.read()
        except OSError:
            pass
    return found
""",
        WRONG,
    ),
    _tries(
        "allocate in many processes",
        """
import os, time
def attempt():
    for number in range(4):
        if os.fork() == 0:
            block = bytearray(b"x") * (500 << 20)
            time.sleep(10)
            os._exit(0)
    time.sleep(10)
    return True
""",
        ("memory",),
    ),
    _tries(
        "write 256 MiB",
        """
def attempt():
    for number in range(64):
        with open(f"file{number}", "wb") as file:
            file.write(bytes(4 << 20))
    return True
""",
    ),
    _tries(
        "write into shared memory and devices",
        """
import os
def attempt():
    done = False
    for path in ("/dev/shm/mark", "/dev/mark", "/run/mark", "/var/tmp/mark"):
        try:
            with open(path, "wb") as file:
                file.write(b"mark")
            os.unlink(path)
            done = True
        except OSError:
            pass
    return done
""",
        WRONG,
    ),
    _tries(
        "open devices",
        """
import os
def attempt():
    names = ("mem", "kmsg", "kvm", "fuse", "sda", "vda", "nvme0n1", "net/tun", "dri/card0", "loop-control")
    for name in names:
        try:
            os.close(os.open("/dev/" + name, os.O_RDONLY))
            return True
        except OSError:
            pass
    return False
""",
        WRONG,
    ),
    _tries("write without end", 'def attempt():\n    for _ in range(1024):\n        print("x" * 65536)\n    return True\n', ("output",)),
    _tries(
        "write errors without end",
        'import sys\ndef attempt():\n    for _ in range(1024):\n        sys.stderr.write("x" * 65536)\n    return True\n',
        ("output",),
    ),
    _tries(
        "ignore signals",
        """
import signal, time
def attempt():
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    end = time.monotonic() + 40
    while time.monotonic() < end:
        pass
    return True
""",
        ("timeout", "crash"),
    ),
    _tries("sleep", "import time\ndef attempt():\n    time.sleep(40)\n    return True\n", ("timeout",)),
    _tries(
        "leave a daemon behind",
        """
import os, socket, time
def attempt():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for descriptor in range(3):
                os.close(descriptor)
            time.sleep(2)
            try:
                open("{folder}/daemon", "w").close()
            finally:
                os._exit(0)
        os._exit(0)
    return False  # whether it lives on is asked by the test
""",
        WRONG,
    ),
    _tries("hold the outputs open", "import os, time\ndef attempt():\n    if os.fork() == 0:\n        time.sleep(30)\n    return False\n", WRONG),
    _tries("send a signal to another process", "import os\ndef attempt():\n    os.kill({pid}, 15)\n    return True\n"),
    _tries(
        "trace the process that watches",
        """
import ctypes
def attempt():
    return any(ctypes.CDLL(None).ptrace(16, pid, 0, 0) == 0 for pid in (1, 2))
""",
        WRONG,
    ),
    _tries(
        "make new namespaces",
        """
import ctypes
def attempt():
    libc = ctypes.CDLL(None)
    return any(libc.unshare(flag) == 0 for flag in (0x10000000, 0x20000, 0x40000000))
""",
        WRONG,
    ),
    _tries(
        "mount and change the root",
        """
import ctypes
def attempt():
    libc = ctypes.CDLL(None)
    return libc.mount(b"none", b"/dev", b"tmpfs", 0, None) == 0 or libc.chroot(b"/usr") == 0
""",
        WRONG,
    ),
    _tries("become root", "import os\ndef attempt():\n    os.setuid(0)\n    return os.getuid() == 0 and True\n"),
    _tries("overflow the stack", "import sys\nsys.setrecursionlimit(10**9)\ndef attempt():\n    return attempt()\n", ("crash", "error", "memory", "timeout")),
    _forges("wait for input", "def answer(x):\n    return int(input())\n", ("error",)),
    _forges("look for the token in the input", "import os\nprint(os.read(0, 100).decode())\nos._exit(0)\n", ("no_verdict",)),
    _forges("look for the token in files", "import os\nfor n in os.listdir('.'):\n    print(open(n).read())\nos._exit(0)\n", ("no_verdict",)),
    _forges(
        "look for the token in arguments",
        "import os\nprint(open('/proc/self/cmdline').read(), open('/proc/1/cmdline').read(), os.environ)\nos._exit(0)\n",
        ("no_verdict", "error"),
    ),
    _forges("print what success prints", 'print("passed\\nOK\\nall tests passed")\nraise SystemExit(0)\n', ("no_verdict",)),
    _forges("exit 0 early", "import os\nos._exit(0)\n", ("no_verdict",)),
    _forges("exit 0 in the answer", "import sys\ndef answer(x):\n    sys.exit(0)\n", ("no_verdict",)),
    _forges("hide built-in functions", "def abs(x):\n    return 0\ndef answer(x):\n    return 41\n", WRONG),
    _forges(
        "replace built-in functions",
        "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.exec = lambda *a: None\nbuiltins.compile = None\ndef answer(x):\n    return 41\n",
        WRONG,
    ),
    _forges(
        "replace the assertion error",
        "import builtins\nclass Quiet(SystemExit):\n    pass\nbuiltins.AssertionError = Quiet\ndef answer(x):\n    return 41\n",
        WRONG,
    ),
    _forges("replace the checks", "open('checks.py', 'w').write('')\ndef answer(x):\n    return 41\n", FAILED),
    _forges(
        "remove the checks",
        "import os\nos.remove('checks.py')\nopen('checks.py', 'w').write('')\ndef answer(x):\n    return 41\n",
        WRONG,
    ),
)  # fmt: skip
