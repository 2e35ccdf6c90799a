"""A problem of a benchmark: what a model is given, and how its answer becomes a program with checks."""

from dataclasses import dataclass

from secateur.evaluation.programs.program import Language, Program

FENCE = "\n```"
_FENCES: dict[Language, str] = {"python": "python", "java": "java", "cpp": "cpp", "javascript": "javascript"}
_NAMES: dict[Language, str] = {"python": "Python", "java": "Java", "cpp": "C++", "javascript": "JavaScript"}


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes
    ----------
    task_id
        As the benchmark calls it.
    prompt
        The text that a model goes on from: the beginning of the program, or what stands before it as a comment.
    stop
        Strings at which an answer ends; none is part of it.
    checks
        What follows the answer in the program (`Program.checks`).
    solution
        The benchmark's own answer, where it has one.
    answer_is_whole
        Whether the answer is the program, without the prompt.
    main_class, called
        As in `Program`.
    task
        What a chat model is asked where the prompt is no beginning of a program that it could complete: its reply then
        begins with nothing but a code block.
    """

    task_id: str
    language: Language
    prompt: str
    stop: tuple[str, ...]
    checks: str
    solution: str | None = None
    answer_is_whole: bool = False
    main_class: str = "Problem"
    called: tuple[str, ...] = ()
    task: str = ""

    def program(self, completion: str) -> Program:
        """Return the program that an answer makes."""
        code = completion if self.answer_is_whole else self.prompt + completion
        return Program(self.language, code, self.checks, self.main_class, self.called)

    def question(self) -> str:
        """Return what a chat model is asked; its reply is begun with `reply`."""
        if self.task:
            return self.task
        name = _NAMES[self.language]
        return (
            f"Complete the following {name} code. Reply with the whole code in one code block.\n\n"
            f"```{_FENCES[self.language]}\n{self.prompt.rstrip()}\n```"
        )

    def reply(self) -> str:
        """Return the beginning of a chat model's reply, which it goes on from as others do from the prompt."""
        return f"```{_FENCES[self.language]}\n{'' if self.task else self.prompt}"

    def cut(self, completion: str) -> str:
        """Return an answer up to the first string at which it ends."""
        if completion.startswith(FENCE.lstrip()):  # the code block ends where the answer begins
            return ""
        places = [completion.find(stop) for stop in (*self.stop, FENCE)]
        return completion[: min((place for place in places if place >= 0), default=len(completion))]
