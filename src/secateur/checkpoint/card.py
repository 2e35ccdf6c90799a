"""The model card of a sub-model (its README.md), made from the manifest."""

import json
from collections.abc import Mapping
from typing import Any

_TEMPLATE = """\
---
library_name: secateur
base_model: {quoted_base}
tags: [secateur, pruned, sparse]
---
**Write `import secateur` before transformers opens this folder.** Without it transformers only warns about an unknown
format and fills the pruned weights with random numbers.

```python
import secateur
model = secateur.load("path/to/this/folder")
print(model.generate("def quicksort(", max_new_tokens=128))
```

or `transformers.AutoModelForCausalLM.from_pretrained("path/to/this/folder")` after `import secateur`.

# Sub-model of {base}

A sub-model for **{domains}**, derived with Secateur after the method of
[arXiv 2501.05248](https://arxiv.org/abs/2501.05248). Of the {size:,} weights in the
decoder's linear layers {kept:,} are kept ({sparsity:.2%} sparsity); {outside}.

| | |
|---|---|
| base model | {base} |
| method | {method}, {granularity}, budget {budget} |
| sparsity | {sparsity:.4f} |
| values | {values} |{head}
| calibration | {samples} x {sequence_length} tokens, seed {seed}, SHA-256 `{calibration_hash}` |{recovery}{benchmarks}
| sources | {sources} |

What pruning cost is not known from this card: measure it with
`secateur evaluate path/to/this/folder --against BASE --task perplexity:python -o results`. A sub-model is worse than
its parent, most of all outside the domain it was derived for.
"""
_TRIMMED = (
    "\n| head | computes {tokens:,} of {vocabulary:,} tokens{coverage}: an answer holds no others, a prompt may |"
)
_FEWER = "\n| vocabulary | {tokens:,} of {of:,} tokens{more}: text that had others is split into more |"
_RECOVERED = (
    "\n| recovery | learnt the parent's probabilities on {samples} x {sequence_length} tokens, SHA-256 `{sha256}`, "
    "from {sources} |"
)
_SHARED = "problems of which the text has a run of 13 words, and of which it has at least half"
_UNTOUCHED, _ROUNDED = "embeddings and head are those of the parent", "embedding and head are the parent's in {values}"
_LEARNT, _SAME = "norms and biases inside the blocks have learnt with the weights", "norms are those of the parent"
_SCALED = "norms are the parent's, with some methods but for powers of two that the weights around them make up for"


def model_card(manifest: Mapping[str, Any]) -> str:
    """Return the card's Markdown; the same manifest gives the same text."""
    recipe, calibration = manifest["recipe"], manifest["calibration"]
    groups = recipe.get("group_size")
    outside = _ROUNDED.format(values=recipe.get("embedding_values", "int8")) if groups else _UNTOUCHED
    return _TEMPLATE.format(
        base=manifest["base_model"]["name"],
        quoted_base=json.dumps(manifest["base_model"]["name"]),
        domains=", ".join(recipe["for"]),
        size=manifest["prunable_weights"],
        kept=manifest["kept_weights"],
        sparsity=manifest["sparsity"],
        method=recipe["method"],
        granularity=recipe["granularity"],
        budget=recipe["budget"],
        head=_describe_vocabulary(manifest.get("vocabulary")) + _describe_head(manifest.get("shortlist")),
        values=manifest["values"] + (f", groups of {groups}" if groups else "") + describe_eight_bits(manifest),
        outside=f"{outside}, {_LEARNT if 'recovery' in manifest else _SCALED if groups else _SAME}",
        samples=recipe["samples"],
        sequence_length=recipe["sequence_length"],
        seed=recipe["seed"],
        calibration_hash=calibration["sha256"],
        recovery=_describe_recovery(manifest.get("recovery")),
        benchmarks=_describe_benchmarks(manifest),
        sources=_sources(calibration),
    )


def _sources(text: Mapping[str, Any]) -> str:
    return "; ".join(f"{one['source']} {one['version']} ({one['licence']})" for one in text["provenance"])


def _describe_recovery(text: Mapping[str, Any] | None) -> str:
    return "" if text is None else _RECOVERED.format(**text, sources=_sources(text))


def _describe_benchmarks(manifest: Mapping[str, Any]) -> str:
    """Return a row on what the texts share with benchmarks; nothing for a manifest of a time when nobody looked."""
    parts = [
        f"{what}: {_of_benchmarks(manifest[what]['benchmarks'])}"
        for what in ("calibration", "recovery")
        if manifest.get(what, {}).get("benchmarks")
    ]
    return f"\n| benchmarks | {_SHARED}: {'; '.join(parts)} |" if parts else ""


def _of_benchmarks(overlaps: Mapping[str, Mapping[str, int]]) -> str:
    return ", ".join(f"{name} {one['touched']}, {one['held']} of {one['problems']}" for name, one in overlaps.items())


def describe_eight_bits(manifest: Mapping[str, Any]) -> str:
    """Return what a manifest says of weights that have more bits than the others, behind a comma; or nothing."""
    share = manifest.get("eight_bits")
    return f", {share:.1%} in eight bits" if isinstance(share, float) else ""


def _describe_vocabulary(vocabulary: Mapping[str, Any] | None) -> str:
    return "" if vocabulary is None else _FEWER.format(**{**vocabulary, "more": describe_more_tokens(vocabulary)})


def describe_more_tokens(vocabulary: object) -> str:
    """Return what a manifest says of the tokens that held-out text takes more, in brackets; or nothing."""
    more = vocabulary.get("more_tokens") if isinstance(vocabulary, Mapping) else None
    parts = [
        f"{share:.2%} more for held-out {domain}"
        for domain, share in (more.items() if isinstance(more, Mapping) else ())
        if isinstance(share, float)
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _describe_head(shortlist: Mapping[str, Any] | None) -> str:
    return "" if shortlist is None else _TRIMMED.format(**{**shortlist, "coverage": describe_coverage(shortlist)})


def describe_coverage(shortlist: object) -> str:
    """Return what a manifest says of the share of held-out text that a shortlist covers, in brackets; or nothing."""
    coverage = shortlist.get("coverage") if isinstance(shortlist, Mapping) else None
    parts = [
        f"{covered:.2%} of held-out {domain}"
        for domain, covered in (coverage.items() if isinstance(coverage, Mapping) else ())
        if isinstance(covered, float)
    ]
    return f" ({', '.join(parts)})" if parts else ""
