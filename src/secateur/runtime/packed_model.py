"""Opening a sub-model as a transformers model whose pruned weights stay packed, whatever its architecture.

transformers builds and fills the model, but finds no place for the weights that stay packed; then modules that compute
with them, where they lie in the mapped files, take the places of its own. The config is that of a quantised model, so
transformers refuses to save or to train it.
"""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from secateur.checkpoint.format import Stored
from secateur.checkpoint.hook import SecateurConfig, SecateurQuantizer, UnpackBitmask
from secateur.checkpoint.integers import damaged
from secateur.checkpoint.shards import PART_SUFFIXES, part_suffixes
from secateur.checkpoint.shortlist import SUFFIX as SHORTLIST
from secateur.checkpoint.shortlist import checked_shortlist
from secateur.errors import CheckpointError
from secateur.models.source import ModelFolder
from secateur.runtime.packed_matrix import PackedMatrix, lend_threads, remember_threads, return_threads
from secateur.runtime.sparse_linear import PackedEmbedding, SparseLinear

logger = logging.getLogger(__name__)

PACKED_METHOD = "secateur-packed"


def packed_config(folder: ModelFolder) -> Any:
    """Return the config of a sub-model, for `from_pretrained` to keep its weights packed."""
    config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False, local_files_only=True)
    config.quantization_config = {**config.quantization_config, "quant_method": PACKED_METHOD}
    return config


@register_quantization_config(PACKED_METHOD)
class PackedConfig(SecateurConfig):
    """`quantization_config` of a sub-model that is to stay packed."""

    def __init__(self, **raw: Any) -> None:
        super().__init__(**raw)
        self.quant_method = PACKED_METHOD
        self.dequantize = False  # the model is not one that transformers could save


@register_quantizer(PACKED_METHOD)
class PackedQuantizer(SecateurQuantizer):
    """Takes weights out of the model before transformers loads it, and puts packed modules in after that."""

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Note the precision of the model, which a model without parameters of its own could not tell."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: Any, *, checkpoint_files: list[str], **options: Any) -> None:
        super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **options)
        stored = self.quantization_config.stored
        self.tensors = _mapped_tensors(checkpoint_files)
        self.places = _places(model, stored, self.tensors)
        for name in self.places:
            module = model.get_submodule(name.removesuffix(".weight"))
            width = module.weight.shape[1]
            del module.weight
            # No parameter, so that transformers neither makes nor misses one; but modules initialise what they have.
            module.register_buffer("weight", torch.empty(0, width, dtype=self.dtype), persistent=False)
            if isinstance(module, nn.Embedding):
                module.padding_idx = None
        ties = model.all_tied_weights_keys
        model.all_tied_weights_keys = {
            target: source for target, source in ties.items() if not {target, source} & self.places.keys()
        }
        names = "|".join(map(re.escape, self.places))
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            rf"^({names})\.({'|'.join(PART_SUFFIXES)})$",
        }

    def get_load_operations(self) -> dict[str, Any]:
        """Name what unpacks the weights that cannot stay packed."""
        return {"dequantize": UnpackBitmask, "deserialize": UnpackBitmask}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        matrices = {source: self._matrix(source) for source in dict.fromkeys(self.places.values())}
        for name, source in self.places.items():
            path = name.removesuffix(".weight")
            module, matrix = model.get_submodule(path), matrices[source]
            if isinstance(module, nn.Embedding):
                packed: nn.Module = PackedEmbedding(matrix, module)
            else:
                packed = SparseLinear(matrix, module.bias)
            model.set_submodule(path, packed)
        del self.tensors
        # Whoever asks for the ties again would have parameters tied that are none any more.
        model.config.tie_word_embeddings = False
        remember_threads()
        model.register_forward_pre_hook(_before_step, with_kwargs=True)
        model.register_forward_hook(_after_step, always_call=True)
        return model.requires_grad_(False)

    def _matrix(self, name: str) -> PackedMatrix:
        stored = self.quantization_config.stored
        expected = part_suffixes(name, stored)
        parts = {one: self.tensors[f"{name}.{one}"] for one in PART_SUFFIXES if f"{name}.{one}" in self.tensors}
        if parts.keys() != set(expected):
            raise damaged(name, f"it has the parts {', '.join(sorted(parts))}, expected {', '.join(sorted(expected))}")
        weights, rows = stored.packed(name), None
        if (tokens := parts.pop(SHORTLIST, None)) is not None:
            shortlist = checked_shortlist(tokens.numpy(), stored.shortlist.tokens, weights.shapes[name][0], name)
            rows = torch.from_numpy(shortlist.rows())
        return PackedMatrix(parts, weights.shapes[name], weights.encoding, self.dtype, name, rows=rows)

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False

    def is_serializable(self) -> bool:
        """The folder is already there."""
        return False


def _before_step(model: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    given = (*arguments[:1], options.get("input_ids"), options.get("inputs_embeds"))
    tokens = next((one.shape[:2].numel() for one in given if isinstance(one, Tensor)), None)
    if tokens is not None and model.device.type == "cpu":
        lend_threads(tokens)


def _after_step(*_: object) -> None:
    return_threads()


def _mapped_tensors(files: Collection[str]) -> dict[str, Tensor]:
    """Return all tensors of safetensors files, read when they are touched; each keeps its file mapped."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    return tensors


def _places(model: Any, stored: Stored, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the parameters of a model that stay packed, and under which name each is stored: a tied head has none."""
    places: dict[str, str] = {}
    unpacked: list[str] = []
    for name, shape in {**stored.pruned.shapes, **stored.dense.shapes}.items():
        if f"{name}.values" not in tensors:
            continue  # transformers says that it is missing
        if _has_module(model, name, dense=name in stored.dense.shapes):
            _check_shape(name, shape, tuple(model.get_parameter(name).shape))
            places[name] = name
        else:
            unpacked.append(name)
    for pair in model.all_tied_weights_keys.items():
        for name, other in (pair, pair[::-1]):
            if name not in places or other in places or {other, f"{other}.values"} & tensors.keys():
                continue
            if _has_module(model, other, dense=name in stored.dense.shapes):
                places[other] = name
            else:
                unpacked.append(name)
                del places[name]
    if unpacked:
        logger.info("%d weights are unpacked: no packed module takes the place of %s", len(unpacked), unpacked[0])
    return places


def _has_module(model: Any, name: str, *, dense: bool) -> bool:
    """Return whether a packed module can take the place of the one that a parameter belongs to."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    # What a subclass of nn.Linear computes is its own affair; one of nn.Embedding stays and is given the rows.
    return leaf == "weight" and (type(module) is nn.Linear or (dense and isinstance(module, nn.Embedding)))


def _check_shape(name: str, said: tuple[int, int], shape: tuple[int, ...]) -> None:
    if said != shape:
        raise CheckpointError(
            f"packed weight {name!r} has shape {list(said)} in quantization_config and {list(shape)} in the model; "
            "derive or fetch the sub-model again"
        )
