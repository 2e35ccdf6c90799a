"""Runs a program and then its checks, and says the token that was given on standard input if all of them held.

Checks see the names of the program but for those that would hide built-in ones, which are restored before. Functions
that they call are named as arguments.
"""

import builtins
import os
import sys
import types
from contextlib import suppress
from pathlib import Path


def main() -> None:
    """Run program.py and checks.py of the folder that this file is in."""
    token = sys.stdin.read()
    original, called = dict(vars(builtins)), sys.argv[1:]
    program, checks, write, leave = compiled("program.py"), compiled("checks.py"), os.write, os._exit
    names = {"__name__": "__main__"}
    exec(program, names)  # noqa: S102 - what it is for, in a sandbox
    vars(builtins).update(original)
    exec(checks, {name: value for name, value in names.items() if name in called or name not in original})  # noqa: S102
    with suppress(Exception):  # a program may do with its outputs what it likes
        sys.stdout.flush()
    write(1, f"\n{token}\n".encode())
    leave(0)


def compiled(name: str) -> types.CodeType:
    """Return the code of a file of this folder."""
    try:
        return compile(Path(__file__).absolute().with_name(name).read_bytes(), name, "exec")
    except MemoryError:  # how the parser says that something is nested too deeply
        raise SyntaxError(f"{name} is nested too deeply") from None


def wrong(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Tell a check that did not hold, and memory that was not to be had, from a program that failed."""
    code = 97 if kind is AssertionError else 96 if issubclass(kind, SyntaxError) else 95 if kind is MemoryError else 1
    sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    os._exit(code)


sys.excepthook = wrong
main()
