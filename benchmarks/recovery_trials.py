"""How fast recovery may learn: short trials on a sub-model, by learning rate and by tokens behind a step.

    python benchmarks/recovery_trials.py MODEL SUB [--for python] [--text pairs.jsonl] [--tokens 16384] \\
        [--trials 1.2e-3:2048 4e-4:1024 4e-4:512 ...] [--measured python java]

SUB is a sub-model of MODEL whose values are not rounded. Each trial begins with it and learns, as `secateur derive
--recover` does, from as many tokens of the domain's training text, every second sequence from `--text` where one is
named (`written_text.py`). Prints the mean Kullback-Leibler divergence from the parent in nats a token: of held-out text
of each domain, of other documents than those that are reported elsewhere, and of a part of `--text` that is not learnt
from, behind the docstring of the answer, which is what is left when a question is repeated.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import secateur
from secateur.calibration.held_out import held_out_windows
from secateur.models.source import load_tokenizer, resolve_model
from secateur.pruning import recovery
from secateur.pruning.recovery import Pupil
from secateur.runtime.loading import open_model

REPORTED = 8000  # tokens of each domain that other results are reported on
LENGTH, HELD_OUT = 512, 8  # of a sequence; sequences of --text that are measured
TURN = "assistant\n```"


def packed(tokenizer, path):
    """Return int64 [sequences, LENGTH] of a JSONL file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    joined = [
        one for line in lines for one in tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
    ]
    return torch.tensor(joined[: len(joined) // LENGTH * LENGTH]).view(-1, LENGTH)


def answered(tokenizer, row):
    """Return bool [LENGTH]: whether a token is in an answer and behind its docstring."""
    text, found = "", []
    for token in row.tolist():
        turn = text.rfind(TURN)
        found.append(turn > text.rfind(tokenizer.eos_token) and text.count('"""', turn) >= 2)
        text += tokenizer.decode([token])
    return torch.tensor(found)


def held_out(options, tokenizer):
    """Return {name: (sequences, which of their tokens count)} of what divergences are measured on."""
    found = {}
    for domain in options.measured:
        reported = {w.document for w in held_out_windows(domain, tokenizer, max_tokens=REPORTED, data=options.data)}
        windows = held_out_windows(domain, tokenizer, max_tokens=REPORTED + options.limit, data=options.data)
        rows = [torch.tensor(w.token_ids) for w in windows if w.document not in reported]
        found[domain] = [(row, torch.arange(len(row)) > 0) for row in rows]
    if options.text:
        rows = packed(tokenizer, options.text)[-HELD_OUT:]
        found["answers"] = [(row, answered(tokenizer, row)) for row in rows]
    return found


def log_probabilities(model, row):
    with torch.inference_mode():
        return model(input_ids=row[None]).logits[0].float().log_softmax(-1)


def divergence(parent, model, rows):
    """Return the mean divergence from the parent over the tokens that count, in nats."""
    total, count = 0.0, 0
    for row, counts in rows:
        wanted, found = log_probabilities(parent, row), log_probabilities(model, row)
        total += float((wanted.exp() * (wanted - found)).sum(-1)[counts].sum())
        count += int(counts.sum())
    return total / count


def learn(parent, model, token_ids, rate, step):
    """Do what `recover` does, from the model as it is."""
    recovery.LEARNING_RATE, recovery.STEP_TOKENS = rate, step  # in this process alone
    for parameter in (*parent.parameters(), *model.parameters()):
        parameter.requires_grad_(requires_grad=False)
    learns = {name: one for name, one in model.named_parameters() if ".layers." in name}
    masks = {name: one != 0 for name, one in learns.items() if one.ndim == 2}
    weights = {name: nn.Parameter(one.detach().float()) for name, one in learns.items()}
    with tempfile.TemporaryDirectory() as folder:
        recovery.recover(Pupil(model, parent, weights, masks, {}), token_ids, Path(folder) / "state", lambda *_: None)


def training_text(options, tokenizer):
    """Return int64 [sequences, LENGTH]: the domain's, and every second one of --text."""
    samples = -(-options.tokens // LENGTH)
    rows = torch.as_tensor(
        secateur.calibrate(options.domain, tokenizer, samples=samples, seed=options.seed, data=options.data).token_ids
    )
    if not options.text:
        return rows
    others = packed(tokenizer, options.text)[:-HELD_OUT]
    return torch.stack([row for pair in zip(others, rows, strict=False) for row in pair])[:samples]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sub")
    parser.add_argument("--for", dest="domain", default="python")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--trials", nargs="+", default=["1.2e-3:2048", "4e-4:1024"], metavar="RATE:STEP")
    parser.add_argument("--measured", nargs="+", default=["python", "java"])
    parser.add_argument("--limit", type=int, default=4000, help="held-out tokens of each domain")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    tokenizer = load_tokenizer(resolve_model(options.model))
    measured, token_ids = held_out(options, tokenizer), training_text(options, tokenizer)
    parent = open_model(resolve_model(options.model))
    print("| rate | step | " + " | ".join(measured) + " | seconds |", flush=True)
    print("|---" * (len(measured) + 3) + "|")
    for trial in ("none", *options.trials):
        model, begin = open_model(resolve_model(options.sub)), time.monotonic()
        rate, _, step = trial.partition(":")
        if step:
            learn(parent, model, token_ids, float(rate), int(step))
        seconds = time.monotonic() - begin
        cells = [f"{divergence(parent, model, rows):.4f}" for rows in measured.values()]
        print(f"| {rate} | {step} | " + " | ".join(cells) + f" | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
