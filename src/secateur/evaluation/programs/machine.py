"""How fast this machine runs programs, so that a slow one does not fail what another one passes."""

from concurrent.futures import ThreadPoolExecutor

from secateur.errors import SandboxError
from secateur.evaluation.programs.languages import Python
from secateur.evaluation.sandbox.box import Job
from secateur.evaluation.sandbox.running import Runner

# What the program below takes on one core of the machine that limits were set on (Emerald Rapids, 2.3 GHz).
_REFERENCE = 0.25
_PROGRAM = """
import time
begin = time.process_time()
total = 0
for number in range(3_000_000):
    total += number * number % 7
print(time.process_time() - begin)
"""


def slowness(runner: Runner, workers: int) -> float:
    """Return by how much limits of time are stretched here: 1 on a machine that is as fast as the reference, or faster.

    As many programs run at a time as will later; the fastest one counts, since limits are of processor time.
    """
    python = Python()
    job = Job((str(python.command), "-s", "-P", "-S", "-c", _PROGRAM), {}, b"", python.folders)
    with ThreadPoolExecutor(workers) as pool:
        runs = [finished.output for finished in pool.map(runner.run, [job] * (2 * workers))]
    seconds = [float(output) for output in runs if output.strip()]
    if not seconds:
        raise SandboxError(f"{python.version} does not run in the sandbox: it wrote nothing")
    return max(1.0, round(min(seconds) / _REFERENCE, 2))
