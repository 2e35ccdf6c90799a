"""What a sub-model is, how it was made, and whether its files are what they were."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from secateur.checkpoint.bitmask import SUFFIXES
from secateur.checkpoint.card import describe_coverage, describe_eight_bits, describe_more_tokens
from secateur.checkpoint.format import CARD, MANIFEST, Stored, check_quantization_config, read_json
from secateur.errors import CheckpointError
from secateur.files import is_file, sha256_file

_BYTES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}


@dataclass(frozen=True)
class Inspection:
    """The description of one sub-model.

    Attributes
    ----------
    path
        The folder.
    manifest
        The content of its `secateur.json`.
    bytes_by_part
        Bytes of `bitmask`, `values`, `row_offsets` and `scales` of the pruned weights, `dense tensors` (embeddings,
        head, norms, biases) and `other files`.
    bits_per_weight
        Bits of bitmask, values, offsets and scales for each prunable weight, removed ones included.
    stored
        How weights are stored.
    verified
        Whether every file was compared with its SHA-256; False when that was not asked for.
    """

    path: Path
    manifest: dict[str, Any]
    bytes_by_part: dict[str, int]
    bits_per_weight: float
    stored: Stored
    verified: bool

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.bytes_by_part.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "path": str(self.path),
            "bytes": self.total_bytes,
            "bytes_by_part": self.bytes_by_part,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "verified": self.verified,
            **self.manifest,
        }

    def describe(self) -> str:
        """Return a text for people."""
        manifest, calibration = self.manifest, self.manifest["calibration"]
        recipe = manifest["recipe"]
        kept, size = manifest["kept_weights"], manifest["prunable_weights"]
        lines = [
            f"sub-model of   {manifest['base_model'].get('name')}",
            f"for            {', '.join(map(str, recipe.get('for', ())))}",
            f"method         {recipe.get('method')}, {recipe.get('granularity')}, budget {recipe.get('budget')}",
            f"calibration    {calibration.get('samples')} x {calibration.get('sequence_length')} tokens, "
            f"seed {recipe.get('seed')}, SHA-256 {str(calibration.get('sha256'))[:16]}...",
            *self._describe_recovery(),
            f"kept           {kept:,} of {size:,} prunable weights (sparsity {manifest['sparsity']:.4f})",
            f"values         {self._describe_values()}, {self.bits_per_weight:.2f} bits for each prunable weight",
            *self._describe_vocabulary(),
            *self._describe_shortlist(),
            f"files          {'all match their SHA-256' if self.verified else 'hashes not compared (--verify does)'}",
            "",
            f"{'part':<16}{'MB':>10}{'bits/weight':>14}",
            *(self._describe_part(part) for part, n_bytes in self.bytes_by_part.items() if n_bytes),
            f"{'total':<16}{self.total_bytes / 1e6:>10.2f}",
            "",
            f"{'weight':<48}{'shape':>16}{'sparsity':>10}",
            *(
                f"{layer['name']:<48}{'x'.join(map(str, layer['shape'])):>16}{layer['sparsity']:>10.4f}"
                for layer in manifest["layers"]
            ),
        ]
        return "\n".join(lines)

    def _describe_values(self) -> str:
        texts = []
        for weights, where in ((self.stored.pruned, ""), (self.stored.dense, ", embedding and head ")):
            wide = "" if where else describe_eight_bits(self.manifest)
            groups = f" in groups of {weights.encoding.group_size}" if weights.encoding.bits else ""
            # Floats are dense only in another order of rows.
            known = weights.shapes and (groups or not where)
            texts += [f"{where}{weights.encoding.values}{groups}{wide}"] if known else []
        whole, total = len(self.stored.unmasked), len(self.stored.pruned.shapes)
        some = f", {whole} of {total} weights" if whole < total else ","
        return "".join(texts) + (f"{some} without a bitmask" if whole else "")

    def _describe_vocabulary(self) -> list[str]:
        vocabulary = self.manifest.get("vocabulary")
        if not isinstance(vocabulary, dict):
            return []
        more = describe_more_tokens(vocabulary)
        counts = [vocabulary.get("tokens"), vocabulary.get("of")]
        tokens, whole = (f"{count:,}" if isinstance(count, int) else str(count) for count in counts)
        return [f"vocabulary     {tokens} of {whole} tokens{more}"]

    def _describe_shortlist(self) -> list[str]:
        if self.stored.shortlist is None:
            return []
        trimmed = self.stored.shortlist
        vocabulary = self.stored.dense.shapes[trimmed.weight][0]
        coverage = describe_coverage(self.manifest.get("shortlist"))
        return [f"head           computes {trimmed.tokens:,} of {vocabulary:,} tokens{coverage}"]

    def _describe_recovery(self) -> list[str]:
        text = self.manifest.get("recovery")
        if not isinstance(text, dict):
            return []
        others = self.manifest.get("recipe", {}).get("recover_for")
        return [
            f"recovery       learnt from {text.get('samples')} x {text.get('sequence_length')} tokens"
            f"{' of ' + ', '.join(map(str, others)) if isinstance(others, list) and others else ''}, "
            f"SHA-256 {str(text.get('sha256'))[:16]}..."
        ]

    def _describe_part(self, part: str) -> str:
        bits = 8 * self.bytes_by_part[part] / max(self.manifest["prunable_weights"], 1)
        each = f"{bits:>14.3f}" if part in SUFFIXES else ""
        return f"{part:<16}{self.bytes_by_part[part] / 1e6:>10.2f}{each}"


def inspect(path: str | Path, *, verify: bool = False) -> Inspection:
    """Describe a sub-model from its manifest and the headers of its files.

    Parameters
    ----------
    path
        A sub-model folder.
    verify
        Compare every file with the SHA-256 in the manifest.

    Raises
    ------
    CheckpointError
        When the folder is no sub-model, is not whole, or a file differs from its hash.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    stored = check_quantization_config(read_json(folder / "config.json").get("quantization_config"))
    files = _file_hashes(folder, manifest)
    if verify:
        for name, expected in files.items():
            if (received := sha256_file(folder / name)) != expected:
                raise CheckpointError(
                    f"{str(folder / name)!r} is damaged: its SHA-256 is {received[:16]}..., the manifest says "
                    f"{expected[:16]}...; derive or fetch the sub-model again"
                )
    parts = _bytes_by_part(folder, files, stored)
    size = sum(out_features * in_features for out_features, in_features in stored.pruned.shapes.values())
    packed = sum(parts[suffix] for suffix in SUFFIXES)
    return Inspection(folder, manifest, parts, 8 * packed / max(size, 1), stored, verify)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of a sub-model's `secateur.json`; raises `CheckpointError` when it cannot be used."""
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is no folder: name a sub-model that `secateur derive` has written")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{str(folder)!r} has no {MANIFEST}: it is no sub-model, or it was not finished "
            "(`secateur derive --resume` goes on with an interrupted one)"
        )
    manifest = read_json(folder / MANIFEST)
    wanted = {
        "base_model": dict, "recipe": dict, "calibration": dict, "layers": list, "files": dict,
        "values": str, "sparsity": int | float, "prunable_weights": int, "kept_weights": int,
    }  # fmt: skip
    for key, kind in wanted.items():
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(
                f"{str(folder / MANIFEST)!r} has no usable {key!r}; derive or fetch the sub-model again"
            )
    if not all(_is_layer(layer) for layer in manifest["layers"]):
        raise CheckpointError(
            f"{str(folder / MANIFEST)!r} has a layer that is not described; fetch the sub-model again"
        )
    return manifest


