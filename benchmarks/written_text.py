"""Text that a model writes itself, to calibrate on or to recover from, as JSONL of {"text": ...}.

    python benchmarks/written_text.py MODEL functions -o functions.jsonl [--for python] [--tokens 48000] [--seed 123]

`own` goes on from the first tokens of calibration documents. `answers` and `functions` are turns in the model's chat
template: the former are asked about the beginning of such a document, the latter complete a Python function of one, of
which they get the head and the docstring. All are drawn at a temperature, 1 if nothing is said. Documents are those of
the calibration split, and no benchmark's.
"""

import argparse
import json
import re
from itertools import islice
from pathlib import Path

import secateur
from secateur.evaluation.programs.problem import FENCE, Problem
from secateur.files import atomic_write_bytes
from secateur.models.source import load_tokenizer, resolve_model

KINDS = ("own", "answers", "functions")
BEGINNING, SHOWN = 24, 96  # tokens of a document that the model goes on from, and is asked about
LENGTH, TOGETHER = 512, 32
QUESTIONS = ("Explain what this code does.", "Write tests for this code.", "Improve this code and explain the changes.")
# The head of a function of a module, with a docstring of at least 40 characters.
FUNCTION = re.compile(r'^(def \w+\([^()]*\)[^\n]*:\n    """(?:(?!""").){40,600}"""\n)', re.MULTILINE | re.DOTALL)


def asked(tokenizer, question):
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def prompts(tokenizer, kind, rows):
    """Give what the model goes on from."""
    heads = set()
    for number, row in enumerate(rows):
        if kind == "own":
            yield tokenizer.decode(row[:BEGINNING], skip_special_tokens=True)
        elif kind == "answers":
            code = tokenizer.decode(row[:SHOWN], skip_special_tokens=True)
            yield asked(tokenizer, f"{QUESTIONS[number % len(QUESTIONS)]}\n\n```\n{code}\n```")
        else:
            for head in FUNCTION.findall(tokenizer.decode(row, skip_special_tokens=True)):
                problem = Problem("", "python", head, (), "")
                if head not in heads:
                    yield asked(tokenizer, problem.question()) + problem.reply()
                heads.add(head)


def write_text(model_name, kind, path, *, domain="python", tokens=48_000, data=None, seed=123, temperature=1.0):
    """Let a model write about as many tokens as are asked for, prompts included, and save them."""
    tokenizer = load_tokenizer(resolve_model(model_name))
    samples = 16 * (-(-tokens // LENGTH)) if kind == "functions" else -(-tokens // LENGTH)
    rows = secateur.calibrate(domain, tokenizer, samples=samples, data=data, seed=seed).token_ids.tolist()
    model, lines, count = secateur.load(model_name), [], 0
    waiting = prompts(tokenizer, kind, rows)
    stop = (FENCE,) if kind == "functions" else ()
    end = f"{FENCE}{tokenizer.eos_token}\n" if kind == "functions" else ""
    while count < tokens and (some := list(islice(waiting, TOGETHER))):
        settings = {
            "max_new_tokens": LENGTH - BEGINNING,
            "temperature": temperature,
            "seed": seed + len(lines),
            "stop": stop,
        }
        for prompt, text in zip(some, model.generate_batch(some, **settings), strict=True):
            written = len(tokenizer.encode(text))
            count += len(tokenizer.encode(prompt)) + written
            whole = written < LENGTH - BEGINNING - 1  # and not cut off
            lines.append(json.dumps({"text": prompt + text + (end if whole else "")}))
        print(f"{kind}: {count} tokens", flush=True)
    atomic_write_bytes(path, ("\n".join(lines) + "\n").encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--for", dest="domain", default="python")
    parser.add_argument("--tokens", type=int, default=48_000)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument("--data", type=Path)
    one = parser.parse_args()
    settings = {"domain": one.domain, "tokens": one.tokens, "data": one.data, "seed": one.seed}
    write_text(one.model, one.kind, one.output, **settings, temperature=one.temperature)


if __name__ == "__main__":
    main()
