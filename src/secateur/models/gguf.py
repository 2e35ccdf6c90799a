"""From a GGUF file to an ordinary Hugging Face folder in bfloat16, made once and kept in the cache.

So there is one way to read weights: everything behind this module sees safetensors. It takes tensor by tensor, so that
a model larger than memory can be converted.
"""

import hashlib
import json
import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.errors import ModelError, OutputError
from secateur.files import atomic_folder, cache_folder, sha256_file
from secateur.models.gguf_config import build_config, build_generation_config
from secateur.models.gguf_file import GGUFFile, GGUFTensor
from secateur.models.gguf_names import EMBEDDING, EMBEDDING_NAME, HEAD, ROPE_FACTORS, Source, tensor_sources, undo
from secateur.models.gguf_tokenizer import write_tokenizer
from secateur.models.safetensors_writer import Lazy, write_safetensors

# Part of the cache's key: raise it when the converted folder of a file changes.
CONVERTER_VERSION = 1

logger = logging.getLogger(__name__)

# Two quantisations of one matrix agree row by row to 0.99 and better; two matrices do not.
TIED_COSINE = 0.99
TIE_SAMPLE_ROWS = 512

STALE_SECONDS = 24 * 3600


def cached_conversion(stem: str, sha256: str) -> Path:
    """Return where the conversion of the GGUF with this SHA-256 lies, or would lie."""
    key = hashlib.sha256(f"{sha256}:{CONVERTER_VERSION}".encode()).hexdigest()[:16]
    return cache_folder() / "models" / f"{stem}-{key}"


def convert_gguf(path: Path, stem: str | None = None) -> Path:
    """Return a Hugging Face folder with the model and the tokenizer of a GGUF file, converting it if need be.

    Parameters
    ----------
    path
        A GGUF file of architecture llama (Mistral included), qwen2, qwen3 or gemma3 (text).
    stem
        How the folder's name begins; the file's stem by default.

    Raises
    ------
    ModelError
        If the file is damaged, or is of a kind that is not understood. Nothing is left in the cache.
    OutputError
        If the cache cannot be written.
    """
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    target = cached_conversion(stem or path.stem, _hash(path))
    if target.is_dir():
        return target
    _remove_stale(target)
    file = GGUFFile(path)
    config = build_config(file)
    _check_vocabulary(file, config["vocab_size"])
    logger.info("converting %s, once; it is kept in %s, and can be deleted at any time", path, target)
    try:
        with atomic_folder(target) as folder:
            write_tokenizer(file, folder)
            _write_weights(file, config, folder)
            _write_json(folder / "config.json", config)
            _write_json(folder / "generation_config.json", build_generation_config(file))
    except OutputError:
        # Another process that converted the same file was faster; its folder is as good.
        if not target.is_dir():
            raise
    return target


def _write_weights(file: GGUFFile, config: dict[str, Any], folder: Path) -> None:
    """Write model.safetensors; sets `tie_word_embeddings` in `config` if the file's head is its embedding."""
    architecture = str(file.metadata["general.architecture"])
    stored_twice = not config["tie_word_embeddings"] and is_tied(file, file.tensors[EMBEDDING], file.tensors[HEAD])
    config["tie_word_embeddings"] = config["tie_word_embeddings"] or stored_twice
    sources = tensor_sources(architecture, config)
    _check(file, sources, ignored={ROPE_FACTORS, *([HEAD] if stored_twice else [])})
    if stored_twice:
        best = max((EMBEDDING, HEAD), key=lambda name: file.tensors[name].bits_per_weight)
        sources[EMBEDDING_NAME] = Source(best, sources[EMBEDDING_NAME].shape)
    tensors = {name: _lazy(file, source, config) for name, source in sources.items()}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


def is_tied(file: GGUFFile, embedding: GGUFTensor, head: GGUFTensor) -> bool:
    """Return whether embedding and head [vocabulary, hidden] are two quantisations of one matrix.

    Some quantisers store a tied matrix twice, once for each use. Rows are sampled evenly and compared by direction.
    """
    if embedding.shape != head.shape:
        return False
    cosines = []
    for row in np.linspace(0, embedding.shape[0] - 1, min(TIE_SAMPLE_ROWS, embedding.shape[0]), dtype=int):
        left, right = (file.rows(tensor, int(row), int(row) + 1)[0] for tensor in (embedding, head))
        norm = float(np.linalg.norm(left) * np.linalg.norm(right))
        if norm > 0:
            cosines.append(float(left @ right) / norm)
    return bool(cosines) and float(np.mean(cosines)) > TIED_COSINE


def _lazy(file: GGUFFile, source: Source, config: dict[str, Any]) -> Lazy:
    tensor = file.tensors[source.name]
    shift = -1.0 if source.change == "minus_one" else 0.0
    return Lazy(source.shape, torch.bfloat16, lambda: undo(file.bfloat16(tensor, shift), source.change, config))


def _check(file: GGUFFile, sources: dict[str, Source], ignored: set[str]) -> None:
    """Refuse a file that lacks a tensor, has one of another shape, or one that nothing reads."""
    for name, source in sources.items():
        tensor = file.tensors.get(source.name)
        if tensor is None:
            raise ModelError(f"{file.path} has no tensor {source.name} (for {name}); it is incomplete")
        if tensor.shape != source.shape:
            raise ModelError(
                f"{file.path}: tensor {source.name} has shape {list(tensor.shape)} where its metadata say "
                f"{list(source.shape)}; fetch it again"
            )
    unknown = sorted(set(file.tensors) - {source.name for source in sources.values()} - ignored)
    if unknown:
        raise ModelError(
            f"{file.path} has {len(unknown)} tensors that a plain {file.metadata['general.architecture']} has not "
            f"({', '.join(unknown[:3])}); give the model as a Hugging Face folder instead"
        )


def _check_vocabulary(file: GGUFFile, rows: int) -> None:
    """Refuse a file with more tokens than its embedding has rows."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > rows:
        raise ModelError(f"{file.path} has {len(tokens)} tokens but an embedding of {rows} rows; fetch it again")


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise ModelError(f"cannot read {path} ({error.strerror})") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _remove_stale(target: Path) -> None:
    """Remove what killed conversions of the same file left more than a day ago."""
    for partial in target.parent.glob(f"{target.name}.partial-*"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)
