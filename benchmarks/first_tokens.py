"""Which first tokens of a text a sub-model cannot cope with, and its held-out perplexity without them.

    python benchmarks/first_tokens.py PARENT SUB [SUB ...] [--domain java] [--data DIR] [--limit 8000]

The first token of a context gets a few huge activations early in the model, on which later tokens rest their attention
(massive activations, arXiv 2402.17762; attention sinks, arXiv 2309.17453). Where pruning switches them off for some
token, every text that begins with it goes wrong. For each token with which a held-out window begins the largest
activation behind the middle block is compared with the parent's: below a tenth it is lost. Perplexity is shown for all
windows and for those that begin with a token that none of the sub-models lost.
"""

import argparse
from pathlib import Path

import torch

from secateur.calibration.held_out import held_out_windows
from secateur.evaluation.perplexity import evaluate_perplexity
from secateur.models.source import load_tokenizer, resolve_model
from secateur.runtime.loading import open_model

LOST = 0.1


def peaks(model, tokens):
    """Return the largest activation of each token alone, behind the middle block: [tokens]."""
    found = []
    blocks = model.model.layers
    middle = blocks[len(blocks) // 2]

    def keep(_module, _arguments, output):
        found.append((output[0] if isinstance(output, tuple) else output)[:, 0].abs().amax(-1).float())

    handle = middle.register_forward_hook(keep)
    with torch.inference_mode():
        model(torch.tensor(tokens)[:, None], logits_to_keep=1)
    handle.remove()
    return found[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("submodels", nargs="+")
    parser.add_argument("--domain", default="java")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=8000)
    options = parser.parse_args()
    parent = resolve_model(options.parent)
    tokenizer = load_tokenizer(parent)
    windows = held_out_windows(options.domain, tokenizer, max_tokens=options.limit, data=options.data)
    first = sorted({int(window.token_ids[0]) for window in windows})
    expected = peaks(open_model(parent), first)
    lost = {}
    for name in options.submodels:
        found = peaks(open_model(resolve_model(name)), first)
        lost[name] = {
            token: (float(a), float(b)) for token, a, b in zip(first, found, expected, strict=True) if a < LOST * b
        }
    everywhere = {token for tokens in lost.values() for token in tokens}
    kept = [window for window in windows if int(window.token_ids[0]) not in everywhere]
    print(f"{options.domain}: {len(windows)} windows, {len(kept)} of them begin with a token that no sub-model lost")
    for name in options.submodels:
        model = open_model(resolve_model(name))
        whole, rest = (evaluate_perplexity(model, some, options.domain).perplexity for some in (windows, kept))
        said = ", ".join(f"{tokenizer.decode([t])!r} ({a:.0f} of {b:.0f})" for t, (a, b) in lost[name].items())
        print(f"{Path(name).name:>16}  all {whole:.3f}  rest {rest:.3f}  lost: {said or 'none'}", flush=True)


if __name__ == "__main__":
    main()
