"""The command line: one function for each verb, no logic.

torch and transformers are imported inside the verbs, so that `--help` answers at once. Results go to stdout, progress
and remarks to stderr. Exit codes: 0 good, 1 a SecateurError in one line, 2 wrong usage, 130 interrupted.
"""

import sys
from typing import Annotated, Any

import typer

from secateur import console
from secateur.cli import deriving, measuring, submodels
from secateur.errors import SecateurError

app = typer.Typer(
    name="secateur",
    help="Cut a small, coding-specific sub-model out of a large language model, and prove what it kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_GO_ON = {
    "derive": "; run again with --resume, it goes on with what is finished",
    "score": "; the same command goes on with what is finished",
    "evaluate": "; answers that are finished are kept beside OUT, and the same command goes on with them",
}

# What torch says, with a RuntimeError, where memory is short; other errors of a device name memory as well.
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")

for verb in (
    deriving.derive,
    submodels.inspect,
    submodels.generate,
    measuring.evaluate,
    measuring.score,
    measuring.benchmark,
    submodels.export,
):
    app.command()(verb)
app.command("list")(submodels.list_names)


@app.callback(invoke_without_command=True)
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import secateur

        typer.echo(f"secateur {secateur.__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and exit."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    console.prepare_streams()
    console.show_log("secateur.models.gguf")
    try:
        app(["--debug", *(one for one in given if one != "--debug")] if debug else given)
    except SecateurError as error:
        if debug:
            raise
        sys.stderr.write(f"secateur: {error}\n")
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if debug or not (isinstance(error, MemoryError) or any(one in str(error).lower() for one in _NO_MEMORY)):
            raise
        less = ", use fewer --samples" if _verb(given) == "derive" else ""
        sys.stderr.write(
            f"secateur: out of memory ({' '.join(str(error).split())[:200]}); close other programs{less}, or take a "
            "smaller model or a larger machine\n"
        )
        sys.exit(1)
    except OSError as error:  # what a system refuses can happen anywhere: a name too long, a folder that is locked
        if debug:
            raise
        what = f"{error.filename!r}: {error.strerror}" if error.filename else " ".join(str(error).split())
        sys.stderr.write(f"secateur: {what}; mend that, or run again with --debug to see where it happened\n")
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:  # Typer turns the former into an exit with this code, in silence
        if isinstance(end, SystemExit) and end.code != 130:
            raise
        sys.stderr.write(f"secateur: interrupted{_GO_ON.get(_verb(given), '')}\n")
        sys.exit(130)


def _verb(given: list[str]) -> str:
    return next((one for one in given if not one.startswith("-")), "")
