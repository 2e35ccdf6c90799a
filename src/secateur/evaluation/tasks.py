"""What can be measured, by name: `perplexity:DOMAIN`, benchmarks whose answers are programs, and those of lm-eval."""

from dataclasses import dataclass

from secateur.errors import UnknownNameError
from secateur.evaluation.questions.catalogue import QUESTIONS
from secateur.evaluation.translating import PAIRS
from secateur.registry import Registry, unknown_name

PERPLEXITY, INFILL, TRANSLATION = "perplexity", "infill", "translation"

KINDS: Registry[str] = Registry("task")
KINDS.add(PERPLEXITY, "perplexity of held-out text of a domain, with its standard error over documents")
KINDS.add(INFILL, "lines and stretches taken out of held-out files of a domain; share that is put back exactly")
KINDS.add("humaneval", "164 functions in Python from their docstrings; share of answers that pass the checks")
KINDS.add("mbpp", "500 short programs in Python from a sentence and three examples")
KINDS.add("multipl-e", "HumanEval in another language: multipl-e:java, :cpp, :javascript, :python")
KINDS.add("multipl-e-mbpp", "MBPP in another language: multipl-e-mbpp:java, :cpp, :javascript")
for _question in QUESTIONS.values():
    KINDS.add(_question.name, _question.description)
KINDS.add(TRANSLATION, "sentences of WMT, translated after four that are: translation:de-en, :en-de, :de-fr, :fr-de")
_OF_DOMAINS = (PERPLEXITY, INFILL)
_LANGUAGES = {
    "multipl-e": ("java", "cpp", "javascript", "python"),
    "multipl-e-mbpp": ("java", "cpp", "javascript"),
    TRANSLATION: PAIRS,
}


@dataclass(frozen=True)
class Task:
    """One thing to measure.

    Attributes
    ----------
    name
        As the user called it, e.g. `perplexity:python`.
    kind
        One of `KINDS`.
    domain
        Name of a domain, or a path to text; of a benchmark its language, or empty.
    """

    name: str
    kind: str
    domain: str

    @property
    def runs_programs(self) -> bool:
        """Whether answers are programs, which are run."""
        return self.kind not in (*_OF_DOMAINS, TRANSLATION, *QUESTIONS)

    @property
    def has_answers(self) -> bool:
        """Whether a model answers, and its answers are kept."""
        return self.kind != PERPLEXITY


def parse_task(name: str, domains: list[str]) -> Task:
    """Return the task called `name`.

    Parameters
    ----------
    name
        `perplexity:DOMAIN`, `humaneval`, `multipl-e:java`, ... Whether a domain has text is not looked at here: it may
        be a path.
    domains
        Known domains, for the message.

    Raises
    ------
    UnknownNameError
        When there is no such kind of task, or no domain or language is named.
    """
    kind, _, domain = name.partition(":")
    if kind not in KINDS or (domain and kind not in _OF_DOMAINS and domain not in _LANGUAGES.get(kind, ())):
        raise UnknownNameError(unknown_name("task", name, task_names(domains)))
    if kind in _OF_DOMAINS and not domain:
        raise UnknownNameError(f"task {name!r} names no domain; write for example '{kind}:python'")
    if kind in _LANGUAGES and not domain:
        raise UnknownNameError(f"task {name!r} names no language; write for example '{kind}:{_LANGUAGES[kind][0]}'")
    return Task(name, kind, domain)


def task_names(domains: list[str]) -> list[str]:
    """Return the names of all tasks, of those that are about text for the given domains."""
    inner = {**dict.fromkeys(_OF_DOMAINS, domains), **_LANGUAGES}
    return [name for kind in KINDS for name in ([f"{kind}:{one}" for one in inner[kind]] if kind in inner else [kind])]


def describe_tasks(domains: dict[str, str]) -> list[dict[str, str]]:
    """Return name and description of every task; `domains` are those of perplexity with what they are."""
    rows = [
        {"name": f"{PERPLEXITY}:{name}", "what": f"perplexity of held-out text: {domains[name]}"} for name in domains
    ]
    others = [f"{INFILL}:DOMAIN", *task_names([])]
    return rows + [{"name": name, "what": KINDS.get(name.partition(":")[0])} for name in others]
