"""What can go wrong in a way that a user can mend.

Every message says, in one line, what happened, the value that was received, and what to do next. The command line
prints that line and exits with 1. Anything that is not a `SecateurError` is a bug of ours and keeps its traceback.
"""


class SecateurError(Exception):
    """Base of every error that a user's input or machine can cause."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class UnknownNameError(SecateurError):
    """A name that no registry knows."""


class ConfigError(SecateurError):
    """A recipe or option with a value that cannot be used."""


class ModelError(SecateurError):
    """A model that cannot be found, read or understood."""


class CorpusError(SecateurError):
    """Text for a domain that cannot be found or is too little."""


class CheckpointError(SecateurError):
    """A sub-model folder that is missing, damaged or does not describe itself truthfully."""


class OutputError(SecateurError):
    """An output path that exists, or cannot be written."""


class ResourceError(SecateurError):
    """Work that does not fit into the memory or the disk at hand."""


class NativeCodeError(SecateurError):
    """The native code is not installed, does not fit this version, or lacks the instruction set that was asked for."""


class SandboxError(SecateurError):
    """A sandbox that this machine cannot give, or that failed; nothing is run outside one instead."""


class RequirementError(SecateurError):
    """A measurement that misses a rule that it was to meet."""
