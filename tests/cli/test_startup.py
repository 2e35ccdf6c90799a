"""What is imported before anything is asked for: neither torch nor transformers, so that --help answers at once."""

import json
import subprocess
import sys

import pytest

VERBS = ["derive", "inspect", "generate", "evaluate", "benchmark", "export", "list", "score"]

SCRIPT = """
import contextlib, io, json, sys
HEAVY = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "rich")
found = {}
def note(name):
    found[name] = [module for module in HEAVY if module in sys.modules]
import secateur
note("import secateur")
from secateur.cli import main
for arguments in json.loads(sys.argv[1]):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main(arguments)
    assert shown.getvalue(), arguments
    note(" ".join(arguments))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """The heavy modules that are there after each step, in one fresh process."""
    commands = [["--version"], ["--help"], *([verb, "--help"] for verb in VERBS), ["list", "domains"]]
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)], capture_output=True, text=True, check=True, timeout=120
    )
    assert ended.stderr == ""
    found: dict[str, list[str]] = json.loads(ended.stdout)
    return found


def test_the_library_imports_nothing_heavy(imported):
    assert imported["import secateur"] == []


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_imports_no_torch(imported, verb):
    assert imported[f"{verb} --help".strip()] == []


def test_version_imports_no_torch(imported):
    assert imported["--version"] == []


def test_the_list_of_domains_needs_neither_torch_nor_transformers(imported):
    assert not {"torch", "transformers"} & set(imported["list domains"])


def test_all_verbs_are_looked_at():
    from secateur.cli import app

    assert sorted(VERBS) == sorted(command.name or command.callback.__name__ for command in app.registered_commands)
