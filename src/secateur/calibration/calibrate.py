"""The public way to a calibration set: domains as a person writes them, and a tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from secateur.calibration.mixture import parse_mixture
from secateur.calibration.packing import CalibrationSet, build_calibration_set
from secateur.calibration.spans import Tokenizer


def calibrate(
    domains: str | Sequence[str],
    tokenizer: Tokenizer,
    *,
    samples: int = 128,
    sequence_length: int = 512,
    seed: int = 0,
    data: str | Path | None = None,
) -> CalibrationSet:
    """Draw a calibration set for one domain or a weighted mixture.

    Parameters
    ----------
    domains
        `"python"`, `"path/to/my/code"`, or a sequence such as `["python=0.8", "general=0.2"]` (weights by tokens).
    tokenizer
        The base model's tokenizer.
    samples, sequence_length
        Shape of the set, in sequences and tokens.
    seed
        Decides which text is drawn.
    data
        A folder that is tried before all other sources.

    Returns
    -------
    CalibrationSet
        Token ids int64 [samples, sequence_length] with their provenance and content hash.

    Raises
    ------
    UnknownNameError, ConfigError, CorpusError
        When a domain, weight, shape or corpus cannot be used.
    """
    items = [domains] if isinstance(domains, str) else list(domains)
    return build_calibration_set(
        parse_mixture(items),
        tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        data=None if data is None else Path(data),
    )
