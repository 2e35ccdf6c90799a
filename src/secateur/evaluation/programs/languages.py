"""How programs of each language are compiled and run with their checks: commands, files, and what a compiler needs.

A program that passes says a token that it is given for this one run, behind its last check: to end early, or to print
what a good program prints, is not to pass. What checks use is kept from being replaced as far as a language allows.
Program and checks still share a process, so a program that is written to cheat can: it can find the token in its own
memory or in its caller's variables (Python, C++, JavaScript), return objects that are equal to everything, and replace
parts of the language that are not looked after here. No model that was not trained to do so writes that; who scores
samples of unknown origin should read those that pass.
"""

import hashlib
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Protocol

from secateur.evaluation.programs.installed import checked, installed, made_once, outside_usr, said
from secateur.evaluation.programs.program import Language, Program
from secateur.evaluation.sandbox.box import Job
from secateur.evaluation.sandbox.limits import Limits, MiB

WRONG, DOES_NOT_COMPILE, NO_MEMORY = 97, 96, 95  # exit codes of the drivers
_DRIVERS = files("secateur.evaluation.programs") / "drivers"
_INCLUDES = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)*")  # the first lines of some checks in C++
_SECONDS = {"python": 5.0, "javascript": 5.0, "java": 15.0, "cpp": 20.0}  # of processor time, with compiling
# A program that has the classes loaded which the archive is to have.
_FIRST = "import java.util.*;\nclass Problem { public static void main(String[] x) { assert(x != null); } }\n"
_JVM = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-Xshare:auto", "-Xss8m")


class Toolchain(Protocol):
    """Runs programs of one language."""

    language: Language
    version: str

    def job(self, program: Program, token: str) -> Job:
        """Return the job that runs a program; it writes `token` on a line of its own if all checks hold."""


def toolchain(language: Language) -> Toolchain:
    """Return what runs programs of a language on this machine; what it needs is made once and kept in the cache.

    Raises
    ------
    SandboxError
        When a compiler or interpreter is not installed.
    """
    kinds: dict[Language, type[Toolchain]] = {"python": Python, "java": Java, "cpp": Cpp, "javascript": JavaScript}
    return kinds[language]()


def new_token() -> str:
    """Return a token that no program can guess."""
    return secrets.token_hex(16)


def limits_of(language: Language, scale: float) -> Limits:
    """Return what a program may use; `scale` is how much slower this machine is than the one limits were set on."""
    memory = 1536 if language in ("java", "javascript") else 1024
    return Limits(seconds=_SECONDS[language] * scale, memory=memory * MiB)


def encoded(text: str) -> bytes:
    """Return a program's bytes; what is no text stays, and no compiler takes it."""
    return text.encode("utf-8", "surrogatepass")


class Python:
    """The interpreter that runs secateur, without site packages and settings; sets have the same order each time."""

    language: Language = "python"

    def __init__(self) -> None:
        self.command = Path(sys.executable).resolve()
        self.version = "Python " + sys.version.split()[0]
        self.folders = outside_usr(Path(sys.base_prefix).resolve(), self.command.parent)
        self.driver = (_DRIVERS / "driver.py").read_bytes()

    def job(self, program: Program, token: str) -> Job:
        """Return the job of a program: `driver.py` runs the program, then its checks."""
        contents = {"driver.py": self.driver, "program.py": encoded(program.code), "checks.py": encoded(program.checks)}
        command = (str(self.command), "-s", "-P", "-S", "-B", "-X", "utf8", "-X", "int_max_str_digits=0", "driver.py")
        return Job((*command, *program.called), contents, token.encode(), self.folders)


class JavaScript:
    """Node; `require` of the checks has a name that is drawn for this run, and node's assert is frozen."""

    language: Language = "javascript"

    def __init__(self) -> None:
        self.command = installed("node", "Debian, Ubuntu: apt-get install nodejs")
        self.version = "Node " + said(self.command, "--version")
        self.folders = outside_usr(self.command.parent.parent)
        self.driver = (_DRIVERS / "driver.js").read_bytes()

    def job(self, program: Program, token: str) -> Job:
        """Return the job of a program: `driver.js` loads it as a module, checks at its end."""
        name = f"require_{new_token()}"
        checks = re.sub(r"\brequire\(", f"{name}(", program.checks)
        # A block of their own, in which names of the program may be declared again.
        contents = {
            "driver.js": self.driver,
            "program.js": encoded(f"{program.code}\n;{{\n{checks}\n;{name}.done();\n}}"),
        }
        command = (str(self.command), "--max-old-space-size=512", "--stack-size=900", "driver.js", name)
        return Job(command, contents, token.encode(), self.folders)


