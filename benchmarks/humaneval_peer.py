"""HumanEval, or another benchmark of programs, answered by llama.cpp and by secateur from the same GGUF and prompts.

    python benchmarks/humaneval_peer.py MODEL.gguf -o OUT [--task humaneval] [--problems N] [--data DIR]

Both are asked in the model's chat template with the same token ids, take the most likely token each time and end at the
same strings, and programs run in the same sandbox. Writes OUT/llama.cpp.jsonl, OUT/llama.cpp (as `secateur score`)
and OUT/secateur (as `secateur evaluate`); what is finished is used again. Prints both pass@1 with their intervals, how
many answers are the same to the letter, the paired difference with McNemar's p-value, and the seconds of answering:
llama.cpp one text at a time, secateur in batches.
"""

import argparse
import time
from pathlib import Path

import secateur
from secateur.evaluation.journal import Journal, read_lines
from secateur.evaluation.programs.generation import Asking, Prompts
from secateur.evaluation.programs.loading import load_benchmark
from secateur.evaluation.programs.problem import FENCE
from secateur.evaluation.programs.run import chosen, slug
from secateur.evaluation.programs.score import score
from secateur.evaluation.proportions import paired, wilson
from secateur.models.source import resolve_model


def llama_answers(options, problems, prompts, path):
    """Append the answers of llama.cpp to a journal; return the seconds of those that were made now."""
    import llama_cpp

    model = llama_cpp.Llama(str(options.model), n_ctx=4096, n_batch=512, logits_all=False, verbose=False)
    begin = time.monotonic()
    with Journal(path) as journal:
        for problem in problems[len(journal.records) :]:
            token_ids = prompts.tokenizer(prompts.of(problem)).input_ids
            answer = model.create_completion(
                token_ids,
                max_tokens=options.max_new_tokens,
                temperature=0.0,
                repeat_penalty=1.0,
                stop=[*problem.stop, FENCE],
            )
            text = answer["choices"][0]["text"]
            journal.append([{"task_id": problem.task_id, "completion": text}])
            print(f"llama.cpp {problem.task_id}: {len(text)} characters", flush=True)
    return time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--task", default="humaneval")
    parser.add_argument("--problems", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    asking = Asking(style="chat", max_new_tokens=options.max_new_tokens)
    problems = list(chosen(load_benchmark(options.task, options.data).problems, options.problems).values())
    theirs, judged = options.output / "llama.cpp.jsonl", options.output / "llama.cpp"
    prompts = Prompts(resolve_model(str(options.model)).path, asking.style)
    seconds = llama_answers(options, problems, prompts, theirs)
    print(f"llama.cpp: {seconds:.0f} s")
    if not judged.exists():
        score(theirs, options.task, judged, run_generated_code=True, data=options.data, cut=True)

    ours = options.output / "secateur"
    if not ours.exists():
        begin = time.monotonic()
        secateur.evaluate(
            [options.model],
            [options.task],
            problems=options.problems,
            asking=asking,
            run_generated_code=True,
            output=ours,
            data=options.data,
        )
        print(f"secateur, with running the programs: {time.monotonic() - begin:.0f} s")
    place = next(path for path in ours.iterdir() if path.is_dir()) / slug(options.task)
    answers = {one["task_id"]: one["completion"] for one in read_lines(place / "samples.jsonl")}
    other = {one["task_id"]: one["completion"] for one in read_lines(theirs)}
    by_task = [
        {one["task_id"]: one["passed"] for one in read_lines(path / "results.jsonl")} for path in (place, judged)
    ]
    same = sum(problem.cut(answers[problem.task_id]) == problem.cut(other[problem.task_id]) for problem in problems)
    values = [[float(one[problem.task_id]) for problem in problems] for one in by_task]
    for name, some in zip(("secateur", "llama.cpp"), values, strict=True):
        share = wilson(int(sum(some)), len(some))
        print(f"{name}: {sum(some):.0f} of {len(some)}, {share.value:.1%} [{share.low:.1%}, {share.high:.1%}]")
    pair = paired(*values)
    print(f"{same} answers are the same; {pair}")


if __name__ == "__main__":
    main()
