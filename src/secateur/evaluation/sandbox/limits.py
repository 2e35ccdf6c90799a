"""What a program in the sandbox may use up."""

from dataclasses import dataclass

MiB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one run may use.

    Attributes
    ----------
    seconds
        Of processor time, for each of its processes. Four times as many pass on the clock before it is ended, because
        others may want the processors too.
    memory
        Bytes that each process may allocate, and that all of them may have in memory together.
    processes
        Processes and threads at a time.
    files
        Bytes of all files that it writes, and of each.
    output
        Bytes that it may write on its standard outputs. `kept` of the end of each are kept.
    """

    seconds: float = 5.0
    memory: int = 1024 * MiB
    processes: int = 64
    files: int = 64 * MiB
    output: int = 16 * MiB
    kept: int = 1 << 16

    @property
    def wall_seconds(self) -> float:
        """Seconds on the clock."""
        return 4 * self.seconds

    def prlimit(self, *, processes: bool = True) -> list[str]:
        """Return the command that puts limits on what it is given to run.

        Memory is that which a process allocates and can write to: virtual machines reserve far more than they use.
        Without `processes` their number has no limit: outside a sandbox those of the user's other programs would count.
        """
        return [
            "prlimit",
            *([f"--nproc={self.processes}"] if processes else []),
            f"--cpu={max(1, round(self.seconds))}:{max(1, round(self.seconds)) + 1}",
            f"--data={self.memory}",
            f"--fsize={self.files}",
            "--nofile=256",
            "--core=0",
            "--stack=16777216",
            "--memlock=0",
            "--msgqueue=0",
            "--rtprio=0",
            "--",
        ]
