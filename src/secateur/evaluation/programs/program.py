"""A program with its checks, and what came of running it."""

from dataclasses import dataclass
from typing import Literal

Language = Literal["python", "java", "cpp", "javascript"]
Outcome = Literal[
    "passed", "wrong", "error", "crash", "compile_error", "no_verdict", "timeout", "memory", "output", "sandbox_failure"
]
OUTCOMES: dict[Outcome, str] = {
    "passed": "all checks held",
    "wrong": "a check did not hold",
    "error": "an error that the program raised, or an exit code",
    "crash": "ended by a signal",
    "compile_error": "does not compile",
    "no_verdict": "ended before its checks did",
    "timeout": "took too long",
    "memory": "took too much memory",
    "output": "wrote too much",
    "sandbox_failure": "was not run: its sandbox could not be set up",
}


@dataclass(frozen=True)
class Program:
    """What a model wrote, with what it was given, and the checks.

    Attributes
    ----------
    code
        The program, as far as the model is concerned: prompt and completion.
    checks
        What follows: in Python statements, in the others what makes the program whole, with a main function.
    main_class
        In Java the class whose main method has the checks.
    called
        In Python the functions of the program that checks call, even where they have the name of a built-in one.
    """

    language: Language
    code: str
    checks: str
    main_class: str = "Problem"
    called: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What came of one program.

    Attributes
    ----------
    outcome
        One of `OUTCOMES`.
    detail
        The last line that it wrote on standard error.
    seconds
        On the clock, with compiling.
    """

    outcome: Outcome
    detail: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all checks held."""
        return self.outcome == "passed"
