"""What a stranger gets wrong: each mistake ends in one clear line that names it, and leaves nothing behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.cli.damage import (
    copied,
    replaced,
    truncated,
    with_header,
    with_json,
    with_nan,
    with_set_bytes,
    with_weight,
)
from tests.cli.running import Outcome, run, unchanged
from tests.tiny import save_tiny

Q_PROJ = "self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
FIRST_SHARD = "model-00001-of-00004.safetensors"


@dataclass(frozen=True)
class Place:
    """Where a case finds whole inputs (`base`, `child`, `text`) and where it may write."""

    inputs: Path
    work: Path

    @property
    def base(self) -> Path:
        return self.inputs / "base"

    @property
    def child(self) -> Path:
        return self.inputs / "child"

    @property
    def text(self) -> Path:
        return self.inputs / "text"

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def derive(self, *more: object, model: object = None, domain: object = None, output: object = "out") -> list:
        small = ["--samples", "2", "--sequence-length", "32"]
        given = str(self.text if domain is None else domain)
        return ["derive", self.base if model is None else model, "--for", given, *small, *more, "-o", output]

    def derive_bare(self, *more: object) -> list:
        return ["derive", self.base, *more, "-o", "out"]

    def evaluate(self, *more: object, model: object = None, task: str | None = None) -> list:
        task = f"perplexity:{self.text}" if task is None else task
        return ["evaluate", self.child if model is None else model, "--task", task, "--limit", "200", *more]

    def generate(self, *more: object, model: object = None, prompt: str = "def f") -> list:
        few = [] if "--max-new-tokens" in more else ["--max-new-tokens", "2"]
        return ["generate", self.child if model is None else model, "-p", prompt, *few, *more]


@dataclass(frozen=True)
class Case:
    """One mistake: how its command line is made, what the message has to say, and the exit code."""

    name: str
    arguments: Callable[[Place], list]
    says: tuple[str, ...]
    code: int = 1


CASES: list[Case] = []


def bad(name: str, arguments: Callable[[Place], list], *says: str, code: int = 1) -> None:
    CASES.append(Case(name, arguments, says, code))


def bad_model(name: str, make: Callable[[Place, Path], object], *says: str) -> None:
    """A model that `derive` has to refuse; `make` writes it."""

    def arguments(place: Place) -> list:
        make(place, place.work / "model")
        return place.derive(model="model")

    bad(f"model: {name}", arguments, *says)


def _shrink(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :-1]


def _header_of_first(change: Callable[[dict], object]) -> Callable[[dict], object]:
    return lambda header: change(header[min(name for name in header if name != "__metadata__")])


def _int8(place: Place, target: Path) -> Path:
    return with_weight(place.base, target, f"model.layers.0.{Q_PROJ}", lambda t: t.to(torch.int8))


def _only_pickles(place: Place, target: Path) -> None:
    copied(place.base, target)
    (target / "model.safetensors").rename(target / "pytorch_model.bin")


def _index(place: Place, target: Path, shard: str) -> None:
    copied(place.base, target)
    (target / "model.safetensors").rename(target / "model-00001-of-00002.safetensors")
    weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors", "lm_head.weight": shard}
    (target / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _without_tokenizer(place: Place, target: Path) -> None:
    copied(place.base, target)
    for file in target.glob("token*"):
        file.unlink()


# Where a model comes from.
bad("model: missing path", lambda p: p.derive(model="no/such/model"), "'no/such/model'", "hub id")
bad("model: missing name", lambda p: p.derive(model="nosuch"), "'nosuch'", "'demo'")
bad("model: hub id without network", lambda p: p.derive(model="someone/model"), "someone/model", "the network")
bad("model: a name that is too long", lambda p: p.derive(model="x" * 300), "x" * 300)
bad("model: home of nobody", lambda p: p.derive(model="~nosuchuser/model"), "'~nosuchuser/model'", "no folder")
bad("model: a text file", lambda p: p.derive(model=p.write("model.txt", "hello")), "model.txt", "*.gguf")
bad("model: zero-byte GGUF", lambda p: p.derive(model=p.write("zero.gguf", "")), "zero.gguf")
bad("model: text as GGUF", lambda p: p.derive(model=p.write("text.gguf", "hello " * 99)), "text.gguf")
bad("model: GGUF cut short", lambda p: p.derive(model=p.write("cut.gguf", b"GGUF\3\0\0\0" + b"\xff" * 64)), "cut.gguf")
bad("model: missing GGUF", lambda p: p.derive(model="gone/model.gguf"), "'gone/model.gguf'")
bad("model: a sub-model", lambda p: p.derive(model=p.child), "already compressed", "export")
bad_model("empty folder", lambda p, t: t.mkdir(), "config.json", "not a Hugging Face model folder")
bad_model("only pickles", _only_pickles, "pytorch_model.bin", "safe_serialization")
bad_model("no weights", lambda p, t: replaced(p.base, t, "model.safetensors", None), "model.safetensors")
bad_model("truncated safetensors", lambda p, t: truncated(p.base, t), "bytes", "fetch it again")
bad_model("empty safetensors", lambda p, t: replaced(p.base, t, "model.safetensors", ""), "0 bytes")
bad_model(
    "header longer than the file",
    lambda p, t: replaced(p.base, t, "model.safetensors", b"\xff" * 7 + b"\0" + b"{}"),
    "not a whole safetensors file",
)
bad_model(
    "header that lies about the end",
    lambda p, t: with_header(p.base, t, _header_of_first(lambda e: e.update(data_offsets=[0, 10**9]))),
    "model.safetensors",
    "fetch it again",
)
bad_model(
    "header that lies about a shape",
    lambda p, t: with_header(p.base, t, _header_of_first(lambda e: e.update(shape=[3, 5]))),
    "model.safetensors",
    "fetch",
)
bad_model("index with a missing shard", lambda p, t: _index(p, t, "gone.safetensors"), "gone.safetensors")
bad_model(
    "index that leads out", lambda p, t: _index(p, t, "../base/model.safetensors"), "../base", "not a file beside"
)
bad_model("config is no JSON", lambda p, t: replaced(p.base, t, "config.json", "{oops"), "config.json", "not JSON")
bad_model("config is a list", lambda p, t: replaced(p.base, t, "config.json", "[1]"), "config.json", "list")
bad_model(
    "unknown model_type",
    lambda p, t: with_json(p.base, t, "config.json", lambda c: c.update(model_type="llamma")),
    "llamma",
)
bad_model(
    "no model_type", lambda p, t: with_json(p.base, t, "config.json", lambda c: c.pop("model_type")), "model_type"
)
bad_model(
    "wrong type in config",
    lambda p, t: with_json(p.base, t, "config.json", lambda c: c.update(num_hidden_layers="three")),
    "num_hidden_layers",
)
bad_model(
    "own code",
    lambda p, t: with_json(
        p.base, t, "config.json", lambda c: c.update(model_type="mine", auto_map={"AutoConfig": "m.C"})
    ),
    "'mine'",
    "its own code",
)
bad_model(
    "gpt2",
    lambda p, t: save_tiny(t, "llama") and replaced_by_gpt2(t),
    "GPT2",
    "not supported",
)
bad_model("no tokenizer", _without_tokenizer, "tokenizer")
bad_model(
    "wrong shape in a block",
    lambda p, t: with_weight(p.base, t, f"model.layers.1.{Q_PROJ}", _shrink),
    f"model.layers.1.{Q_PROJ}",
    "[64, 63]",
    "[64, 64]",
)
bad_model(
    "wrong shape of the embedding",
    lambda p, t: with_weight(p.base, t, "model.embed_tokens.weight", _shrink),
    "model.embed_tokens.weight",
)
bad_model(
    "wrong shape of the head",
    lambda p, t: with_weight(p.base, t, "lm_head.weight", _shrink),
    "lm_head.weight",
)
for missing in (f"model.layers.2.{Q_PROJ}", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
    bad_model(
        f"{missing} is missing",
        lambda p, t, name=missing: with_weight(p.base, t, name, lambda tensor: None),
        missing,
        "fetch the model again",
    )
for damaged in ("model.embed_tokens.weight", f"model.layers.0.{Q_PROJ}", "model.layers.2.mlp.down_proj.weight"):
    bad_model(f"NaN in {damaged}", lambda p, t, name=damaged: with_nan(p.base, t, name), damaged, "NaN")
bad_model("NaN in the head", lambda p, t: with_nan(p.base, t, "lm_head.weight"), "lm_head.weight", "NaN")
bad_model("int8 weights", _int8, "int8", Q_PROJ)


# Options of derive.
for value in ("1.0", "-0.5", "nan"):
    bad(f"sparsity {value}", lambda p, v=value: p.derive("--sparsity", v), "sparsity", {"nan": "NaN"}.get(value, value))
bad("sparsity abc", lambda p: p.derive("--sparsity", "abc"), "--sparsity", code=2)
bad("samples 0", lambda p: p.derive_bare("--for", p.text, "--samples", "0"), "samples", "0")
bad(
    "more samples than text",
    lambda p: p.derive_bare("--for", p.text, "--samples", "100000", "--sequence-length", "64"),
    "6400000",
    "fewer samples",
)
bad("sequence length 1", lambda p: p.derive("--sequence-length", "1"), "sequence_length", "1")
bad("sequence length above the model's", lambda p: p.derive("--sequence-length", "300"), "300", "256")
bad("seed -1", lambda p: p.derive("--seed", "-1"), "seed", "-1")
bad("unknown method", lambda p: p.derive("--method", "wand"), "'wand'", "'wanda'")
bad("unknown budget", lambda p: p.derive("--budget", "uniforn"), "'uniforn'", "'uniform'")
bad("unknown granularity", lambda p: p.derive("--granularity", "per_row"), "per_row", "per_output")
bad("values int2", lambda p: p.derive("--values", "int2"), "'values'", "int2", "'base', 'int8', 'int4' or 'nl4'")
bad("values as base calls them", lambda p: p.derive("--values", "bf16"), "'values'", "bf16", "'base'")
bad("group size 48", lambda p: p.derive("--values", "int4", "--group-size", "48"), "group_size", "48", "32, 64 or 128")
bad("group size many", lambda p: p.derive("--values", "int4", "--group-size", "many"), "--group-size", code=2)
bad("group size of base values", lambda p: p.derive("--group-size", "64"), "group_size", "64", "leave it out")
bad("unknown device", lambda p: p.derive("--device", "gpu"), "'gpu'", "cpu")
bad("absent device", lambda p: p.derive("--device", "cuda:7"), "'cuda:7'", "cpu")
bad("threads 0", lambda p: p.derive("--threads", "0"), "--threads", code=2)
bad("missing data folder", lambda p: p.derive("--data", "nowhere"), "'nowhere'")

# Domains.
bad("no domain", lambda p: p.derive_bare(), "for", "python")
bad("unknown domain", lambda p: p.derive(domain="pythn"), "'pythn'", "'python'")
bad("empty domain", lambda p: p.derive(domain=""), "''")
bad("unknown domain with weight", lambda p: p.derive(domain="pythn=2"), "'pythn'")
for value in ("0", "-1", "nan", "much"):
    bad(f"domain weight {value}", lambda p, v=value: p.derive(domain=f"python={v}"), "'python'", value, "positive")
bad("domain given twice", lambda p: p.derive("--for", p.text), "text", "twice")
bad("domain without text", lambda p: p.derive(domain="math"), "'math'", "--data")


def _empty(place: Place) -> Path:
    (place.work / "empty").mkdir()
    return place.work / "empty"


bad("domain: empty folder", lambda p: p.derive(domain=_empty(p)), "empty", "source file")
bad("domain: home of nobody", lambda p: p.derive(domain="~nosuchuser/code"), "'~nosuchuser/code'")
bad("domain: a name that is too long", lambda p: p.derive(domain="z" * 300), "z" * 300)
bad("domain: text file", lambda p: p.derive(domain=p.write("notes.txt", "hello " * 99)), "notes.txt", ".jsonl")
bad("domain: empty JSONL", lambda p: p.derive(domain=p.write("a.jsonl", "")), "a.jsonl", "no line with text")
bad(
    "domain: broken JSONL",
    lambda p: p.derive(domain=p.write("b.jsonl", '{"text": "fine"}\n{"text": \n')),
    "b.jsonl",
    "line 2",
)
bad("domain: JSONL without text", lambda p: p.derive(domain=p.write("c.jsonl", '{"code": "x"}\n')), "c.jsonl", "'text'")
bad("domain: not gzip", lambda p: p.derive(domain=p.write("d.jsonl.gz", "hello")), "d.jsonl.gz")

# Recipes.
bad("recipe: missing", lambda p: p.derive("--recipe", "gone.yaml"), "'gone.yaml'", "No such file")
bad("recipe: a folder", lambda p: p.derive("--recipe", p.text), "text", "directory")
bad("recipe: not YAML", lambda p: p.derive("--recipe", p.write("r.yaml", "for: [python\nx: : :")), "r.yaml", "YAML")
bad("recipe: a list", lambda p: p.derive("--recipe", p.write("r.yaml", "- python\n")), "r.yaml", "mapping")
bad("recipe: empty", lambda p: p.derive("--recipe", p.write("r.yaml", "")), "r.yaml", "mapping")
bad(
    "recipe: unknown key",
    lambda p: p.derive("--recipe", p.write("r.yaml", "sparsty: 0.5\n")),
    "'sparsty'",
    "r.yaml",
    "sparsity",
)
bad("recipe: wrong type", lambda p: p.derive("--recipe", p.write("r.yaml", "seed: [1]\n")), "seed", "r.yaml")
bad(
    "recipe: unknown values",
    lambda p: p.derive("--recipe", p.write("r.yaml", "values: int5\n")),
    "values",
    "int5",
    "r.yaml",
)
bad(
    "recipe: groups, and a flag that leaves none",
    lambda p: p.derive("--values", "base", "--recipe", p.write("r.yaml", "values: int4\ngroup_size: 32\n")),
    "group_size",
    "32",
    "leave it out",
)
bad("recipe: bad domain", lambda p: p.derive_bare("--recipe", p.write("r.yaml", "for: 7\n")), "for", "7")


# Outputs.
def _interrupted(place: Place, state: str = "{}") -> list:
    place.write("out.partial/derivation.state.json", state)
    place.write("out.partial/derivation.lock", "")
    return place.derive()


bad("output: exists as a folder", lambda p: p.derive(output=_empty(p)), "empty'", "exists")
bad("output: exists as a file", lambda p: p.derive(output=p.write("file", "x")), "file'", "exists")
bad("output: below a file", lambda p: p.derive(output=p.write("file", "x") / "out"), "file/out'", "cannot be written")
bad("output: cannot be written", lambda p: p.derive(output="/proc/out"), "'/proc/out'", "cannot be written")
bad("output: name too long", lambda p: p.derive(output="y" * 300), "y" * 300, "too long")
bad("output: empty name", lambda p: p.derive(output=""), "output", "exists")
bad("output: here", lambda p: p.derive(output="."), "'.'", "exists")
bad("output: interrupted run", _interrupted, "'out.partial'", "--resume")
bad("output: missing", lambda p: ["derive", p.base, "--for", p.text], "--output", code=2)
bad(
    "resume: another recipe",
    lambda p: [*_interrupted(p, json.dumps({"recipe": {"sparsity": 0.25}})), "--resume"],
    "'out.partial'",
    "recipe",
    "delete the folder",
)
bad("resume: damaged state", lambda p: [*_interrupted(p, "{oops"), "--resume"], "derivation.state.json", "delete")
bad("resume: output is no sub-model", lambda p: p.derive("--resume", output=_empty(p)), "empty'", "no sub-model")
bad("resume: finished by another recipe", lambda p: p.derive("--resume", output=p.child), "child'", "another recipe")
bad("resume: partial is a file", lambda p: [*p.derive("--resume"), *_ignore(p.write("out.partial", "x"))], "out")


def _ignore(_: object) -> list:
    return []


# inspect
def _bad_inspect(name: str, make: Callable[[Place, Path], object], *says: str, verify: bool = False) -> None:
    def arguments(place: Place) -> list:
        make(place, place.work / "sub")
        return ["inspect", "sub", *(["--verify"] if verify else [])]

    bad(f"inspect: {name}", arguments, *says)


bad("inspect: missing", lambda p: ["inspect", "gone"], "'gone'")
bad("inspect: a file", lambda p: ["inspect", p.write("file", "x")], "file'")
bad("inspect: base model", lambda p: ["inspect", p.base], "base'", "secateur.json")
_bad_inspect("truncated manifest", lambda p, t: truncated(p.child, t, "secateur.json"), "secateur.json", "not JSON")
_bad_inspect("list as manifest", lambda p, t: replaced(p.child, t, "secateur.json", "[]"), "secateur.json")
_bad_inspect(
    "wrong type in the manifest",
    lambda p, t: with_json(p.child, t, "secateur.json", lambda c: c.update(sparsity="half")),
    "secateur.json",
    "'sparsity'",
)
_bad_inspect(
    "wrong type in a layer of the manifest",
    lambda p, t: with_json(p.child, t, "secateur.json", lambda c: c["layers"][0].update(shape=7, sparsity=None)),
    "secateur.json",
)
_bad_inspect(
    "manifest that leads out",
    lambda p, t: with_json(p.child, t, "secateur.json", lambda c: c["files"].update({"../x": "0"})),
    "'../x'",
)
_bad_inspect("missing shard", lambda p, t: replaced(p.child, t, FIRST_SHARD, None), FIRST_SHARD, "lacks")
_bad_inspect("truncated shard", lambda p, t: truncated(p.child, t, FIRST_SHARD), FIRST_SHARD, "cannot be read")
_bad_inspect(
    "newer version",
    lambda p, t: with_json(p.child, t, "config.json", lambda c: c["quantization_config"].update(version=99)),
    "version 99",
    "newer secateur",
)
for part in ("values", "bitmask", "row_offsets"):
    _bad_inspect(
        f"--verify, damaged {part}",
        lambda p, t, part=part: with_set_bytes(p.child, t, part),
        FIRST_SHARD,
        "SHA-256",
        verify=True,
    )


# evaluate, export and generate on a damaged sub-model
def _bad_child(verb: str, make: Callable[[Place, Path], object]) -> Callable[[Place], list]:
    def arguments(place: Place) -> list:
        make(place, place.work / "sub")
        verbs = {
            "evaluate": place.evaluate("-o", "out", model="sub"),
            "export": ["export", "sub", "-o", "out"],
            "generate": place.generate(model="sub"),
        }
        return verbs[verb]

    return arguments


for verb in ("evaluate", "export", "generate"):
    for part, problem in (("values", "NaN"), ("bitmask", "row_offsets do not match"), ("row_offsets", "row_offsets")):
        bad(
            f"{verb}: damaged {part}",
            _bad_child(verb, lambda p, t, part=part: with_set_bytes(p.child, t, part)),
            "packed weight 'model.layers.0.",
            problem,
        )
    bad(
        f"{verb}: truncated shard",
        _bad_child(verb, lambda p, t: truncated(p.child, t, FIRST_SHARD)),
        FIRST_SHARD,
    )
    bad(
        f"{verb}: missing shard",
        _bad_child(verb, lambda p, t: replaced(p.child, t, FIRST_SHARD, None)),
        FIRST_SHARD,
    )
    bad(
        f"{verb}: newer version",
        _bad_child(
            verb,
            lambda p, t: with_json(p.child, t, "config.json", lambda c: c["quantization_config"].update(version=99)),
        ),
        "version 99",
        "newer secateur",
    )
    bad(
        f"{verb}: lying shapes",
        _bad_child(
            verb,
            lambda p, t: with_json(
                p.child,
                t,
                "config.json",
                lambda c: c["quantization_config"]["shapes"].update({f"model.layers.0.{Q_PROJ}": [64, 128]}),
            ),
        ),
        f"model.layers.0.{Q_PROJ}",
    )

    for name, change, *says in (
        ("foreign values", {"values": "int3"}, "values 'int3'", "newer secateur"),
        ("groups of another size", {"values": "int4", "group_size": 7}, "group_size 7", "newer secateur"),
        ("integers that are floats", {"values": "int8", "group_size": 128}, "model.layers.0."),
        ("a dense list", {"dense": [1]}, "dense [1]", "newer secateur"),
    ):
        bad(
            f"{verb}: {name}",
            _bad_child(
                verb,
                lambda p, t, change=change: with_json(
                    p.child, t, "config.json", lambda c: c["quantization_config"].update(change)
                ),
            ),
            *says,
        )

bad("evaluate: missing model", lambda p: p.evaluate(model="nosuch"), "'nosuch'")
bad("evaluate: missing parent", lambda p: p.evaluate("--against", "nosuch"), "'nosuch'")
bad("evaluate: unknown task", lambda p: p.evaluate(task="perplexty:python"), "'perplexty:python'", "perplexity:python")
bad("evaluate: task without domain", lambda p: p.evaluate(task="perplexity"), "'perplexity'", "perplexity:python")
bad("evaluate: unknown domain", lambda p: p.evaluate(task="perplexity:pythn"), "'pythn'", "'python'")
bad("evaluate: domain without text", lambda p: p.evaluate(task="perplexity:math"), "'math'", "--data")
bad("evaluate: limit 0", lambda p: p.evaluate("--limit", "0"), "0")
bad("evaluate: limit 1", lambda p: p.evaluate("--limit", "1"), "1")
bad("evaluate: output exists", lambda p: p.evaluate("-o", _empty(p)), "empty'", "exists")
bad("evaluate: output below a file", lambda p: p.evaluate("-o", p.write("file", "x") / "out"), "file/out")
bad("evaluate: output cannot be written", lambda p: p.evaluate("-o", "/proc/out"), "/proc/out")
bad("evaluate: unknown device", lambda p: p.evaluate("--device", "gpu"), "'gpu'", "cpu")
bad("evaluate: missing data folder", lambda p: p.evaluate("--data", "nowhere"), "'nowhere'")
bad("evaluate: no task", lambda p: ["evaluate", p.child], "--task", code=2)
bad("evaluate: no model", lambda p: ["evaluate", "--task", "perplexity:python"], "models", code=2)
bad(
    "evaluate: NaN in the base model",
    lambda p: p.evaluate(model=with_nan(p.base, p.work / "model", "lm_head.weight")),
    "model",
)
bad(
    "evaluate: unknown model_type",
    lambda p: p.evaluate(
        model=with_json(p.base, p.work / "model", "config.json", lambda c: c.update(model_type="llamma"))
    ),
    "llamma",
)
bad(
    "generate: unknown model_type",
    lambda p: p.generate(
        model=with_json(p.base, p.work / "model", "config.json", lambda c: c.update(model_type="llamma"))
    ),
    "llamma",
)
bad(
    "evaluate: wrong type in config",
    lambda p: p.evaluate(
        model=with_json(p.base, p.work / "model", "config.json", lambda c: c.update(num_hidden_layers="three"))
    ),
    "num_hidden_layers",
)
bad(
    "evaluate: wrong shape in the base model",
    lambda p: p.evaluate(model=with_weight(p.base, p.work / "model", f"model.layers.1.{Q_PROJ}", _shrink)),
    f"model.layers.1.{Q_PROJ}",
)
bad(
    "generate: NaN in the base model",
    lambda p: p.generate(model=with_nan(p.base, p.work / "model", "lm_head.weight")),
    "NaN",
)
bad(
    "evaluate: missing weight in the base model",
    lambda p: p.evaluate(model=with_weight(p.base, p.work / "model", "lm_head.weight", lambda t: None)),
    "lm_head.weight",
)

GGUF = ["export", "--format", "gguf"]
bad("export: missing", lambda p: ["export", "gone", "-o", "out"], "'gone'")
bad("export: base model", lambda p: ["export", p.base, "-o", "out"], "base'", "secateur.json")
bad("export: unknown format", lambda p: ["export", p.child, "--format", "gguf2", "-o", "out"], "'gguf2'", "dense")
bad("export: type without gguf", lambda p: ["export", p.child, "--type", "f16", "-o", "out"], "'f16'", "gguf")
bad("export: no name of a GGUF", lambda p: ["export", p.child, "--format", "gguf", "-o", "out"], "out.gguf")
bad("export: a folder called .gguf", lambda p: ["export", p.child, "-o", "out.gguf"], "--format gguf")
bad("export: GGUF below a file", lambda p: [*GGUF, p.child, "-o", p.write("file", "x") / "out.gguf"], "file/out")
bad("export: GGUF cannot be written", lambda p: [*GGUF, p.child, "-o", "/proc/out.gguf"], "/proc/out")
bad("export: a split without a name", lambda p: [*GGUF, p.child, "-o", "out.gguf"], "no byte-level BPE with merges")
bad("export: output exists", lambda p: ["export", p.child, "-o", _empty(p)], "empty", "exists")
bad("export: output is the sub-model", lambda p: ["export", p.child, "-o", p.child], "child", "exists")
bad("export: output below a file", lambda p: ["export", p.child, "-o", p.write("file", "x") / "out"], "file/out")
bad("export: output cannot be written", lambda p: ["export", p.child, "-o", "/proc/out"], "/proc/out")


# generate
def _without_bos(place: Place) -> Path:
    model = copied(place.base, place.work / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("bos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    return model


bad("generate: empty prompt", lambda p: p.generate(model=_without_bos(p), prompt=""), "prompt is empty", "give some")
bad("generate: prompt too long", lambda p: p.generate(prompt="x" * 300), "300", "256", "shorten")
bad("generate: too many new tokens", lambda p: p.generate("--max-new-tokens", "999"), "999", "256", "fewer")
bad("generate: no new tokens", lambda p: p.generate("--max-new-tokens", "0"), "0", "at least 1")
bad("generate: temperature -1", lambda p: p.generate("--temperature", "-1"), "temperature", "-1")
bad("generate: temperature nan", lambda p: p.generate("--temperature", "nan"), "temperature", "nan")
bad("generate: seed out of range", lambda p: p.generate("--seed", str(2**80)), "seed", str(2**80))
bad("generate: threads 0", lambda p: p.generate("--threads", "0"), "--threads", code=2)
bad("generate: missing model", lambda p: p.generate(model="nosuch"), "'nosuch'")
bad("generate: prompt that is no text", lambda p: p.generate(prompt="a\udcffb"), "prompt", "UTF-8")
bad(
    "generate: suffix without its tokens",
    lambda p: p.generate("--suffix", "x"),
    "fill-in-the-middle",
    "leave the suffix",
)
bad("generate: no prompt", lambda p: ["generate", p.child], "--prompt", code=2)

# The rest.
bad("list: unknown kind", lambda p: ["list", "method"], "'method'", "'methods'")
bad("list: missing data folder", lambda p: ["list", "corpora", "--data", "nowhere"], "'nowhere'")
bad("list: nothing", lambda p: ["list"], "kind", code=2)
bad("unknown verb", lambda p: ["derife"], "'derife'", code=2)
bad("unknown option", lambda p: p.derive("--sparsty", "0.5"), "--sparsty", code=2)
bad("no verb", lambda p: [], "Usage", code=2)


def replaced_by_gpt2(folder: Path) -> Path:
    """Put a tiny GPT-2, whose weights are no nn.Linear, beside the tokenizer that is there."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=384, n_positions=256, n_embd=32, n_layer=2, n_head=2)
    (folder / "model.safetensors").unlink()
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_ends_in_one_clear_line(case: Case, inputs, work, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", _no_network)
    arguments = case.arguments(Place(inputs, work))
    with unchanged(inputs, work):
        outcome = run(arguments, capsys)
    check(case, outcome)


def check(case: Case, outcome: Outcome) -> None:
    """Check exit code and message."""
    assert outcome.code == case.code, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    if case.code == 1:
        # The forecast of memory and disk comes before a weight is read, and may stand above the error.
        lines = [line for line in outcome.err.splitlines() if not line.startswith(("needs about ", "takes "))]
        assert len(lines) == 1, lines
        assert lines[0].startswith("secateur: ")
    for text in case.says:
        assert text in outcome.err


def _no_network(*_: object, **__: object) -> str:
    raise ConnectionError("Cannot reach the hub\nand a second line")


INSTALLED = (
    "unknown verb",
    "unknown option",
    "sparsity 1.0",
    "recipe: unknown key",
    "inspect: base model",
    "list: unknown kind",
    "model: NaN in the head",
    "generate: damaged values",
)


def test_the_installed_program_does_the_same(inputs, work):
    """In a process of its own, where libraries could write to stderr."""
    cases = [case for case in CASES if case.name in INSTALLED]
    assert len(cases) == len(INSTALLED)
    commands = [[str(argument) for argument in case.arguments(Place(inputs, work))] for case in cases[:-1]]
    other = Place(inputs, work / "other")
    other.work.mkdir()
    commands.append([str(argument) for argument in cases[-1].arguments(other)])

    def start(number: int) -> subprocess.CompletedProcess[str]:
        folder = work if number < len(cases) - 1 else other.work
        program = Path(sys.executable).with_name("secateur")
        return subprocess.run(
            [program, *commands[number]], cwd=folder, capture_output=True, text=True, check=False, timeout=120
        )

    with unchanged(inputs, work), ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(start, range(len(cases))))
    for case, one in zip(cases, ended, strict=True):
        check(case, Outcome(one.returncode, one.stdout, one.stderr))
