import pytest

from secateur.errors import ConfigError
from secateur.runtime.options import GenerationOptions, make_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, r"temperature is -0\.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1e-40}, "temperature is 1e-40"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1e-50}, "top_p is 1e-50"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"min_p": 1.0}, r"min_p is 1\.0"),
        ({"min_p": -0.1}, r"min_p is -0\.1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300"),
        ({"repetition_penalty": 1e30}, r"repetition_penalty is 1e\+30"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ["x", ""]}, "empty stop"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(ConfigError, match=message):
        GenerationOptions(**options)


def test_a_single_stop_string_is_one_string():
    assert GenerationOptions(stop="def").stop == ("def",)


def test_unknown_names_are_a_mistake_of_the_caller():
    with pytest.raises(TypeError, match="unknown option 'top': known are max_new_tokens, temperature"):
        make_options({"top": 3})
