"""Verbs that measure."""

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur import console
from secateur.cli.options import Data, Device, Json, Threads

RunGenerated = Annotated[
    bool, typer.Option("--run-generated-code", help="Run programs that models have written, in a sandbox.")
]
Unsafe = Annotated[bool, typer.Option("--unsafe", help="Run them without a sandbox: they can do what you can.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Programs that run at a time.", show_default="one for each processor")
]


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Sub-models or base models.")],
    task: Annotated[list[str], typer.Option(help="Such as perplexity:python or humaneval; may be repeated.")],
    against: Annotated[str | None, typer.Option(help="The model to compare with, usually the parent.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Tokens of each domain, for perplexity.", show_default="8000")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for results and answers; it must not exist.")
    ] = None,
    run_generated_code: RunGenerated = False,
    unsafe: Unsafe = False,
    problems: Annotated[int | None, typer.Option(min=1, help="Problems of each benchmark.", show_default="all")] = None,
    answers: Annotated[int, typer.Option(min=1, help="Answers to each problem.")] = 1,
    temperature: Annotated[float, typer.Option(help="Of answers; 0 takes the most likely token each time.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    prompt_style: Annotated[
        str, typer.Option(help="plain, chat, or auto: chat where the model has a template.")
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, max=64, help="Answers that are generated together.")] = 32,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    workers: Workers = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help="Such as 'humaneval>=0.9', a share of the parent's; exit code 1 where it is missed."),
    ] = None,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="Put the figures into the model cards of sub-models.")
    ] = False,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure models on held-out text and benchmarks, and compare them with their parent."""
    console.quiet_libraries()
    from secateur.evaluation.cards import update_cards
    from secateur.evaluation.harness import evaluate as evaluate_models
    from secateur.evaluation.programs.generation import Asking
    from secateur.evaluation.requirements import check_requirements, parse_requirements

    requirements = parse_requirements(require or (), task, against, models)
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
            run_generated_code=run_generated_code,
            unsafe=unsafe,
            problems=problems,
            asking=Asking(prompt_style, answers, temperature, seed, max_new_tokens, batch),
            workers=workers,
            progress=progress.update,
        )
    console.result(json.loads(evaluation.to_json()), evaluation.to_table(), as_json=as_json)
    if update_card:
        update_cards(evaluation)
    check_requirements(requirements, evaluation)


def score(
    samples: Annotated[Path, typer.Argument(help="Lines {task_id, completion}, of any tool.")],
    task: Annotated[str, typer.Option(help="Such as humaneval or multipl-e:java.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; it must not exist.")],
    run_generated_code: RunGenerated = False,
    unsafe: Unsafe = False,
    cut: Annotated[
        bool, typer.Option("--cut", help="End each completion at the benchmark's stop strings, as a model would.")
    ] = False,
    workers: Workers = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Run programs that were generated before, and tell which are right."""
    from secateur.evaluation.programs.score import render
    from secateur.evaluation.programs.score import score as score_samples

    with console.Progress() as progress:
        found = score_samples(
            samples,
            task,
            output,
            run_generated_code=run_generated_code,
            unsafe=unsafe,
            data=data,
            workers=workers,
            cut=cut,
            progress=progress.update,
        )
    console.result(found, render(found), as_json=as_json)


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
