"""The verb that makes sub-models."""

from pathlib import Path
from typing import Annotated

import typer

from secateur import console
from secateur.cli.options import Data, Device, Json, Threads


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
        str | None, typer.Option(help="Precision of kept weights: base, int8, int4 or nl4.", show_default="base")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Input positions that share a scale: 32, 64 or 128.", show_default="int8: 128, else 64"),
    ] = None,
    embedding_values: Annotated[
        str | None, typer.Option(help="Embedding and head beside integers: int8, int4 or nl4.", show_default="int8")
    ] = None,
    eight_bits: Annotated[
        float | None,
        typer.Option(help="int4, nl4: share of the weights that has eight bits instead.", show_default="0"),
    ] = None,
    trim_vocabulary: Annotated[
        bool | None,
        typer.Option(
            "--trim-vocabulary/--no-trim-vocabulary",
            help="Let the head compute only tokens of the domain.",
            show_default="no-trim-vocabulary",
        ),
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            help="Keep so many tokens, those the domain needs most; auto: as many as --target-size has room for.",
            show_default="all",
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
    recover_for: Annotated[
        list[str] | None,
        typer.Option(
            "--recover-for",
            help="Domain of the text to learn from, as --for; repeat to mix.",
            show_default="those of --for",
        ),
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
        "eight_bits": eight_bits,
        "trim_vocabulary": trim_vocabulary,
        "vocabulary": int(vocabulary) if vocabulary and vocabulary.isdecimal() else vocabulary,
        "correction": correction,
        "first_token_weight": first_token_weight,
        "recover": recover,
        "recover_for": recover_for or None,
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
