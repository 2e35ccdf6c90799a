from pathlib import Path

import pytest

from secateur.calibration.mixture import apportion, normalise_mixture, parse_mixture
from secateur.errors import ConfigError, UnknownNameError


def test_weights_are_scaled_to_one() -> None:
    assert parse_mixture(["python"]) == (("python", 1.0),)
    assert parse_mixture(["python=0.8", "general=0.2"]) == (("python", 0.8), ("general", 0.2))
    assert parse_mixture(["java=3", "cpp"]) == (("java", 0.75), ("cpp", 0.25))


def test_code_becomes_its_languages_and_adds_up() -> None:
    assert parse_mixture(["code"]) == tuple((name, 0.25) for name in ("python", "java", "cpp", "javascript"))
    mixed = parse_mixture(["python=0.5", "code=0.5"])
    assert dict(mixed) == {"python": 0.625, "java": 0.125, "cpp": 0.125, "javascript": 0.125}
    assert normalise_mixture(mixed) == mixed


def test_paths_may_hold_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run=3", "plain"):
        (tmp_path / name).mkdir()
    assert parse_mixture(["run=3"]) == (("run=3", 1.0),)
    assert parse_mixture(["run=3=1", "./plain=3"]) == (("run=3", 0.25), ("./plain", 0.75))
    with pytest.raises(ConfigError, match="'plain' is given twice"):
        parse_mixture(["./plain", "plain"])


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "-inf", "much", ""])
def test_weights_that_cannot_be(weight: str) -> None:
    with pytest.raises(ConfigError, match=r"the weight of domain 'python' is .*: it has to be a positive number"):
        parse_mixture([f"python={weight}"])


def test_items_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="no domain is given"):
        parse_mixture([])
    with pytest.raises(ConfigError, match="domain 'java' is given twice"):
        parse_mixture(["java", "java=2"])
    with pytest.raises(
        UnknownNameError, match=r"unknown domain 'javascrpt': did you mean 'javascript'\?.*existing path"
    ):
        parse_mixture(["javascrpt=0.5"])
    with pytest.raises(UnknownNameError, match="unknown domain '/no/such=path'"):
        parse_mixture(["/no/such=path"])
    with pytest.raises(UnknownNameError, match="unknown domain ''"):
        parse_mixture([""])


def test_apportion_gives_remainders_to_the_largest_then_the_first_name() -> None:
    assert apportion(10, [("a", 0.55), ("b", 0.25), ("c", 0.20)]) == [6, 2, 2]
    assert apportion(10, [("b", 1 / 3), ("a", 1 / 3), ("c", 1 / 3)]) == [3, 4, 3]
    for total in range(50):
        assert sum(apportion(total, [("a", 0.7), ("b", 0.2), ("c", 0.1)])) == total
