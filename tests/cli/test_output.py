"""What becomes of output that nobody reads, or that the terminal cannot show."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from secateur import console

PROGRAM = Path(sys.executable).with_name("secateur")


def shown_in_latin(show, *arguments):
    """Return what a terminal that knows no more than Latin-1 would show."""
    raw = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(raw, encoding="latin-1")):
        console.prepare_streams()
        show(*arguments)
        return raw.getvalue().decode("latin-1")


def test_what_a_terminal_cannot_show_is_escaped():
    assert shown_in_latin(console.write, "é日本\n") == "é\\u65e5\\u672c\n"


def test_json_is_valid_in_any_encoding():
    content = {"text": "é日本\U0001f469"}
    assert json.loads(shown_in_latin(console.print_json, content)) == content


def test_a_closed_stream_swallows_what_is_written(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    console.prepare_streams()
    console.write("x")
    with sys.stdout:
        assert sys.stdout.name == os.devnull


@pytest.mark.parametrize("arguments", [("list", "domains"), ("list", "domains", "--json")])
def test_a_reader_that_leaves_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([PROGRAM, *arguments], stdout=write, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_it_runs_as_a_module():
    ended = subprocess.run([sys.executable, "-m", "secateur", "--version"], capture_output=True, check=True, timeout=60)
    assert ended.stdout.startswith(b"secateur ")


@pytest.mark.parametrize("verb", ["derive", "inspect"])
def test_only_a_derivation_is_told_how_it_goes_on(monkeypatch, capsys, verb):
    from secateur import cli

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "x"])
    assert ended.value.code == 128 + signal.SIGINT
    assert ("--resume" in capsys.readouterr().err) == (verb == "derive")


@pytest.mark.parametrize(
    ("said", "is_memory"),
    [
        ("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_only_memory_that_is_short_is_called_so(monkeypatch, capsys, said, is_memory):
    from secateur import cli

    def failing(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(cli, "app", failing)
    for verb in ("derive", "generate"):
        with pytest.raises(SystemExit if is_memory else RuntimeError):
            cli.main([verb, "x"])
        told = capsys.readouterr().err
        assert told.startswith("secateur: out of memory") == is_memory
        assert ("--samples" in told) == (is_memory and verb == "derive")
