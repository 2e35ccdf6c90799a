"""Secateur: cut a small, coding-specific sub-model out of a large language model, and prove what it kept.

Importing this package imports neither torch nor transformers. Its one side effect: sub-models become readable through
`transformers.AutoModelForCausalLM.from_pretrained` (see `secateur._import_hook`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from secateur._import_hook import install

if TYPE_CHECKING:
    from secateur.calibration.calibrate import calibrate
    from secateur.checkpoint.export import export
    from secateur.checkpoint.inspect import inspect
    from secateur.evaluation.harness import evaluate
    from secateur.pruning.derive import derive
    from secateur.runtime.loading import load

__version__ = "0.1.0"
__all__ = ["__version__", "calibrate", "derive", "evaluate", "export", "inspect", "load"]

_HOME = {
    "calibrate": "secateur.calibration.calibrate",
    "derive": "secateur.pruning.derive",
    "evaluate": "secateur.evaluation.harness",
    "export": "secateur.checkpoint.export",
    "inspect": "secateur.checkpoint.inspect",
    "load": "secateur.runtime.loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'secateur' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


install()
