"""What a sub-model's speed is compared with: its parent, run by torch, by llama.cpp or by our own engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.checkpoint.format import MANIFEST, read_json
from secateur.errors import ConfigError
from secateur.files import atomic_file, cache_folder

QUANTISATIONS = ("Q8_0", "Q4_K_M", "Q3_K_M", "Q2_K")


@dataclass(frozen=True)
class Peer:
    """Something to time: a name for the table, the kind of runner, and the model's path."""

    name: str
    kind: str
    path: str


def told_apart(peers: Sequence[Peer]) -> list[Peer]:
    """Return the peers, those whose names are not their own under their whole paths."""
    names = [peer.name for peer in peers]
    return [replace(peer, name=peer.path) if names.count(peer.name) > 1 else peer for peer in peers]


def find_peer(spec: str, submodel: Path) -> Peer:
    """Return the peer of a sub-model that `spec` names.

    Parameters
    ----------
    spec
        `native`, `torch` or `torch-int8`: the parent, dense; `native:FOLDER`: another sub-model; `llama.cpp`: the
        parent's GGUF as it is; `llama.cpp:Q8_0` (or Q4_K_M, Q3_K_M, Q2_K): quantised from it, once, into the cache;
        `llama.cpp:FILE.gguf`.

    Raises
    ------
    ConfigError
        When there is no such peer, or the parent is not at hand in the form that it needs.
    """
    kind, _, detail = spec.partition(":")
    if kind in {"native", "torch", "torch-int8"} and not detail:
        return Peer(f"parent, {kind}", kind, _parent(submodel))
    if kind == "native" and detail:
        return Peer(Path(detail).name, kind, detail)
    if kind == "llama.cpp":
        if detail.endswith(".gguf"):
            if not Path(detail).is_file():
                raise ConfigError(f"there is no file {detail!r} for llama.cpp to run; name an existing GGUF file")
            return Peer(f"llama.cpp {Path(detail).stem}", kind, detail)
        gguf = _parent_gguf(submodel)
        if not detail:
            return Peer(f"llama.cpp {gguf.stem}", kind, str(gguf))
        if detail in QUANTISATIONS:
            return Peer(f"llama.cpp {detail}", kind, str(_quantised(gguf, detail)))
    raise ConfigError(
        f"there is no peer {spec!r}: known are native, native:FOLDER, torch, torch-int8, llama.cpp, "
        "llama.cpp:FILE.gguf and " + ", ".join(f"llama.cpp:{name}" for name in QUANTISATIONS)
    )


def _parent(submodel: Path) -> str:
    manifest: dict[str, Any] = read_json(submodel / MANIFEST)
    recipe = manifest.get("recipe")
    name = recipe.get("model") if isinstance(recipe, dict) else None
    if not isinstance(name, str):
        raise ConfigError(f"{str(submodel)!r} does not say what it was derived from; time it without peers")
    return name


def _parent_gguf(submodel: Path) -> Path:
    name = _parent(submodel)
    if not name.endswith(".gguf") or not Path(name).exists():
        raise ConfigError(
            f"llama.cpp needs the parent as a GGUF file, and {name!r} is none here: name one as llama.cpp:FILE.gguf"
        )
    return Path(name)


def _quantised(gguf: Path, quantisation: str) -> Path:
    """Quantise a GGUF again with llama.cpp, unless that was done before."""
    try:
        import llama_cpp
    except ImportError:
        raise ConfigError("llama-cpp-python is not installed: pip install 'secateur[peers]'") from None
    target = cache_folder() / "peers" / f"{gguf.stem}-{gguf.stat().st_size}-{quantisation}.gguf"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, None)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantisation}")
    options.allow_requantize = True
    with atomic_file(target) as partial:
        if llama_cpp.llama_model_quantize(str(gguf).encode(), str(partial).encode(), options) != 0:
            raise ConfigError(f"llama.cpp cannot quantise {str(gguf)!r} to {quantisation}")
    return target
