"""A base model that is ready to be pruned: its skeleton, blocks and tensors, and what they are called."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.checkpoint.format import read_json
from secateur.errors import ModelError
from secateur.models.source import ModelFolder
from secateur.models.structure import Block, find_blocks
from secateur.models.weights import WeightReader, load_skeleton, set_parameters

TOKEN_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Base:
    """A base model that is ready to be pruned.

    Attributes
    ----------
    folder
        Where its files are.
    model
        Its skeleton, parameters on the meta device.
    blocks
        Its decoder blocks.
    reader
        Its tensors.
    """

    folder: ModelFolder
    model: PreTrainedModel
    blocks: tuple[Block, ...]
    reader: WeightReader

    @classmethod
    def open(cls, folder: ModelFolder) -> "Base":
        """Read config and headers, and find the blocks; raises `ModelError` for what is not understood."""
        model = load_skeleton(folder)
        return cls(folder, model, find_blocks(model), WeightReader(folder, model))

    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out_features, in_features] of each prunable weight by name, in the order of the model."""
        names = [block.weight_name(linear) for block in self.blocks for linear in block.prunable]
        shapes = {name: self.model.get_parameter(name).shape for name in names}
        return {name: (shape[0], shape[1]) for name, shape in shapes.items()}

    def dtype(self) -> torch.dtype:
        """The precision that blocks are run in: that of the first prunable weight."""
        with self.reader as reader:
            return reader.mapped(next(iter(self.shapes()))).dtype

    def computing_dtype(self) -> torch.dtype:
        """The precision that the whole model is run in: as blocks, but for float16, whose range is too short for it."""
        dtype = self.dtype()
        return torch.bfloat16 if dtype == torch.float16 else dtype

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Read all weights by the names of `stored_names`, in the precision that the whole model is run in."""
        dtype, found = self.computing_dtype(), {}
        for name in self.stored_names():
            with self.reader as reader:  # opened anew for each weight, so that no more than that is mapped
                found[name] = reader.read(name).to(device, dtype)
        return found

    def loaded(self, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
        """Return the model with these weights, by the names of `stored_names`; tied ones are shared."""
        model = load_skeleton(self.folder)
        set_parameters(model, dict(tensors))
        for name, source in dict(model.all_tied_weights_keys).items():
            if name not in tensors:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, model.get_parameter(source))
        return model

    def stored_names(self) -> list[str]:
        """Return the names of the parameters that have a tensor of their own, in the order of the model.

        A tied parameter has none, unless the files hold one that differs: transformers then unties the two.
        """
        tied = dict(self.model.all_tied_weights_keys) if self.model.config.tie_word_embeddings else {}
        with self.reader as reader:
            same = {
                name
                for name, source in tied.items()
                if name not in reader or (source in reader and torch.equal(reader.mapped(name), reader.mapped(source)))
            }
        return [name for name, _ in self.model.named_parameters(remove_duplicate=False) if name not in same]

    def outer_names(self) -> list[str]:
        """Return those of `stored_names` that lie outside the blocks."""
        inside = tuple(f"{block.name}." for block in self.blocks)
        return [name for name in self.stored_names() if not name.startswith(inside)]

    def head_name(self) -> str:
        """Return the name of the matrix that is the head, which may be the embedding.

        Raises
        ------
        ModelError
            When the model has none.
        """
        outer, ends = self.outer_names(), (self.model.get_output_embeddings(), self.model.get_input_embeddings())
        for end in ends:
            name = next((f"{name}.weight" for name, module in self.model.named_modules() if module is end), None)
            if name in outer and name is not None:
                return name
        raise ModelError(
            f"model {self.folder.name!r} has no head that could be trimmed: derive it without --trim-vocabulary"
        )

    def head_rows(self) -> int:
        """Return the number of tokens that the head computes."""
        return int(self.model.get_parameter(self.head_name()).shape[0])

    def named_tokens(self) -> list[int]:
        """Return the tokens that config and generation_config name, such as those that end a text."""
        return named_tokens(self.folder.path)


def named_tokens(folder: Path) -> list[int]:
    """Return the tokens that config and generation_config in a model's folder name, such as those that end a text."""
    contents = [read_json(path) for name in TOKEN_FILES if (path := folder / name).exists()]
    named = [value for content in contents for key, value in content.items() if key.endswith("_token_id")]
    listed = [one for value in named for one in (value if isinstance(value, list) else [value])]
    return [one for one in listed if type(one) is int]
