"""Text that a model writes itself, or turns in its template, to calibrate on or recover from: JSONL of {"text": ...}.

    python benchmarks/written_text.py MODEL functions -o functions.jsonl [--for python] [--tokens 48000] [--seed 123]

`own` goes on from the first tokens of calibration documents. `answers` and `functions` are turns in the model's chat
template: the former are asked about the beginning of such a document, the latter complete a Python function of one, of
which they get the head and the docstring. All are drawn at a temperature, 1 if nothing is said. `pairs` are the same
turns as `functions`, in the same order, and the answer is what the document itself has: no model runs. Documents are
those of the calibration split, and no benchmark's. MODEL may be a sub-model, to learn from what it says itself.
"""

import argparse
import ast
import json
import random
import textwrap
from itertools import islice
from pathlib import Path

import secateur
from secateur.calibration.corpora import load_corpus
from secateur.evaluation.programs.problem import FENCE, Problem
from secateur.files import atomic_write_bytes
from secateur.models.source import load_tokenizer, resolve_model

KINDS = ("own", "answers", "functions", "pairs")
BEGINNING, SHOWN = 24, 96  # tokens of a document that the model goes on from, and is asked about
LENGTH, TOGETHER = 512, 32
LONGEST = 2500  # characters of a function
QUESTIONS = ("Explain what this code does.", "Write tests for this code.", "Improve this code and explain the changes.")


def asked(tokenizer, question):
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def prompts(tokenizer, kind, *, domain, tokens, data, seed):
    """Give what the model goes on from."""
    if kind == "functions":
        for head in dict.fromkeys(head for head, _ in drawn_pairs(domain, data, seed)):
            yield begun(tokenizer, head)
        return
    drawn = secateur.calibrate(domain, tokenizer, samples=-(-tokens // LENGTH), data=data, seed=seed)
    for number, row in enumerate(drawn.token_ids.tolist()):
        if kind == "own":
            yield tokenizer.decode(row[:BEGINNING], skip_special_tokens=True)
        else:
            code = tokenizer.decode(row[:SHOWN], skip_special_tokens=True)
            yield asked(tokenizer, f"{QUESTIONS[number % len(QUESTIONS)]}\n\n```\n{code}\n```")


def begun(tokenizer, head):
    """Return the question to complete a function, and the beginning of the answer."""
    problem = Problem("", "python", head, (), "")
    return asked(tokenizer, problem.question()) + problem.reply()


def functions_of(source):
    """Give (head with docstring, body) of the functions of a file that have both."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(ast.get_docstring(node) or "") < 40 or len(node.body) < 2:
            continue
        whole = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).splitlines(keepends=True)
        head = node.body[0].end_lineno - node.lineno + 1
        if sum(map(len, whole)) <= LONGEST:
            yield "".join(whole[:head]), "".join(whole[head:]).rstrip("\n")


def drawn_pairs(domain, data, seed):
    """Return (head with docstring, body) of all functions of the calibration split that have both, shuffled."""
    corpus = load_corpus(domain, "train", data)
    pairs = sorted({pair for document in corpus.documents for pair in functions_of(document.text)})
    random.Random(seed).shuffle(pairs)
    return pairs


def write_pairs(tokenizer, path, *, domain, tokens, data, seed):
    """Save questions with the documents' own answers, of about as many tokens as are asked for."""
    lines, count = [], 0
    for head, answer in drawn_pairs(domain, data, seed):
        text = f"{begun(tokenizer, head)}{answer}{FENCE}{tokenizer.eos_token}\n"
        count += len(tokenizer.encode(text))
        if count > tokens:
            break
        lines.append(json.dumps({"text": text}))
    atomic_write_bytes(path, ("\n".join(lines) + "\n").encode())


def write_text(model_name, kind, path, *, domain="python", tokens=48_000, data=None, seed=123, temperature=1.0):
    """Let a model write about as many tokens as are asked for, prompts included, and save them."""
    tokenizer = load_tokenizer(resolve_model(model_name))
    if kind == "pairs":
        write_pairs(tokenizer, path, domain=domain, tokens=tokens, data=data, seed=seed)
        return
    model, lines, count = secateur.load(model_name), [], 0
    waiting = prompts(tokenizer, kind, domain=domain, tokens=tokens, data=data, seed=seed)
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