def _is_layer(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("shape"), list)
        and isinstance(value.get("kept"), int)
        and isinstance(value.get("sparsity"), int | float)
    )


def _file_hashes(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    files: dict[str, str] = manifest["files"]
    for name, digest in files.items():
        # The names come from a file that anyone may have written: they must not lead out of the folder.
        if Path(name).name != name or not isinstance(digest, str):
            raise CheckpointError(f"{MANIFEST} names a file {name!r}, which is no plain file name; do not trust it")
        if not is_file(folder / name):
            raise CheckpointError(f"{str(folder)!r} lacks {name!r}; derive or fetch the sub-model again")
    if CARD not in files or "config.json" not in files:
        raise CheckpointError(f"{MANIFEST} of {str(folder)!r} does not name all files; fetch the sub-model again")
    return files


def _bytes_by_part(folder: Path, files: dict[str, str], stored: Stored) -> dict[str, int]:
    parts = dict.fromkeys((*SUFFIXES, "dense tensors", "other files"), 0)
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        if path.suffix == ".safetensors" and path.name in files:
            for key, n_bytes in _tensor_sizes(path):
                name, _, suffix = key.rpartition(".")
                pruned = suffix in SUFFIXES and name not in stored.dense.shapes
                parts[suffix if pruned else "dense tensors"] += n_bytes
                size -= n_bytes
        parts["other files"] += size
    return parts


def _tensor_sizes(path: Path) -> Iterator[tuple[str, int]]:
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                piece = file.get_slice(key)
                n_bytes = _BYTES.get(piece.get_dtype(), 0)
                for length in piece.get_shape():
                    n_bytes *= length
                yield key, n_bytes
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}); derive or fetch the sub-model again") from None
