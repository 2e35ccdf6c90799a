"""The format as transformers sees it: importing this module registers a quantizer that unpacks weights at load.

After loading the model is an ordinary dense one: its config no longer names the format, so that saving it again
writes a plain checkpoint.
"""

from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.checkpoint.format import QUANT_METHOD, check_quantization_config
from secateur.checkpoint.shards import PART_SUFFIXES, unpack_parts
from secateur.errors import CheckpointError


@register_quantization_config(QUANT_METHOD)
class SecateurConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a sub-model's config.json."""

    def __init__(self, **raw: Any) -> None:
        self.stored = check_quantization_config({**raw, "quant_method": QUANT_METHOD})
        self.raw = raw
        self.quant_method = QUANT_METHOD
        self.dequantize = True

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the dictionary; keyword arguments of `from_pretrained` do not belong to the format."""
        config = cls(**{key: value for key, value in config_dict.items() if key != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {"quant_method": QUANT_METHOD, **self.raw}


class UnpackBitmask(ConversionOps):  # type: ignore[misc]
    """Turn `weight.values` and the other parts of `weight`, as far as they are stored, into it."""

    def __init__(self, quantizer: "SecateurQuantizer") -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, model: Any, **_: Any) -> dict[str, Tensor]:
        """Check and unpack one weight into the model's precision; raises `CheckpointError` when it is damaged."""
        parts = {key.rpartition(".")[2].rstrip("$"): _single(value) for key, value in input_dict.items()}
        shape = tuple(model.get_parameter(full_layer_name).shape)
        stored = self.hf_quantizer.quantization_config.stored
        packed = stored.packed(full_layer_name)
        if (said := None if packed is None else packed.shapes[full_layer_name]) != shape:
            raise CheckpointError(
                f"packed weight {full_layer_name!r} has shape {said and list(said)} in quantization_config and "
                f"{list(shape)} in the model; derive or fetch the sub-model again"
            )
        return {full_layer_name: unpack_parts(full_layer_name, parts, stored, model.dtype).to(model.dtype)}


def _single(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor


@register_quantizer(QUANT_METHOD)
class SecateurQuantizer(HfQuantizer):  # type: ignore[misc]
    """Unpacks the weights of a sub-model while transformers loads it."""

    requires_calibration = True
    serialized_names = {"weight": [f"weight.{suffix}" for suffix in PART_SUFFIXES]}  # noqa: RUF012 - read by the base class

    def get_load_operations(self) -> dict[str, Any]:
        """Name the operation that turns stored tensors into parameters."""
        return {"dequantize": UnpackBitmask}

    def _process_model_before_weight_loading(self, model: Any, *, checkpoint_files: list[str], **_: Any) -> None:
        names: set[str] = set()
        for path in checkpoint_files:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        self.quantization_config.stored.refuse_twice(names)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # Saving the model again must not try to pack it: what is loaded is dense.
        model._weight_conversions = None
        return model

    @property
    def is_trainable(self) -> bool:
        """The unpacked model is an ordinary one."""
        return True

    def is_serializable(self) -> bool:
        """The unpacked model is an ordinary one."""
        return True
