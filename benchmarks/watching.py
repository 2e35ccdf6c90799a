"""Sums over what some linears of a model receive."""

import torch

FIRST = 100  # as how many tokens the first one of a sequence counts


def products(inputs):
    """Products of all pairs of features [features, features] of inputs [batch, length, features]."""
    rows, first = inputs.flatten(0, 1), inputs[:, 0]
    return rows.T @ rows + (FIRST - 1) * first.T @ first


def summed_inputs(model, names, token_ids, what):
    """Run text [samples, length] through a model; return {name: sum of what(inputs [batch, length, features])}."""
    sums, handles = {}, []

    def watch(name):
        def add(_module, arguments):
            sums[name] = sums.get(name, 0) + what(arguments[0].detach())

        return add

    for name in names:
        handles.append(model.get_submodule(name).register_forward_pre_hook(watch(name)))
    try:
        with torch.inference_mode():
            for part in token_ids.split(4):
                model(part, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return sums
