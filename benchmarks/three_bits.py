"""What three bits with levels that are not even would cost a whole model, nothing removed.

    python benchmarks/three_bits.py MODEL -o OUT [--for python] [--samples 64] [--group-size 64] [--vocabulary 48000]

There are no kernels for three bits: eight levels stand in the place of the sixteen of nl4 while a sub-model is derived
and measured, in memory only, so what is written has the quality of three bits and the size of four. The levels are
those that lose least of normal numbers (Max 1960, table 1), the outermost one 127. Prints perplexity or bits per byte
beside the parent, and the size that a file with three bits would have.
"""

import argparse
import shutil
from pathlib import Path

import secateur
from secateur.checkpoint.format import LOG, read_json
from secateur.checkpoint.quantise import CODEBOOKS
from secateur.config import make_recipe
from secateur.pruning.derive import derive_recipe

LEVELS = (-127, -79, -45, -14, 14, 45, 79, 127)
PEAKS = (-100.0, 100.0, -110.0, 110.0, -118.0, 118.0, -127.0, 127.0, -137.0, 137.0)


def stand_in():
    """Put eight levels in the place of those of nl4, everywhere in this process."""
    changes = {"levels": LEVELS, "lowest": LEVELS[0], "highest": LEVELS[-1], "peaks": PEAKS}
    for name, value in changes.items():
        object.__setattr__(CODEBOOKS["nl4"], name, value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--for", dest="domain", default="python")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--measured", nargs="*", default=["java", "general"], help="domains beside its own")
    parser.add_argument("--limit", type=int, default=8000)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    stand_in()
    recipe = make_recipe(
        {
            "model": options.model,
            "for": options.domain,
            "preset": "best",
            "sparsity": 0.0,
            "values": "nl4",
            "group_size": options.group_size,
            "embedding_values": "int8",
            "samples": options.samples,
            "vocabulary": options.vocabulary,
        }
    )
    options.output.mkdir(parents=True, exist_ok=True)
    folder = options.output / f"three-bits-{options.group_size}"
    derive_recipe(recipe, output=folder, data=options.data, resume=True, announce=print)
    size = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in read_json(folder / "secateur.json")["layers"])
    tasks = [f"perplexity:{one}" for one in (options.domain, *options.measured)]
    found = secateur.evaluate([folder], tasks, against=options.model, limit=options.limit, data=options.data)
    print(f"{(size - weights / 8) / 1e6:.0f} MB with three bits, {read_json(folder / LOG)['seconds']:.0f} s")
    print(found.to_table())
    for task in tasks:
        ours, parent = (found.cell(task, model.name).result.bits_per_byte for model in found.models[::-1])
        print(f"{task}: {ours:.4f} bits per byte beside {parent:.4f}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
