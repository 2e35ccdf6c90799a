"""What it costs to keep fewer tokens: bytes, tokens of held-out text, and bits per byte beside the whole model.

    python benchmarks/vocabulary_table.py MODEL [--for python] [--counts 32000 48000] [--measured java general]

Each model is the dense parent with the tokens that `secateur derive --vocabulary` keeps, nothing pruned or rounded. All
read the same text, drawn in the parent's tokens; intervals are 95% over documents. MB are those of the tokenizer and of
one matrix of embeddings in four bits with groups of 32.
"""

import argparse
from pathlib import Path

import secateur
from secateur.calibration.mixture import parse_mixture
from secateur.models.source import resolve_model
from secateur.models.weights import load_skeleton
from secateur.pruning.vocabulary import with_vocabulary

BITS = 4.5  # of a weight in groups of 32, with its scale


def megabytes(folder):
    weight = load_skeleton(folder).get_input_embeddings().weight
    return ((folder.path / "tokenizer.json").stat().st_size + weight.numel() * BITS / 8) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--for", dest="domain", default="python")
    parser.add_argument("--counts", nargs="+", type=int, default=[32000, 48000])
    parser.add_argument("--measured", nargs="*", default=["java", "general"], help="domains beside its own")
    parser.add_argument("--limit", type=int, default=8000, help="tokens of held-out text of each domain")
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    whole, domains = resolve_model(options.model), [options.domain, *options.measured]
    mixture = parse_mixture([options.domain])
    smaller = [with_vocabulary(whole, mixture, count, data=options.data) for count in options.counts]
    evaluation = secateur.evaluate(
        [folder.path for folder in smaller],
        [f"perplexity:{one}" for one in domains],
        against=options.model,
        limit=options.limit,
        data=options.data,
    )
    print(
        f"| tokens | MB | more tokens, {options.domain} | "
        + " | ".join(f"bits per byte, {one}" for one in domains)
        + " |"
    )
    print("|---" * (3 + len(domains)) + "|")
    dense = [evaluation.cell(f"perplexity:{one}", evaluation.against).result.bits_per_byte for one in domains]
    size = load_skeleton(whole).get_input_embeddings().weight.shape[0]
    print(f"| {size:,} | {megabytes(whole):.1f} | | " + " | ".join(f"{bits:.4f}" for bits in dense) + " |")
    for folder in smaller:
        cells = []
        for one, bits in zip(domains, dense, strict=True):
            found = evaluation.cell(f"perplexity:{one}", str(folder.path)).comparison.bits_per_byte
            cells.append(f"{found.value / bits:+.2%} ({found.low / bits:+.2%}, {found.high / bits:+.2%})")
        record = folder.trimming.record
        more = record["more_tokens"][options.domain]
        print(f"| {record['tokens']:,} | {megabytes(folder):.1f} | {more:+.2%} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
