"""Ways to damage the folder of a model, each a seeded draw. Needs neither torch nor transformers.

What is drawn is as often a small, plausible lie (another shape, an offset moved by one) as noise: noise is mostly
refused at the first look, and says little about what comes after it.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

# What json.dumps does not write: numbers beyond its limits, and nesting as deep as a parser's stack.
RAW = {
    "<digits>": "9" * 5000,
    "<4000 digits>": "9" * 4000,
    "<infinity>": "1e999",
    "<tiny>": "1e-320",
    "<nan>": "NaN",
    "<minus zero>": "-0.0",
    **{f"<depth {depth}>": "[" * depth + "]" * depth for depth in (60, 300, 900, 960, 970, 980, 3000, 200_000)},
    "<deep object>": '{"a":' * 980 + "1" + "}" * 980,
}
NUMBERS = (0, -1, 1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 128, 255, 2**24 - 16, 2**24, 2**31, 2**63, -(2**63))
STRINGS = ("", "x", "\x00", "\ud800", "../x", "0", "é" * 300, "model.norm.weight", "bf16", "int4", "fp32", "llama3")
ODD = (*NUMBERS, *NUMBERS, *STRINGS, *RAW, 1.5, -0.5, 1e-30, 1e30, None, True, False, [], {}, [1], {"a": 1}, [[1, 2]])
# Keys that the reader knows and a config may lack, with values that it takes.
KNOWN = {
    "head_dim": 32, "sliding_window": 8, "use_sliding_window": True, "attention_bias": True, "mlp_bias": True,
    "layer_types": ["sliding_attention"], "rope_theta": 5e5, "partial_rotary_factor": 1.0, "num_experts": 0,
    "hidden_act": "silu", "tie_word_embeddings": True, "model_type": "qwen3", "rms_norm_eps": 1e-5,
    "rope_scaling": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}  # fmt: skip
UNREAD = ("secateur.json", "derivation.log.json")  # by whoever opens a model to run it
ITEM_TYPES = ("U8", "I8", "I16", "U16", "I32", "I64", "F16", "BF16", "F32", "F64", "U64", "BOOL", "F8_E4M3", "X9")
PATTERNS = (0, 0x7F80, 0x7FC0, 0xFF7F, 0x7C00, 2**62, 2**63)  # infinity, NaN and the like, and great offsets
NAMES = ("../config.json", "/etc/passwd", ".", "..", "", "a/b", "a\\b", "a\x00b", "x" * 300, "\ud800", "config.json")


def damage(folder: Path, draw: Random) -> str:
    """Damage one file, seldom two; return in words what was done."""
    done = draw.choice(WAYS)(folder, draw)
    if draw.random() < 0.25:
        # What is no longer JSON cannot be changed as such.
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError):
            done += "; " + draw.choice(WAYS)(folder, draw)
    return done


def file_of(folder: Path, draw: Random) -> Path:
    """Return a file, most often one that a reader trusts most."""
    weights = sorted(folder.glob("*.safetensors"))
    jsons = [file for file in sorted(folder.glob("*.json")) if file.name not in UNREAD]
    return draw.choice([*weights, *weights, *jsons])


def any_bytes(folder: Path, draw: Random) -> str:
    """Change bytes of a file, whatever they mean."""
    file = file_of(folder, draw)
    content = bytearray(file.read_bytes())
    # Half of the changes fall on a header, where most of a file's meaning is and few of its bytes.
    header = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content)
    limit = draw.choice((min(header, len(content)), len(content)))
    if not limit:
        return f"{file.name} is empty already"
    place, length = draw.randrange(limit), draw.choice((1, 4, 50, 4096))
    kind = draw.choice(("flip", "flip", "bytes", "burst", "zero", "cut", "extend", "insert", "remove"))
    if kind in {"flip", "bytes"}:
        for _ in range(draw.choice((1, 1, 4, 50))):
            place = draw.randrange(limit)
            content[place] = content[place] ^ 1 << draw.randrange(8) if kind == "flip" else draw.choice(b"\x00\xff9-}")
    elif kind in {"burst", "zero"}:
        length = min(length, len(content) - place)
        content[place : place + length] = draw.randbytes(length) if kind == "burst" else bytes(length)
    elif kind == "cut":
        del content[draw.choice((place, 0, 1, 7, 8, len(content) - 1)) :]
    elif kind == "extend":
        content += draw.choice((b"\x00", b"}", b"\n", draw.randbytes(64), bytes(70_000)))
    elif kind == "insert":
        content[place:place] = draw.randbytes(length)
    else:
        del content[place : place + length]
    file.write_bytes(content)
    return f"{kind} in {file.name} at {place}"


def whole_files(folder: Path, draw: Random) -> str:
    """Remove a file, empty it, swap it with another, or put a folder in its place."""
    file, other = file_of(folder, draw), file_of(folder, draw)
    kind = draw.choice(("remove", "empty", "swap", "copy", "folder"))
    content = file.read_bytes()
    if kind == "empty":
        file.write_bytes(b"")
    elif kind in {"swap", "copy"}:
        file.write_bytes(other.read_bytes())
        if kind == "swap":
            other.write_bytes(content)
    else:
        file.unlink()
        if kind == "folder":
            file.mkdir()
    return f"{kind} {file.name} {other.name if kind in {'swap', 'copy'} else ''}"


def read_shard(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def write_shard(file: Path, header: str, data: bytes, padding: int = 64) -> None:
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-(8 + len(text)) % padding)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def shard_header(folder: Path, draw: Random) -> str:
    """Make the header of a shard lie about one tensor."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    header, data = read_shard(file)
    name, other = draw.choice([one for one in header if one != "__metadata__"]), draw.choice(sorted(header))
    entry, change = header[name], draw.choice(HEADER_CHANGES)
    repeated = ""
    if change == "offset":
        entry["data_offsets"][draw.randrange(2)] = draw.choice((draw.choice(ODD), draw.randrange(len(data) + 2)))
    elif change == "shift":
        step = draw.choice((-64, -8, -2, -1, 1, 2, 8, 64))
        entry["data_offsets"] = [place + step for place in entry["data_offsets"]]
    elif change == "dtype":
        entry["dtype"] = draw.choice((*ITEM_TYPES, *ITEM_TYPES, *ODD))
    elif change == "shape":
        shape = entry["shape"]
        shapes = (shape[::-1], [*shape, 1], [1, *shape], shape[1:], [2 * shape[0], *shape[1:]], [n // 2 for n in shape])
        odd = (draw.choice(ODD), [draw.choice(ODD)], [2**62, 4, 0], [1] * 100, [0] * 40)
        entry["shape"] = draw.choice((*shapes, *odd))
    elif change == "same place":
        entry["data_offsets"] = header[other].get("data_offsets", [0, 0])
    elif change == "swap":
        header[name], header[other] = header[other], entry
    elif change == "rename":
        header[draw.choice((other, draw.choice(STRINGS), name + "x", name.replace("1", "0")))] = header.pop(name)
    elif change == "entry":
        header[name] = draw.choice(ODD)
    elif change == "key":
        entry[draw.choice((*entry, "extra"))] = draw.choice(ODD)
    elif change == "twice":
        repeated = f"{json.dumps(name)}:{json.dumps(header[other])},"
    elif change == "bits":  # the same size in another shape of the same tensor
        entry["dtype"] = {"U8": "I8", "BF16": "F16", "F16": "BF16", "I64": "F64"}.get(entry["dtype"], "U8")
    else:
        del header[name]
    write_shard(file, "{" + repeated + dump(header)[1:], data, draw.choice((64, 64, 64, 1)))
    return f"{change} of {name} in {file.name}"


HEADER_CHANGES = (
    *("offset", "shift", "dtype", "shape", "same place", "swap", "rename", "entry", "key", "twice", "bits", "drop"),
)


def tensor_content(folder: Path, draw: Random) -> str:
    """Change what a tensor holds, by the size of its elements."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    header, data = read_shard(file)
    name = draw.choice([one for one in header if one != "__metadata__" and header[one]["data_offsets"][1]])
    begin, end = header[name]["data_offsets"]
    width = {"I64": 8, "F32": 4, "BF16": 2, "F16": 2}.get(header[name]["dtype"], 1)
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 3))):
        place = begin + draw.randrange((end - begin) // width) * width
        old = int.from_bytes(content[place : place + width], "little")
        new = draw.choice((*PATTERNS, old + 1, old - 1, old * 2, draw.getrandbits(64)))
        content[place : place + width] = (new % 2 ** (8 * width)).to_bytes(width, "little")
    write_shard(file, json.dumps(header), bytes(content))
    return f"content of {name}"


def dump(content: Any) -> str:
    text = json.dumps(content)
    for marker, raw in RAW.items():
        text = text.replace(json.dumps(marker), raw)
    return text


def change_leaf(content: Any, draw: Random) -> str:
    """Change one value, at any depth, of JSON; return where."""
    key = draw.choice(sorted(content)) if isinstance(content, dict) else draw.randrange(len(content))
    value = content[key]
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        return f"{key}.{change_leaf(value, draw)}"
    choices = [draw.choice(ODD)] * 4 + [[value], {"a": value}, str(value)]
    if type(value) is int:
        choices += [value + 1, value - 1, value * 2, value // 2, float(value)]
    if isinstance(content, dict) and draw.random() < 0.15:
        del content[key]
        return f"{key} removed"
    content[key] = draw.choice(choices)
    return f"{key} = {str(content[key])[:40]!r}"


def json_values(folder: Path, draw: Random, pattern: str = "*.json") -> str:
    """Change values of a JSON file."""
    file = draw.choice([one for one in sorted(folder.glob(pattern)) if one.name not in UNREAD])
    content = json.loads(file.read_bytes())
    done = [change_leaf(content, draw) for _ in range(draw.choice((1, 1, 2))) if content]
    file.write_text(dump(content))
    return f"{file.name}: {', '.join(done)}"


def config_values(folder: Path, draw: Random) -> str:
    """Change values of the config, most often those at its top, or add what it does not say."""
    file = folder / "config.json"
    config = json.loads(file.read_bytes())
    if draw.random() < 0.4:
        key = draw.choice(sorted(KNOWN))
        config[key] = json.loads(json.dumps(KNOWN[key]))
        done = f"{key} added"
        if isinstance(config[key], dict | list) and draw.random() < 0.8:
            done += f", {change_leaf(config[key], draw)}"
    else:
        numbers = sorted(key for key, value in config.items() if isinstance(value, int | float))
        key = draw.choice(numbers)
        config[key] = draw.choice(ODD)
        done = f"{key} = {str(config[key])[:40]!r}"
    file.write_text(dump(config))
    return f"config.json: {done}"


def index_names(folder: Path, draw: Random) -> str:
    """Let the index name other files."""
    file = folder / "model.safetensors.index.json"
    if not file.exists():
        return json_values(folder, draw)
    index = json.loads(file.read_bytes())
    weights = index["weight_map"]
    name = draw.choice(sorted(weights))
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    weights[name] = draw.choice((*NAMES, *shards, draw.choice(ODD)))
    if draw.random() < 0.3:
        index["weight_map"] = dict.fromkeys(weights, weights[name])
    file.write_text(dump(index))
    return f"index: {name} in {str(weights[name])[:40]!r}"


def tokenizer_values(folder: Path, draw: Random) -> str:
    """Change a JSON file that belongs to the tokenizer or says which tokens end a text."""
    return json_values(folder, draw, draw.choice(("tokenizer*.json", "generation_config.json")))


def nested(folder: Path, draw: Random) -> str:
    """Put JSON of some depth into the place of a file, or of a header."""
    file, text = file_of(folder, draw), draw.choice([*RAW.values(), "[]", "{}", "null", "", '"x"', "{" * 10_000])
    text = draw.choice((text, f'{{"model_type": {text}}}', f'{{"weight_map": {text}}}'))
    if file.suffix == ".safetensors":
        write_shard(file, text, read_shard(file)[1])
    else:
        file.write_text(text)
    return f"{file.name} replaced by {text[:20]!r}"


# By how much there is to be found: weights and config before all else.
WAYS: list[Callable[[Path, Random], str]] = [
    *[any_bytes] * 5, *[shard_header] * 5, *[tensor_content] * 4, *[config_values] * 5, json_values, whole_files,
    *[index_names] * 2, *[tokenizer_values] * 2, nested,
]  # fmt: skip
