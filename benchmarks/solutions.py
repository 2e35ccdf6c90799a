"""Whether benchmarks are run rightly: their own solutions have to pass, and programs that do nothing must not.

    python benchmarks/solutions.py [--task humaneval mbpp multipl-e:python] [--data DIR]

Prints for each task how many solutions pass, which ones do not and why, and the seconds for each program. The files of
MultiPL-E in other languages than Python have no solutions.
"""

import argparse
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from secateur.errors import CorpusError
from secateur.evaluation.programs.benchmarks import BENCHMARKS
from secateur.evaluation.programs.checking import check
from secateur.evaluation.programs.languages import toolchain
from secateur.evaluation.programs.loading import load_benchmark
from secateur.evaluation.programs.machine import slowness
from secateur.evaluation.sandbox.running import Sandbox
from secateur.resources import usable_processors

NOTHING = {
    "python": "    pass\n",
    "java": "        return null;\n",
    "cpp": "    return {};\n",
    "javascript": "  return null;\n}\n",
}


def outcomes(problems, answers, tools, sandbox, scale):
    begin = time.monotonic()
    with ThreadPoolExecutor(usable_processors()) as pool:
        programs = [problem.program(answer) for problem, answer in zip(problems, answers, strict=True)]
        verdicts = list(pool.map(lambda program: check(program, tools, sandbox, scale=scale), programs))
    return verdicts, (time.monotonic() - begin) / len(problems)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(BENCHMARKS))
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    sandbox = Sandbox()
    scale = slowness(sandbox, usable_processors())
    for task in options.task:
        try:
            loaded = load_benchmark(task, options.data)
        except CorpusError as error:
            print(f"{task}: {error}")
            continue
        tools, problems = toolchain(loaded.benchmark.language), list(loaded.problems.values())
        nothing = [NOTHING[loaded.benchmark.language]] * len(problems)
        verdicts, seconds = outcomes(problems, nothing, tools, sandbox, scale)
        passed = [problem.task_id for problem, one in zip(problems, verdicts, strict=True) if one.passed]
        print(f"{task}, {tools.version}: {len(passed)} of {len(problems)} programs that do nothing pass {passed or ''}")
        print(f"    {dict(Counter(one.outcome for one in verdicts))}, {seconds:.2f} s each")
        solved = [problem for problem in problems if problem.solution is not None]
        if not solved:
            continue
        verdicts, seconds = outcomes(solved, [problem.solution for problem in solved], tools, sandbox, scale)
        print(f"    {sum(one.passed for one in verdicts)} of {len(solved)} solutions pass, {seconds:.2f} s each")
        for problem, one in zip(solved, verdicts, strict=True):
            if not one.passed:
                print(f"    {problem.task_id}: {one.outcome} {one.detail}")


if __name__ == "__main__":
    main()
