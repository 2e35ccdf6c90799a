"""SparseGPT by llmcompressor on a calibration set of ours: a peer for `secateur derive`, in its own environment.

    python -c 'import numpy, secateur; from secateur.models.source import load_tokenizer, resolve_model; \\
        folder = resolve_model("MODEL"); print(folder.path); \\
        numpy.save("ids.npy", secateur.calibrate("python", load_tokenizer(folder), samples=64).token_ids)'
    PEER/bin/python benchmarks/llmcompressor_peer.py FOLDER ids.npy -o OUT [--sparsity 0.5] [--dtype bfloat16]
    secateur evaluate OUT --against MODEL --task perplexity:python

PEER is a virtual environment with `pip install llmcompressor` (0.14.0.1 here), which needs an older transformers than
secateur. FOLDER is the Hugging Face folder that the first command prints. Prints seconds, peak memory and sparsity.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("token_ids", type=Path, help="int64 [samples, sequence_length]")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="the faster one here")
    options = parser.parse_args()
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=getattr(torch, options.dtype))
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    token_ids = np.load(options.token_ids)
    samples, length = token_ids.shape
    columns = {"input_ids": token_ids.tolist(), "attention_mask": np.ones_like(token_ids).tolist()}
    # 0:0 is no pattern. Targets by name: with ["Linear"] the head is called "lm_head.", which no list of what to ignore
    # matches, and it, which is the embedding once more, is pruned as well.
    recipe = SparseGPTModifier(sparsity=options.sparsity, mask_structure="0:0", targets=["re:.*_proj$"])
    oneshot(
        model=model,
        dataset=Dataset.from_dict(columns),
        recipe=recipe,
        max_seq_length=length,
        num_calibration_samples=samples,
        tokenizer=tokenizer,
    )
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pruned = [module.weight for name, module in model.named_modules() if name.endswith("_proj")]
    zeros = sum(int((weight == 0).sum()) for weight in pruned) / sum(weight.numel() for weight in pruned)
    print(f"{seconds:.0f} s, at most {peak / 1e9:.2f} GB, sparsity {zeros:.4f}")
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