class Cpp:
    """g++ with a precompiled standard library; the checks are a main function, at whose end the token is said."""

    language: Language = "cpp"
    _FLAGS = ("-std=c++17", "-O1", "-w", "-pipe")

    def __init__(self) -> None:
        self.command = installed("g++", "Debian, Ubuntu: apt-get install g++")
        self.version = said(self.command, "--version")
        known = hashlib.sha256(repr((self.version, self._FLAGS)).encode()).hexdigest()[:16]
        self.folder = made_once(f"cpp-{known}", self._precompile)
        self.folders = outside_usr(self.folder, self.command.parent.parent)

    def _precompile(self, folder: Path) -> None:
        header = folder / "standard.h"
        header.write_text("#include <assert.h>\n#include <bits/stdc++.h>\n")
        checked([str(self.command), *self._FLAGS, "-x", "c++-header", str(header), "-o", f"{header}.gch"])

    def job(self, program: Program, token: str) -> Job:
        """Return the job of a program: compiled, then run; the source is gone by then."""
        half, body, end = len(token) // 2, *program.checks.rpartition("}")[::2]
        first = _INCLUDES.match(body)[0]  # type: ignore[index]  # which may have an assert of their own
        body = body[len(first) :]
        checks = f"""
{first}
#undef main
#undef assert
#define assert(...) ((__VA_ARGS__) ? (void)0 : (void)(std::fprintf(stderr, "%s\\n", #__VA_ARGS__), std::_Exit({WRONG})))
{body}
std::printf("\\n%s%s\\n", "{token[:half]}", "{token[half:]}"); std::fflush(stdout); std::_Exit(0);
}}{end}"""
        command = [
            str(self.command),
            *self._FLAGS,
            "-include",
            str(self.folder / "standard.h"),
            "-o",
            "main",
            "main.cpp",
        ]
        script = f"{shlex.join(command)} || exit {DOES_NOT_COMPILE}; rm -f main.cpp; exec ./main"
        contents = {"main.cpp": encoded(f"{program.code}\n{checks}")}
        return Job(("/bin/sh", "-c", script), contents, b"", self.folders)


class Java:
    """javac and java in one process, from an archive of loaded classes; checks run with assertions on."""

    language: Language = "java"

    def __init__(self) -> None:
        self.command = installed("java", "Debian, Ubuntu: apt-get install openjdk-17-jdk-headless")
        self.compiler = installed("javac", "Debian, Ubuntu: apt-get install openjdk-17-jdk-headless")
        self.version = said(self.command, "--version")
        drivers = sorted((path.name, path.read_text()) for path in _java_sources(_DRIVERS))
        known = hashlib.sha256(repr((self.version, _JVM, _FIRST, drivers)).encode()).hexdigest()[:16]
        self.folder = made_once(f"java-{known}", self._prepare)
        self.folders = outside_usr(self.folder, self.command.parent.parent)

    def _prepare(self, folder: Path) -> None:
        classes = folder / "classes"
        with as_file(_DRIVERS) as drivers:
            sources = map(str, sorted(drivers.rglob("*.java")))
            checked([str(self.compiler), "-nowarn", "-d", str(classes), *sources])
        jar = self.compiler.parent / "jar"
        checked([str(jar), "--create", "--file", str(folder / "driver.jar"), "-C", str(classes), "."])
        shutil.rmtree(classes)
        (folder / "Problem.java").write_text(_FIRST)
        archive = [f"-XX:ArchiveClassesAtExit={folder / 'classes.jsa'}"]
        checked([str(self.command), *archive, *_JVM, *self._driver(folder, folder / "Problem.java", "Problem")])

    @staticmethod
    def _driver(folder: Path, source: Path, main_class: str) -> list[str]:
        return ["-cp", str(folder / "driver.jar"), "Driver", str(source), main_class, str(folder / "driver.jar")]

    def job(self, program: Program, token: str) -> Job:
        """Return the job of a program."""
        command = [str(self.command), f"-XX:SharedArchiveFile={self.folder / 'classes.jsa'}", *_JVM]
        command += ["-Xmx512m", "-XX:CompressedClassSpaceSize=64m", "-XX:ReservedCodeCacheSize=64m"]
        command += self._driver(self.folder, Path(f"{program.main_class}.java"), program.main_class)
        contents = {f"{program.main_class}.java": encoded(f"{program.code}\n{program.checks}")}
        return Job(tuple(command), contents, token.encode(), self.folders)


def _java_sources(folder: Traversable) -> Iterator[Traversable]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _java_sources(path)
        elif path.name.endswith(".java"):
            yield path
