"""Programs that try to do harm, or to pass without being right.

`attempt` says whether the harm was done, and the check is that it says so: a program that passes has broken out. Those
that forge have a check that an honest answer would meet. Each is bounded, and harmless were there no sandbox: it ends
by itself within a minute, takes at most 2 GiB, 300 processes or 256 MiB of disk, sends signals only to a process that
the test has started, and writes only into a folder that the test has made and removes.
"""

from dataclasses import dataclass

from secateur.evaluation.programs.program import Language


@dataclass(frozen=True)
class Hostile:
    """One program; `{secret}`, `{folder}`, `{port}`, `{socket}` and `{pid}` in it are the targets of the host."""

    name: str
    language: Language
    code: str
    outcomes: tuple[str, ...]
    checks: str = ""

    def aimed(self, targets: dict[str, str]) -> str:
        """Return the program with its targets."""
        code = self.code
        for name, value in targets.items():
            code = code.replace("{" + name + "}", value)
        return code


WRONG = ("wrong",)
FAILED = ("wrong", "error")
