"""Log-likelihood of given tokens under a causal language model, without float32 logits of a whole sequence.

The body of the model runs once; the head then runs on a few positions at a time.
"""

import inspect

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import ModelError
from secateur.models.products import fast_products

# Float32 logits of one chunk of positions; logsumexp needs about the same again.
_LOGITS_BYTES = 128 * 2**20


@torch.inference_mode()
@fast_products()
def token_log_likelihood(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Return the natural logarithm of the probability of each token but the first, given the tokens before it.

    Parameters
    ----------
    model
        A causal language model in evaluation mode.
    token_ids
        Integer tensor [batch, length], no padding.

    Returns
    -------
    Tensor
        Float32 [batch, length - 1]; entry [b, t] belongs to `token_ids[b, t + 1]`. In nats, at most 0.
        NaN or infinite where the model's own logits are.

    Raises
    ------
    ModelError
        When `token_ids` is not two-dimensional or holds an id outside the vocabulary.
    """
    _check_token_ids(model, token_ids)
    token_ids = token_ids.to(model.device)
    batch, length = token_ids.shape
    if length < 2 or batch == 0:
        return torch.empty(batch, max(length - 1, 0))
    targets = token_ids[:, 1:].reshape(-1)
    hidden = _final_hidden_states(model, token_ids)
    if hidden is None:
        logits = model(input_ids=token_ids, use_cache=False).logits
        values = _pick(logits[:, :-1].reshape(len(targets), -1), targets)
    else:
        states = hidden[:, :-1].reshape(len(targets), -1)
        values = torch.empty(len(targets), device=states.device)
        step = _positions_per_chunk(model)
        for start in range(0, len(targets), step):
            chunk = slice(start, start + step)
            values[chunk] = _pick(_head(model, states[chunk]), targets[chunk])
    return values.reshape(batch, length - 1).float()


def _check_token_ids(model: PreTrainedModel, token_ids: Tensor) -> None:
    if token_ids.ndim != 2:
        raise ModelError(f"token ids have shape {list(token_ids.shape)}, needed is [batch, length]")
    vocabulary = model.config.get_text_config().vocab_size
    if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocabulary:
        raise ModelError(
            f"token ids run from {int(token_ids.min())} to {int(token_ids.max())}, but the model knows {vocabulary} "
            "tokens; use the tokenizer that belongs to this model"
        )


def _final_hidden_states(model: PreTrainedModel, token_ids: Tensor) -> Tensor | None:
    """Return what the body hands to the head [batch, length, width], or None when the head cannot be run apart.

    The model itself computes the logits of the last position in the same pass. Families scale or cap their logits in
    ways of their own, so `_head` is only trusted where it gives those same logits.
    """
    body = model.get_decoder()
    if body is model or model.get_output_embeddings() is None:
        return None
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: object, output: object) -> None:
        state = getattr(output, "last_hidden_state", None)
        if isinstance(state, Tensor):
            seen.append(state)

    handle = body.register_forward_hook(keep)
    try:
        last = model(input_ids=token_ids, use_cache=False, logits_to_keep=1).logits
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].shape[:2] != token_ids.shape or last.shape[1] != 1:
        return None
    ours = _head(model, seen[0][:, -1])
    return seen[0] if _same_logits(ours, last[:, -1]) else None


def _head(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return logits [positions, vocabulary] of hidden states [positions, width], capped as Gemma 2 caps them."""
    logits: Tensor = model.get_output_embeddings()(states)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _same_logits(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape or not bool(torch.isfinite(theirs).all()):
        return False
    # Rounding to bf16 differs with the number of rows; another scale or cap differs by far more than 2%.
    tolerance = 0.02 * theirs.abs().max() + 1e-6
    return bool((ours - theirs).abs().max() <= tolerance)


def _positions_per_chunk(model: PreTrainedModel) -> int:
    return max(1, int(_LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size)))


def _pick(logits: Tensor, targets: Tensor) -> Tensor:
    """Return float32 log-probabilities [positions] of `targets` [positions] from `logits` [positions, vocabulary]."""
    logits = logits.float()
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    return chosen - logits.logsumexp(-1)
