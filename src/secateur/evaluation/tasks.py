"""What can be measured, by name. A task is called `KIND:DOMAIN`; this version knows one kind, perplexity."""

from dataclasses import dataclass

from secateur.errors import UnknownNameError
from secateur.registry import Registry, unknown_name

KINDS: Registry[str] = Registry("task")
KINDS.add("perplexity", "perplexity of held-out text of a domain, with its standard error over documents")


@dataclass(frozen=True)
class Task:
    """One thing to measure.

    Attributes
    ----------
    name
        As the user called it, e.g. `perplexity:python`.
    domain
        Name of a domain, or a path to text.
    """

    name: str
    domain: str


def parse_task(name: str, domains: list[str]) -> Task:
    """Return the task called `name`.

    Parameters
    ----------
    name
        `perplexity:DOMAIN`. Whether a domain has text is not looked at here: it may be a path.
    domains
        Known domains, for the message.

    Raises
    ------
    UnknownNameError
        When there is no such kind of task, or no domain is named.
    """
    kind, separator, domain = name.partition(":")
    if kind in KINDS and not domain:
        raise UnknownNameError(f"task {name!r} names no domain; write for example '{kind}:python'")
    if kind not in KINDS or not separator:
        raise UnknownNameError(unknown_name("task", name, [f"{known}:{item}" for known in KINDS for item in domains]))
    return Task(name, domain)
