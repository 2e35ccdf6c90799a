"""What `make demo` shows: a Python sub-model of the demo model beside its parent, in one table.

    python benchmarks/demo.py [-o demo/python]

Derives recipes/demo.yaml, unless the output folder holds the result already, and measures parent and sub-model on the
same held-out text. The table goes to stdout, progress to stderr.
"""

import argparse
import json
import sys
from pathlib import Path

import secateur
from secateur import console
from secateur.checkpoint.format import LOG
from secateur.config import make_recipe
from secateur.errors import SecateurError
from secateur.evaluation.tables import format_perplexity
from secateur.models.source import resolve_model

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "demo.yaml"
TEXTS = {"python": "Python", "java": "Java", "cpp": "C++", "javascript": "JavaScript", "general": "plain English"}
NOTES = """
Perplexity says how surprised a model is by held-out text (files that no calibration used): lower is better, a ratio of
1.2 is 20% worse than the parent. Half of the weights of the decoder's linear layers are removed; embeddings, head and
norms stay whole, so more than half of all parameters remain.
What this does not show: one small model (135M), one method, one seed, and at most 8,000 tokens of each text;
and perplexity is not the share of programs that work. The parent counts in bf16, in which it is computed; the 4-bit
file that it was published as is smaller than either column."""


def derive(recipe, output):
    """Derive the sub-model if it is not there; return whether it was."""
    from secateur.pruning.derive import derive_recipe  # only now: it imports transformers, which is to be quiet

    console.remark(f"deriving {RECIPE.relative_to(ROOT)} into {output}")
    with console.Progress() as progress:
        submodel = derive_recipe(recipe, output=output, resume=True, progress=progress.update, announce=console.remark)
    return not submodel.log


def measure(model, output):
    """Return the evaluation of parent and sub-model on each text that can be had."""
    console.remark(f"measuring {model} and {output} on {len(TEXTS)} texts")
    with console.Progress() as progress:
        return secateur.evaluate(
            [output], [f"perplexity:{text}" for text in TEXTS], against=model, skip_missing=True,
            progress=progress.update,
        )  # fmt: skip


def size_rows(model, inspection):
    """Return the rows on parameters and bytes."""
    manifest = inspection.manifest
    parameters = manifest["base_model"]["parameters"]
    kept = parameters - manifest["prunable_weights"] + manifest["kept_weights"]
    size = sum(file.stat().st_size for file in resolve_model(model).path.iterdir())
    return [
        row("parameters kept", f"{parameters:,}", f"{kept:,}", f"x{kept / parameters:.3f}"),
        row("MB on disk", f"{size / 1e6:.1f}", f"{inspection.total_bytes / 1e6:.1f}",
            f"x{inspection.total_bytes / size:.3f}"),
    ]  # fmt: skip


def perplexity_row(evaluation, model, output, text):
    label = f"perplexity, {TEXTS[text]}"
    parent, child = (evaluation.cell(f"perplexity:{text}", name) for name in (model, str(output)))
    if child.missing:
        return row(label, "no source at hand", "", "")
    against = child.comparison
    ratio = f"x{against.ratio:.3f} [{against.ratio_low:.3f}, {against.ratio_high:.3f}]"
    return row(label, format_perplexity(parent.result), format_perplexity(child.result), ratio)


def row(label, parent, child, ratio):
    return {"": label, "parent": parent, "sub-model": child, "ratio [95% interval]": ratio}


def show(recipe, output, was_there):
    evaluation = measure(recipe.model, output)
    log = json.loads((output / LOG).read_text(encoding="utf-8"))
    rows = size_rows(recipe.model, secateur.inspect(output))
    rows += [perplexity_row(evaluation, recipe.model, output, text) for text in TEXTS]
    rows.append(row("derivation, seconds", "", f"{log['seconds']:.1f}", ""))
    rows.append(row("derivation, peak MB", "", f"{log['peak_memory_bytes'] / 1e6:.0f}", ""))
    print(console.table(rows))
    print("±: one standard error over files; ratio: sub-model over parent, on the same files")
    if was_there:
        print(f"The sub-model was there already: time and memory are those in {output / LOG}")
    for reason in dict.fromkeys(cell.missing for cell in evaluation.cells if cell.missing):
        print(f"no source at hand: {reason}")
    print(NOTES)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "demo" / "python")
    output = parser.parse_args().output.absolute()
    console.quiet_libraries()
    recipe = make_recipe({}, RECIPE)
    try:
        show(recipe, output, derive(recipe, output))
    except SecateurError as error:
        console.remark(f"demo: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
