"""The decoder blocks of a model and the weights in them that may be pruned, found by structure.

A block list is the one `nn.ModuleList` of the decoder with as many blocks as the config has layers. Inside a block
every `nn.Linear` is prunable and every one-dimensional parameter (norms, biases) is kept; a parameter of any other
shape belongs to something this version does not understand, and the model is refused with its name. Embeddings,
head and final norm lie outside the blocks: nothing is ever removed from them.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from secateur.errors import ModelError


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Attributes
    ----------
    index
        Position in the model, from 0.
    name
        Qualified name of the module, e.g. `model.layers.0`.
    prunable
        Names of its `nn.Linear` modules relative to the block, e.g. `self_attn.q_proj`, in the order of definition.
    """

    index: int
    name: str
    prunable: tuple[str, ...]

    def weight_name(self, linear: str) -> str:
        """Return the qualified name of the weight of one of `prunable`."""
        return f"{self.name}.{linear}.weight"


def find_blocks(model: PreTrainedModel) -> tuple[Block, ...]:
    """Return the decoder blocks of a causal language model (parameters may be on the meta device).

    Raises
    ------
    ModelError
        When the blocks cannot be told, or one holds a parameter that is neither a linear weight nor a vector.
    """
    config = model.config.get_text_config(decoder=True)
    n_layers = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and all(any(isinstance(part, nn.Linear) for part in child.modules()) for child in module)
    ]
    # A list inside a block of another candidate (experts of a one-layer model, say) is not the list of blocks.
    lists = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if len(lists) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        raise ModelError(
            f"the decoder blocks of {type(model).__name__} were not understood: expected one list of {n_layers} blocks "
            f"with nn.Linear weights, found {found}; this architecture is not supported"
        )
    ((list_name, blocks),) = lists
    return tuple(
        Block(index, f"{list_name}.{index}", _prunable(f"{list_name}.{index}", block))
        for index, block in enumerate(blocks)
    )


def embedding_weights(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the matrices [vocabulary, hidden_size] of embedding and head, tied or not."""
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    return tuple(f"{name}.weight" for name, module in model.named_modules() if any(module is one for one in ends))


def _prunable(block_name: str, block: nn.Module) -> tuple[str, ...]:
    linears = []
    for name, module in block.named_modules():
        if type(module) is nn.Linear:
            linears.append(name)
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() != 1:
                raise ModelError(
                    f"{block_name}.{name} ({type(module).__name__}) was not understood: its parameter "
                    f"{parameter_name!r} has shape {list(parameter.shape)} and is no nn.Linear weight; "
                    "this architecture is not supported"
                )
    return tuple(linears)
