"""Whether programs are right: runs them in sandboxes, several at a time, and says what came of each."""

import re
import signal
from dataclasses import replace

from secateur.errors import SandboxError
from secateur.evaluation.programs.languages import DOES_NOT_COMPILE, NO_MEMORY, WRONG, Toolchain, limits_of, new_token
from secateur.evaluation.programs.program import Language, Outcome, Program, Verdict
from secateur.evaluation.sandbox.processes import Finished
from secateur.evaluation.sandbox.running import Runner

_DETAIL = 200  # characters
_ADDRESS = re.compile(r"0x[0-9a-f]+|(?<=@)[0-9a-f]{4,}")  # of objects: another one in each run
_TELLING = re.compile(r"^(Exception in .*)?[\w.]*(Error|Exception)\b|\berror:|^terminate called")
_BY_ENDING: dict[str, Outcome] = {
    "killed": "crash",
    "time": "timeout",
    "memory": "memory",
    "output": "output",
    "failed": "sandbox_failure",
}
_BY_CODE: dict[int, Outcome] = {
    WRONG: "wrong", DOES_NOT_COMPILE: "compile_error", NO_MEMORY: "memory",
}  # fmt: skip
# What compilers and interpreters say that pass a limit and end in a way of their own. A program that says so itself
# only says that it has failed.
_SAID: dict[Outcome, re.Pattern[str]] = {
    "timeout": re.compile(r"^\S*g\+\+\S*: [a-z ]+: CPU time limit exceeded", re.MULTILINE),
    "memory": re.compile(
        r"^(cc1plus: out of memory|virtual memory exhausted|\S*g\+\+\S*: [a-z ]+: Killed signal terminated"
        r"|terminate called after throwing an instance of 'std::bad_alloc'"
        r"|FATAL ERROR: .*(heap out of memory|Out of memory)|The system is out of resources\.)",
        re.MULTILINE,
    ),
}


def check(program: Program, toolchain: Toolchain, runner: Runner, *, scale: float = 1.0) -> Verdict:
    """Run one program with its checks; `scale` is how much slower than usual this machine is."""
    token = new_token()
    job = replace(toolchain.job(program, token), limits=limits_of(program.language, scale))
    finished = runner.run(job)
    outcome = _outcome(finished, token)
    # What was written until a limit was passed depends on the clock.
    detail = "" if outcome in ("timeout", "memory", "output") else _detail(finished)
    return Verdict(outcome, detail, round(finished.seconds, 3))


def _outcome(finished: Finished, token: str) -> Outcome:
    if finished.ended == "exited" and finished.code == 0:
        return "passed" if token in finished.output.splitlines() else "no_verdict"
    if finished.code in (DOES_NOT_COMPILE, signal.SIGABRT):
        for outcome, said in _SAID.items():
            if said.search(finished.errors):
                return outcome
    return _BY_CODE.get(finished.code, "error") if finished.ended == "exited" else _BY_ENDING[finished.ended]


def _detail(finished: Finished) -> str:
    lines = [line.strip() for line in finished.errors.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)] or lines
    return _ADDRESS.sub("0x", telling[-1])[:_DETAIL] if telling else ""


# A function that gives the first entry of a list, wrong and right, and its check.
_TRIALS: dict[Language, tuple[str, str]] = {
    "python": ("def first(x):\n    return x[{place}]\n", "assert first([1, 2]) == 1\n"),
    "javascript": (
        "function first(x) { return [x[{place}]]; }",
        "const assert = require('node:assert');\nassert.deepEqual(first([1, 2]), [1]);\n",
    ),
    "cpp": (
        "#include<vector>\nlong first(std::vector<long> x) { return x[{place}];",
        "}\nint main() {\n    assert(first({1, 2}) == (1));\n}\n",
    ),
    "java": (
        "import org.javatuples.*;\nclass Problem {\n"
        "    static long first(long[] x) { return Pair.with(x[{place}], 0).getValue0();",
        "}\n    public static void main(String[] x) {\n        assert(first(new long[]{1, 2}) == 1);\n    }\n}\n",
    ),
}


def check_toolchain(toolchain: Toolchain, runner: Runner) -> None:
    """Run a right and a wrong program of a language.

    Raises
    ------
    SandboxError
        When they are not told apart: then no figure would mean anything.
    """
    code, checks = _TRIALS[toolchain.language]
    for place, expected in (("0", "passed"), ("1", "wrong")):
        verdict = check(Program(toolchain.language, code.replace("{place}", place), checks), toolchain, runner, scale=4)
        if verdict.outcome != expected:
            raise SandboxError(
                f"{toolchain.version} does not run in the sandbox: a program that is {expected} ended as "
                f"{verdict.outcome} ({verdict.detail or 'it wrote nothing'})"
            )
