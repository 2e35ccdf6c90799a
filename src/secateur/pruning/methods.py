"""All methods, in the order in which `secateur list methods` shows them: importing this module registers them."""

from secateur.pruning import scores, sparsegpt  # isort: skip
from secateur.pruning import admm  # isort: skip
from secateur.pruning.method import METHODS

__all__ = ["METHODS", "admm", "scores", "sparsegpt"]
