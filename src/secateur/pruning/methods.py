"""All methods: importing this module registers them."""

from secateur.pruning import admm, scores, sparsegpt
from secateur.pruning.method import METHODS

__all__ = ["METHODS", "admm", "scores", "sparsegpt"]
