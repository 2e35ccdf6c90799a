"""How work is given up while it runs: a function that is asked again and again whether to go on."""

from collections.abc import Callable

# Asked often, and perhaps on another thread than the one that decides: the `is_set` of a `threading.Event` will do.
IsCancelled = Callable[[], bool]


class Cancelled(Exception):  # noqa: N818 - nothing went wrong
    """The caller no longer wants the result. It does not leave the runtime: a cancelled text ends where it is."""
