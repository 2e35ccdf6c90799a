"""The native engine against the same weights, unpacked, in float32 through transformers.

    python benchmarks/engine_accuracy.py SUB [SUB ...] [--domain python] [--texts 20] [--tokens 200] [--data DIR]

Teacher-forced on held-out text: both are given the same tokens, and their logits are compared at each position. The
logit error is the root of the mean square of differences (a shift that all logits of a position share, which changes
no probability, is taken out). Where the reference's gap between its two best tokens exceeds three times that error, the
best token has to be the same; such positions where it is not are counted. Prints one JSON object for each model.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import secateur  # noqa: F401 - registers the format
from secateur.calibration.held_out import held_out_windows
from secateur.models.source import load_tokenizer, resolve_model
from secateur.runtime.engine import open_native
from secateur.runtime.native_model import NativeSequence


def nats(logits, token_ids):
    """Negative log-likelihood of the tokens that follow, summed."""
    values = logits[:-1].astype(np.float64)
    highest = values.max(axis=1)
    total = highest + np.log(np.exp(values - highest[:, None]).sum(axis=1))
    return float((total - values[range(len(values)), token_ids[1:]]).sum())


def compare(folder, windows):
    reference = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    model = open_native(folder).model
    squares, gaps, same, likelihood, predicted = [], [], [], np.zeros(2), 0
    for window in windows:
        ids = [int(token) for token in window.token_ids]
        with torch.inference_mode():
            expected = reference(torch.tensor([ids])).logits[0].numpy()
        found = model.forward(ids, [NativeSequence(model, len(ids))] * len(ids), [True] * len(ids))
        difference = found - expected
        difference -= difference.mean(axis=1, keepdims=True)
        squares.append((difference**2).mean(axis=1))
        best = np.partition(expected, -2, axis=1)[:, -2:]
        gaps.append(best[:, 1] - best[:, 0])
        same.append(found.argmax(axis=1) == expected.argmax(axis=1))
        likelihood += nats(found, ids), nats(expected, ids)
        predicted += len(ids) - 1
    error = float(np.sqrt(np.concatenate(squares).mean()))
    gaps, same = np.concatenate(gaps), np.concatenate(same)
    clear = gaps > 3 * error
    native, torch_ = np.exp(likelihood / predicted)
    return {
        "model": folder.name,
        "texts": len(windows),
        "positions": len(same),
        "logit_error": error,
        "same_argmax": float(same.mean()),
        "clear_positions": int(clear.sum()),
        "clear_but_different": int((clear & ~same).sum()),
        "perplexity_native": float(native),
        "perplexity_reference": float(torch_),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--domain", default="python")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    for name in options.models:
        folder = resolve_model(name)
        windows = held_out_windows(
            options.domain,
            load_tokenizer(folder),
            max_tokens=10 * options.texts * options.tokens,
            window_length=options.tokens,
            data=options.data,
        )
        whole = [window for window in windows if len(window.token_ids) > options.tokens // 2][: options.texts]
        print(json.dumps(compare(folder, whole)), flush=True)


if __name__ == "__main__":
    main()
