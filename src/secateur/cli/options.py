"""Options that several verbs have."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Data = Annotated[Path | None, typer.Option(help="Folder with text that is tried first (also SECATEUR_DATA).")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: the cores that it may use.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")]
