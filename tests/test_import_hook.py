"""Both orders of import, each in a process of its own, and what happens without secateur."""

import hashlib
import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from tests.pruning.tiny_derivation import derive_tiny, masks_and_weights
from tests.tiny import save_tiny

HASH = """
import hashlib, sys, torch
def digest(model):
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(n.encode() + t.view(torch.int16).numpy().tobytes() for n, t in state)).hexdigest()
"""
OPEN = "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\nprint(digest(model))"


@pytest.fixture(scope="module")
def submodel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hook")
    derive_tiny(save_tiny(folder / "base"), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def expected(submodel):
    state = AutoModelForCausalLM.from_pretrained(submodel.parent / "base").state_dict()
    for name, (mask, _) in masks_and_weights(submodel).items():
        state[name] = state[name].masked_fill(~mask, 0)
    import torch

    raw = b"".join(name.encode() + tensor.view(torch.int16).numpy().tobytes() for name, tensor in sorted(state.items()))
    return hashlib.sha256(raw).hexdigest()


ORDERS = {
    "secateur first": "import secateur\nfrom transformers import AutoModelForCausalLM\n",
    "transformers first": "import transformers.quantizers.auto\nfrom transformers import AutoModelForCausalLM\n"
    "import secateur\n",
    "never": "from transformers import AutoModelForCausalLM\n",
}


@pytest.fixture(scope="module")
def opened(submodel):
    """(exit code, standard output, standard error) by order of imports; the processes run side by side."""
    # The command line quiets transformers through its environment; a user's own process has no such setting.
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    started = {
        order: subprocess.Popen(
            [sys.executable, "-c", HASH + imports + OPEN, str(submodel)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for order, imports in ORDERS.items()
    }  # fmt: skip
    outputs = {order: process.communicate(timeout=300) for order, process in started.items()}
    return {order: (started[order].returncode, out.strip(), error) for order, (out, error) in outputs.items()}


@pytest.mark.parametrize("order", ["secateur first", "transformers first"])
def test_both_orders_of_import_open_a_submodel(opened, expected, order):
    code, digest, error = opened[order]
    assert code == 0, error
    assert digest == expected


def test_without_secateur_the_weights_are_wrong(opened, submodel, expected):
    """Why the model card's first lines tell to import it: if this ever fails, they can go."""
    code, digest, error = opened["never"]
    assert digest != expected
    assert code != 0 or "MISSING" in error
    assert (submodel / "README.md").read_text().split("---\n")[2].startswith("**Write `import secateur` before")


def test_importing_it_imports_nothing_heavy_and_installs_one_finder():
    code = """
import importlib, sys
import secateur
from secateur import _import_hook
_import_hook.install()
importlib.reload(secateur)
heavy = [name for name in ("torch", "transformers", "numpy", "safetensors") if name in sys.modules]
print(heavy, sum(type(finder).__name__ == "_RegistryFinder" for finder in sys.meta_path))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[] 1"
