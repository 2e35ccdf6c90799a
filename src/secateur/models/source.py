"""What the user calls a model, resolved to a folder with config.json, safetensors and a tokenizer.

A name is a folder, a GGUF file, `demo`, or a hub id. Weights are only checked for wholeness here, never loaded; pickles
are never opened and no code that comes with a model is run.
"""

import difflib
import json
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import ModelError
from secateur.files import is_file, user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DEMO = "demo"

HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
HUB_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "LICENSE*", "NOTICE*", "USE_POLICY*"]
# Subfolders and consolidated files repeat the weights in a layout that is not transformers'.
HUB_IGNORED = ["*/*", "consolidated*"]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class Trimming:
    """What tokens were taken away from, see `models.vocabulary`.

    Attributes
    ----------
    origin
        Folder of the model with all its tokens.
    record
        What a manifest says: how many `tokens` are left `of` how many, and the `sha256` of their old ids.
    """

    origin: Path
    record: Mapping[str, Any]


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk.

    Parameters
    ----------
    path
        A folder with config.json, safetensors and tokenizer files.
    name
        What the user called it; for a GGUF the stem of the file.
    trimming
        Where it comes from when it is another model with fewer tokens; None for a model as its user has it.
    """

    path: Path
    name: str
    trimming: "Trimming | None" = None

    def whole(self) -> "ModelFolder":
        """Return the model that this one was made from: itself, or the one with all tokens."""
        return self if self.trimming is None else ModelFolder(self.trimming.origin, self.name)

    def weight_files(self) -> list[Path]:
        """Return the safetensors files, sorted: model.safetensors, or the shards that the index names."""
        return _weight_files(self.path)

    def is_submodel(self) -> bool:
        """Return whether this is a sub-model of ours, by what its config.json says."""
        quantization = read_json(self.path / "config.json").get("quantization_config")
        return isinstance(quantization, dict) and quantization.get("quant_method") == "secateur"


def resolve_model(name: str | Path) -> ModelFolder:
    """Return the folder of the model that `name` means, after checking that it is whole.

    Parameters
    ----------
    name
        A Hugging Face folder, a GGUF file (converted once, see `models.gguf`), `demo`, or a hub id `org/name` or
        `org/name@revision`. What exists on disk is never looked for on the hub; a folder called demo is `./demo`.

    Raises
    ------
    ModelError
        If there is no such model, or it is damaged, incomplete or of a kind that is not read.
    """
    text = str(name)
    path = user_path(text)
    if text == DEMO and isinstance(name, str):  # a folder of that name is meant by ./demo
        # Imported here because it imports torch by way of the converter.
        from secateur.models.demo import DEMO_NAME, demo_folder

        return cached_model(demo_folder, DEMO_NAME)
    if path.is_dir():
        return _checked(ModelFolder(path.resolve(), text))
    if path.is_file():
        return _from_file(path)
    hub_id = HUB_ID.fullmatch(text)
    if hub_id and isinstance(name, str) and not text.startswith(".") and not text.endswith(".gguf"):
        return _checked(ModelFolder(_download(hub_id["repository"], hub_id["revision"]), text))
    raise ModelError(_not_found(text))


def load_tokenizer(folder: ModelFolder | Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer in a model's folder; no code that comes with the model is run.

    Raises
    ------
    ModelError
        If there is no tokenizer, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    path = folder.path if isinstance(folder, ModelFolder) else folder
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers and transformers raise anything here
        raise ModelError(
            f"cannot load the tokenizer in {path} ({first_line(error)}); a tokenizer.json that belongs to the model is "
            "needed: fetch the model again"
        ) from error


def _from_file(path: Path) -> ModelFolder:
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"{path} is a file, but not a *.gguf; give the model's folder, or a GGUF file")
    from secateur.models.gguf import convert_gguf

    return cached_model(lambda: convert_gguf(path), path.stem)


def cached_model(make: Callable[[], Path], name: str) -> ModelFolder:
    """Return the model that `make` takes from the cache or puts there."""
    folder = make()
    try:
        return _checked(ModelFolder(folder, name))
    except ModelError:
        # It was whole when it was put there, and can be made again.
        shutil.rmtree(folder, ignore_errors=True)
        return _checked(ModelFolder(make(), name))


def _download(repository: str, revision: str | None) -> Path:
    """Return the snapshot of a hub repository, in the hub client's own cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED)
        )
    except Exception as error:  # the client's errors and those of its transport share no base
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"there is no folder {repository}, and the hub did not give {repository}{at} ({first_line(error)}); "
            "check the name and the network, or give a local folder, a GGUF file, or 'demo'"
        ) from error


def _checked(folder: ModelFolder) -> ModelFolder:
    """Return `folder` if it is whole and can be loaded without code of its own."""
    config = read_json(folder.path / "config.json")
    _refuse_own_code(folder.path, config)
    if (folder.path / "adapter_config.json").exists():
        raise ModelError(f"{folder.path} is an adapter, not a whole model; merge it into its base and save that")
    for file in folder.weight_files():
        _check_safetensors(file)
    return folder


def _refuse_own_code(path: Path, config: dict[str, Any]) -> None:
    if "auto_map" not in config:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{path} is a model of type {model_type!r} that brings its own code (auto_map in config.json), which is "
            "never run; choose a model that transformers knows"
        )


def _weight_files(path: Path) -> list[Path]:
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    index = path / INDEX_FILE
    if not index.is_file():
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise ModelError(
                f"{path} has its weights only as pickles ({pickles[0]}), which are never opened because they can run "
                "code; convert them where you trust them: model.save_pretrained(OUT, safe_serialization=True)"
            )
        raise ModelError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}; it holds no weights that can be read")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise ModelError(f"{index} has no weight_map that names its shards; fetch it again")
    files = []
    for shard in sorted(set(shards.values())):
        # The index comes with the model: it may only name files beside itself.
        if Path(shard).name != shard or shard in (".", "..") or "\\" in shard:
            raise ModelError(f"{index} names {shard!r}, which is not a file beside it")
        if not is_file(path / shard):
            raise ModelError(f"{path} lacks {shard!r}, which its index names; fetch the model again")
        files.append(path / shard)
    return files


def _check_safetensors(file: Path) -> None:
    """Refuse a file whose size is not what its header says: 8 + header + end of the last tensor."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{file} is not a whole safetensors file ({size:,} bytes); fetch it again")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} has a safetensors header that cannot be read; fetch it again") from error
    if not all(type(end) is int and 0 <= end < 2**63 for end in ends):
        raise ModelError(f"{file} has a safetensors header that puts a tensor nowhere; fetch it again")
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelError(f"{file} has {size:,} bytes where its header says {expected:,}; fetch it again")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model's folder."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} has no {path.name}; it is not a Hugging Face model folder") from error
    except OSError as error:
        raise ModelError(f"cannot read {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({first_line(error)}); fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__} where a JSON object is needed")
    return value


def _not_found(text: str) -> str:
    """Return what was looked for under a name that nothing answers to, and the nearest thing that exists."""
    path = user_path(text)
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        beside = []
    known = [DEMO, *beside] if path.parent == Path() else beside
    close = difflib.get_close_matches(path.name, known, n=1)
    hint = ""
    if close:
        hint = f"did you mean {str(path.parent / close[0])!r}? "
    return (
        f"there is no model {text!r}: no folder or file {path} exists; {hint}"
        f"give a Hugging Face folder, a *.gguf file, a hub id ORGANISATION/NAME, or {DEMO!r}"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, with the next one where it ends in a colon, or the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
