"""The command line: one function for each verb, no logic.

torch and transformers are imported inside the verbs, so that `--help` answers at once. Results go to stdout, progress
and remarks to stderr. Exit codes: 0 good, 1 a SecateurError in one line, 2 wrong usage, 130 interrupted.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur import console
from secateur.errors import SecateurError

app = typer.Typer(
    name="secateur",
    help="Cut a small, coding-specific sub-model out of a large language model, and prove what it kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Data = Annotated[Path | None, typer.Option(help="Folder with text that is tried first (also SECATEUR_DATA).")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: the cores that it may use.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")]


@app.callback(invoke_without_command=True)
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import secateur

        typer.echo(f"secateur {secateur.__version__}")
        raise typer.Exit


@app.command()
def derive(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; it must not exist.")],
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face folder, GGUF file, hub id, or `demo`.", show_default="demo")
    ] = None,
    domains: Annotated[
        list[str] | None, typer.Option("--for", help="DOMAIN[=WEIGHT], a name or a path; may be repeated.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction to remove.", show_default="0.5")] = None,
    target_size: Annotated[
        str | None, typer.Option(help="Size of the result, such as 300MB, in place of a sparsity.")
    ] = None,
    keep_quality: Annotated[
        float | None,
        typer.Option(help="Share of the parent's log-likelihood to keep, such as 0.95, in place of a sparsity."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="fast, balanced or best: how much time to spend on quality.", show_default="balanced"),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="See `secateur list methods`.", show_default="the preset's")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="See `secateur list budgets`.", show_default="the preset's, else uniform")
    ] = None,
    granularity: Annotated[str | None, typer.Option(help="per_output or per_layer.", show_default="per_output")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.", show_default="128")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a sequence.", show_default="512")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides which text is drawn.", show_default="0")] = None,
    propagate: Annotated[
        bool | None,
        typer.Option("--propagate/--no-propagate", help="Calibrate on pruned outputs.", show_default="propagate"),
    ] = None,
    values: Annotated[
        str | None, typer.Option(help="Precision of kept weights: base, int8 or int4.", show_default="base")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Input positions that share a scale: 32, 64 or 128.", show_default="int8: 128, int4: 64"),
    ] = None,
    embedding_values: Annotated[
        str | None, typer.Option(help="Embedding and head beside int8 or int4: int8 or int4.", show_default="int8")
    ] = None,
    trim_vocabulary: Annotated[
        bool | None,
        typer.Option(
            "--trim-vocabulary/--no-trim-vocabulary",
            help="Let the head compute only tokens of the domain.",
            show_default="no-trim-vocabulary",
        ),
    ] = None,
    correction: Annotated[
        float | None,
        typer.Option(help="admm: share of earlier errors that weights make up for.", show_default="0.5"),
    ] = None,
    first_token_weight: Annotated[
        float | None,
        typer.Option(help="admm, sparsegpt: as how many tokens a sequence's first counts.", show_default="100"),
    ] = None,
    recover: Annotated[
        int | None, typer.Option(help="Tokens to learn from after pruning, beside the parent.", show_default="0")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with these options; flags win over it.")] = None,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted derivation.")] = False,
    as_json: Json = False,
) -> None:
    """Derive a sub-model for a domain."""
    from secateur.config import make_recipe

    options = {
        "model": model,
        "for": domains or None,
        "sparsity": sparsity,
        "target_size": target_size,
        "keep_quality": keep_quality,
        "preset": preset,
        "method": method,
        "budget": budget,
        "granularity": granularity,
        "samples": samples,
        "sequence_length": sequence_length,
        "seed": seed,
        "propagate": propagate,
        "values": values,
        "group_size": group_size,
        "embedding_values": embedding_values,
        "trim_vocabulary": trim_vocabulary,
        "correction": correction,
        "first_token_weight": first_token_weight,
        "recover": recover,
    }
    settings = make_recipe(options, recipe)
    console.quiet_libraries()
    from secateur.pruning.derive import derive_recipe

    with console.Progress() as progress:
        submodel = derive_recipe(
            settings,
            output=output,
            data=data,
            device=device,
            threads=threads,
            resume=resume,
            progress=progress.update,
            announce=console.remark,
        )
    console.result(submodel.to_dict(), submodel.describe(), as_json=as_json)


@app.command()
def inspect(
    submodel: Annotated[Path, typer.Argument(help="A sub-model folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its SHA-256.")] = False,
    as_json: Json = False,
) -> None:
    """Tell what a sub-model is, how it was made, its size by part and its sparsity by layer."""
    from secateur.checkpoint.inspect import inspect as inspect_submodel

    inspection = inspect_submodel(submodel, verify=verify)
    console.result(inspection.to_dict(), inspection.describe(), as_json=as_json)


@app.command()
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


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Sub-models or base models.")],
    task: Annotated[list[str], typer.Option(help="Such as perplexity:python; may be repeated.")],
    against: Annotated[str | None, typer.Option(help="The model to compare with, usually the parent.")] = None,
    limit: Annotated[int | None, typer.Option(help="Tokens of each domain.", show_default="8000")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for results.json; it must not exist.")
    ] = None,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure models on held-out text, and compare them with their parent."""
    console.quiet_libraries()
    from secateur.evaluation.harness import evaluate as evaluate_models

    with console.Progress() as progress:
        evaluation = evaluate_models(
            models,
            task,
            against=against,
            limit=limit,
            data=data,
            output=output,
            device=device,
            threads=threads,
            progress=progress.update,
        )
    console.result(json.loads(evaluation.to_json()), evaluation.to_table(), as_json=as_json)


@app.command()
def benchmark(
    submodel: Annotated[str, typer.Argument(help="A sub-model folder, or any base model.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="native[:FOLDER], torch, torch-int8, llama.cpp[:Q8_0 or :FILE.gguf]; repeatable."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often every question is put to every model.")] = 3,
    prompt_length: Annotated[list[int] | None, typer.Option(help="Prompts to read.", show_default="128, 512")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences to decode together, beside one alone.")] = 8,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory, beside peers in the same run."""
    console.quiet_libraries()
    from secateur.evaluation.speed import benchmark as measure
    from secateur.evaluation.speed_tables import render

    with console.Progress() as progress:
        report = measure(
            submodel,
            against or (),
            threads=threads,
            rounds=rounds,
            prompt_lengths=prompt_length or (128, 512),
            new_tokens=new_tokens,
            batch=batch,
            progress=progress.update,
        )
    console.result(report.to_dict(), render(report), as_json=as_json)


@app.command()
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


@app.command("list")
def list_names(
    kind: Annotated[str, typer.Argument(help="domains, corpora, methods, budgets or tasks.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List what there is to choose from."""
    from secateur.catalogue import catalogue

    rows = catalogue(kind, data)
    console.result(rows, console.table(rows), as_json=as_json)


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
        if debug or not (isinstance(error, MemoryError) or "memory" in str(error).lower()):
            raise
        sys.stderr.write(
            f"secateur: out of memory ({' '.join(str(error).split())[:200]}); close other programs, use fewer "
            "--samples, or a larger machine\n"
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
        verb = next((one for one in given if not one.startswith("-")), "")
        more = "; run again with --resume, it goes on with what is finished" if verb == "derive" else ""
        sys.stderr.write(f"secateur: interrupted{more}\n")
        sys.exit(130)
