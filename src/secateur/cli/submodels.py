"""Verbs for what is there already: sub-models, and names to choose from."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from secateur import console
from secateur.cli.options import Data, Json, Threads


def inspect(
    submodel: Annotated[Path, typer.Argument(help="A sub-model folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its SHA-256.")] = False,
    as_json: Json = False,
) -> None:
    """Tell what a sub-model is, how it was made, its size by part and its sparsity by layer."""
    from secateur.checkpoint.inspect import inspect as inspect_submodel

    inspection = inspect_submodel(submodel, verify=verify)
    console.result(inspection.to_dict(), inspection.describe(), as_json=as_json)


def generate(
    model: Annotated[str, typer.Argument(help="A sub-model folder, or any base model.")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to go on from.")],
    suffix: Annotated[str | None, typer.Option(help="Text to follow the answer: fill in the middle.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw among tokens at least so likely, as a share of the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens that occurred are less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="For a temperature above 0.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text before which the answer ends; may be repeated.")] = None,
    engine: Annotated[str, typer.Option(help="native, torch, or auto: native where it can be.")] = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Generate text, streamed to stdout."""
    console.quiet_libraries()
    from secateur.runtime.loading import load
    from secateur.runtime.options import GenerationOptions

    chosen = GenerationOptions(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ())
    )
    loaded = load(model, threads=threads, engine=engine)
    pieces = loaded.stream(prompt, suffix=suffix, **asdict(chosen))
    if as_json:
        between = {} if suffix is None else {"suffix": suffix}
        console.print_json({"prompt": prompt, **between, "text": "".join(pieces)})
        return
    for piece in pieces:
        console.write(piece)
    console.write("\n")


def export(
    submodel: Annotated[Path, typer.Argument(help="A sub-model folder.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder, or file *.gguf, to write; it must not exist.")
    ],
    format: Annotated[  # noqa: A002 - the field's word
        str, typer.Option(help="dense: an ordinary Hugging Face folder; gguf: a file for llama.cpp and Ollama.")
    ] = "dense",
    type: Annotated[  # noqa: A002 - the field's word
        str | None, typer.Option(help="With gguf: f32, f16, bf16 or q8_0.", show_default="the values of the sub-model")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a sub-model in a format that other programs read."""
    from secateur.checkpoint.export import export as export_submodel

    written = export_submodel(submodel, output=output, format=format, type=type)
    console.result({"path": str(written)}, f"written to {written}", as_json=as_json)


def list_names(
    kind: Annotated[str, typer.Argument(help="domains, corpora, methods, budgets or tasks.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List what there is to choose from."""
    from secateur.catalogue import catalogue

    rows = catalogue(kind, data)
    console.result(rows, console.table(rows), as_json=as_json)
