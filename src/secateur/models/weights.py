"""Reading a model piece by piece: a skeleton without weights, and tensors from safetensors when they are needed.

Nothing here holds more of a model than it was asked for; a file stays mapped only while a `WeightReader` is open.
"""

import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from secateur.errors import ModelError
from secateur.models.finite import all_finite
from secateur.models.source import ModelFolder, first_line

FLOAT_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def load_skeleton(folder: ModelFolder) -> PreTrainedModel:
    """Build the model of a folder with all parameters on the meta device; its buffers are real.

    Raises
    ------
    ModelError
        When transformers does not know the architecture, or the weights are already quantised or pruned.
    """
    from accelerate import init_empty_weights

    raw = json.loads((folder.path / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in raw:
        said = raw["quantization_config"]
        named = said.get("quant_method") if isinstance(said, dict) else said
        kind = str(named or "an unnamed method")
        remedy = (
            "export it with `secateur export --format dense` first" if kind == "secateur" else "name its dense parent"
        )
        raise ModelError(
            f"model {folder.name!r} is already compressed ({kind}), only dense models are pruned: {remedy}"
        )
    try:
        config = AutoConfig.from_pretrained(folder.path)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.tie_weights()  # moving parameters to the meta device has untied them
    except Exception as error:  # transformers raises anything here
        raise ModelError(f"model {folder.name!r} is no decoder that transformers knows: {first_line(error)}") from error
    if config.get_text_config(decoder=True) is not config:
        raise ModelError(
            f"model {folder.name!r} is multimodal ({config.model_type}), only text decoders are supported: "
            "name a text-only checkpoint"
        )
    model.eval()
    return model


class WeightReader:
    """The tensors of a safetensors folder, by the parameter names of the model.

    A context manager; tensors returned are copies, so they outlive the mapping of the files.
    """

    def __init__(self, folder: ModelFolder, model: PreTrainedModel | None = None) -> None:
        self.folder = folder
        self._prefix = f"{model.base_model_prefix}." if model is not None and model.base_model_prefix else ""
        self._files: dict[Path, Any] = {}
        self._stack = contextlib.ExitStack()
        self._where: dict[str, tuple[Path, str]] = {}
        for path in folder.weight_files():
            with self._opened(path) as file:
                self._where.update({self._model_name(key): (path, key) for key in file.keys()})  # noqa: SIM118

    def _model_name(self, key: str) -> str:
        """Checkpoints saved from the bare decoder lack its prefix; ours is the name inside the causal model."""
        if not self._prefix or key.startswith((self._prefix, "lm_head.")):
            return key
        return self._prefix + key

    def _opened(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"weights {str(path)!r} cannot be read: {first_line(error)}; fetch it again") from error

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()
        self._stack = contextlib.ExitStack()

    def names(self) -> list[str]:
        """Return the parameter names that the files hold, in the order of the files."""
        return list(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def _file(self, name: str) -> tuple[Any, str]:
        if name not in self._where:
            raise ModelError(
                f"model {self.folder.name!r} has no weight {name!r} in its files: they are incomplete, or name it in a "
                "way that is not known here; fetch the model again, or choose another architecture"
            )
        path, key = self._where[name]
        if path not in self._files:
            self._files[path] = self._stack.enter_context(self._opened(path))
        return self._files[path], key

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        file, key = self._file(name)
        return tuple(file.get_slice(key).get_shape())

    def mapped(self, name: str) -> Tensor:
        """Return a tensor whose pages are read when they are touched; use it only while the reader is open."""
        file, key = self._file(name)
        tensor: Tensor = file.get_tensor(key)
        if tensor.dtype not in FLOAT_TYPES:
            raise ModelError(
                f"weight {name!r} of model {self.folder.name!r} has type {tensor.dtype}; "
                "bfloat16, float16 and float32 are understood"
            )
        return tensor

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor."""
        return self.mapped(name).clone()

    def checked(self, name: str) -> Tensor:
        """Return a mapped tensor (see `mapped`); raises `ModelError` when it holds NaN or infinity."""
        tensor = self.mapped(name)
        if not all_finite(tensor):
            raise ModelError(
                f"weight {name!r} of model {self.folder.name!r} holds NaN or infinity; fetch the model again"
            )
        return tensor


def set_parameters(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors in the place of a module's parameters, by relative name; raises `ModelError` on a wrong shape."""
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        expected = getattr(owner, leaf).shape
        if tensor.shape != expected:
            raise ModelError(f"weight {name!r} has shape {list(tensor.shape)}, the config asks for {list(expected)}")
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))


def drop_parameters(module: nn.Module) -> None:
    """Put a module's parameters back onto the meta device, so that their memory is let go."""
    for owner in module.modules():
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, leaf, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
