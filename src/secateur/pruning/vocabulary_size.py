"""How many tokens a sub-model of a given size should keep: bytes that tokens take, or that weights have instead.

Fewer tokens make text longer, and each token that it is longer costs what the model pays for one (it loses a little
more or less; docs/results/vocabulary.md). By how much text gets longer is counted on documents that the order of the
tokens was not made from; what else a sub-model loses is reckoned as for a size alone (`prices.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.calibration.mixture import Mixture
from secateur.calibration.vocabulary import expected_tokens, rank_tokens
from secateur.checkpoint.submodel import carried_files
from secateur.config import Recipe
from secateur.errors import ConfigError
from secateur.models.source import ModelFolder, load_tokenizer
from secateur.models.vocabulary import CONFIGS, TOKENIZER, TOKENIZER_CONFIG, Pieces, choose_vocabulary, copied_files
from secateur.pruning.base import Base, named_tokens
from secateur.pruning.execution import Execution
from secateur.pruning.prices import Prices
from secateur.pruning.size import Footprint, ways
from secateur.pruning.sizing import measured
from secateur.pruning.texts import Texts
from secateur.pruning.workspace import begun_recipe

_SHARES = (0.8, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1)  # of all tokens, that are tried
_ROUND = 1000


@dataclass(frozen=True)
class Count:
    """So many tokens.

    Attributes
    ----------
    tokens
        How many are kept; None: all.
    longer
        By which share that makes text longer.
    footprint
        Of the model with them.
    """

    tokens: int | None
    longer: float
    footprint: Footprint


def fitting_vocabulary(
    folder: ModelFolder, mixture: Mixture, recipe: Recipe, texts: Texts, execution: Execution
) -> int | None:
    """Return how many tokens to keep for the size that is asked for; None for all.

    A derivation that is resumed has as many as it was begun with.

    Parameters
    ----------
    folder
        The whole model.
    mixture
        The domains that a sub-model is for.
    recipe
        With a `target_size`.
    texts
        Calibration text in the tokens of the whole model.

    Raises
    ------
    ConfigError
        When nothing is as small.
    CorpusError
        When a domain has no text, or too few documents.
    ModelError
        When the tokenizer is none of byte pairs.
    ResourceError
        When the whole model does not fit into memory.
    """
    if execution.resume and (begun := begun_recipe(execution.target)) is not None:
        tokens = begun.get("vocabulary")
        return tokens if isinstance(tokens, int) else None
    base = Base.open(folder)
    counts = _counts(folder, base, mixture, recipe, execution)
    found = {one: smaller for one in counts if (smaller := _ways(one, recipe))}
    if not found:
        found = {counts[-1]: ways(counts[-1].footprint, recipe)}  # which says what the least is
    prices = measured(base, [way for smaller in found.values() for way in smaller], texts, execution, stage="prices")
    best = cheapest_count(found, prices)
    rows = base.model.config.get_text_config(decoder=True).vocab_size
    kept = "all" if best.tokens is None else f"{best.tokens:,} of"
    execution.say(f"keeps {kept} {rows:,} tokens, with which text is {best.longer:.2%} longer")
    return best.tokens


def cheapest_count(found: dict[Count, tuple[Recipe, ...]], prices: Prices) -> Count:
    """Return the number of tokens with which least is lost by the best of its ways."""

    def lost(count: Count) -> float:
        return min(map(prices.of, found[count])) + count.longer * prices.nats

    return min(found, key=lost)


def _ways(count: Count, recipe: Recipe) -> tuple[Recipe, ...]:
    try:
        return ways(count.footprint, recipe)
    except ConfigError:
        return ()


def _counts(folder: ModelFolder, base: Base, mixture: Mixture, recipe: Recipe, execution: Execution) -> Sequence[Count]:
    """Return numbers of tokens from all to a tenth, the most first."""
    whole = Footprint.of(base, base.stored_names())
    tokenizer, pieces = load_tokenizer(folder), Pieces(folder)
    seed, data = recipe.seed, execution.data
    execution.progress("counts", 0, len(_SHARES) + 1)
    always = named_tokens(folder.path)
    shares = expected_tokens(mixture, tokenizer, seed=seed, data=data)
    ranking = rank_tokens(mixture, tokenizer, always=always, seed=seed, data=data, leave_out=True)
    sizes = {path.name: path.stat().st_size for path in carried_files(folder.path)}
    stays = {TOKENIZER, TOKENIZER_CONFIG, *CONFIGS, *(path.name for path in copied_files(folder.path))}
    gone = sum(size for name, size in sizes.items() if name not in stays)
    counts = [Count(None, 0.0, whole)]
    for number, share in enumerate(_SHARES):
        execution.progress("counts", number + 1, len(_SHARES) + 1)
        unit = _ROUND if pieces.size > 10 * _ROUND else 1
        tokens = round(share * pieces.size / unit) * unit
        try:
            kept = choose_vocabulary(folder, ranking.needed, ranking.others, tokens, pieces)
        except ConfigError:  # too few for every text to be written
            break
        known = set(kept.token_ids.tolist())
        longer = sum(portion * (pieces.count(token, known) - 1) for token, portion in shares.items())
        smaller = whole.with_tokens(len(known), tokenizer=sizes.get(TOKENIZER, 0), gone=gone)
        counts.append(Count(tokens, longer, smaller))
    execution.progress("counts", len(_SHARES) + 1, len(_SHARES) + 1)
    return counts
