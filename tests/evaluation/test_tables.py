import pytest

from secateur.evaluation.perplexity import DocumentLoss, PerplexityComparison, PerplexityResult
from secateur.evaluation.proportions import Share
from secateur.evaluation.results import Cell, Evaluation, ModelRecord
from secateur.evaluation.scores import Scores
from secateur.evaluation.statistics import Difference
from secateur.evaluation.tables import _ratio, format_perplexity, render


def result(perplexity, error):
    return PerplexityResult("python", (DocumentLoss("a", 1.0, 2, 3),), perplexity, error, 0.5)


def test_digits_follow_the_error():
    cells = [(7.364, 0.0285), (13.31, 0.03), (1234.5, 0.05), (2.0, None), (float("inf"), 0.1), (2.0, 0.0)]
    assert [format_perplexity(result(*cell)) for cell in cells] == [
        "7.36 ± 0.21",
        "13.31 ± 0.40",
        "1234 ± 62",
        "2",
        "inf",
        "2.00 ± 0.00",
    ]


def test_table():
    models = tuple(ModelRecord(name, name == "sub", {}, "bfloat16", 384) for name in ("base", "sub"))
    difference = Difference(0.5933, 0.02, 0.5539, 0.6313)
    ratio = PerplexityComparison("base", True, 9, difference, 1.81, 1.74, 1.88, difference)
    bits = PerplexityComparison("base", False, 9, None, None, None, None, Difference(0.1234, None, None, None))
    cells = (
        Cell("perplexity:python", "base", "", result(7.364, 0.0285)),
        Cell("perplexity:python", "sub", "", result(13.31, 0.03), ratio),
        Cell("perplexity:java", "base", missing="nothing at hand"),
        Cell("perplexity:java", "sub", "", result(9.0, None), bits),
    )
    tasks = ("perplexity:python", "perplexity:java")
    assert render(Evaluation(models, tasks, "base", cells, {}, {}, {})).splitlines() == [
        "task               base         sub",
        "-----------------  -----------  --------------------------------",
        "perplexity:python  7.36 ± 0.21  13.31 ± 0.40  x1.81 [1.74, 1.88]",
        "perplexity:java    -            9  +0.123 bits/byte",
        "",
        "±: one standard error, over documents",
        "x: perplexity over that of base on the same documents [95% interval]",
        "bits/byte: difference from base on the same documents [95% interval]; the tokens differ, so perplexities "
        "cannot be compared",
        "-: no text for perplexity:java: nothing at hand",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1.00"), (0.9968, "0.997"), (1.8921, "1.89"), (12.3, "12.3"), (123.4, "123")]
)
def test_ratios_have_three_digits(value, text):
    assert _ratio(value) == text


def test_models_that_were_asked_in_different_styles_are_told():
    def asked(styles):
        share = {"pass@1": Share(0.5, 0.3, 0.7)}
        cells = [
            Cell("humaneval", name, "", Scores("pass@1", share, 2, 2, {}, style=style))
            for name, style in styles.items()
        ]
        models = tuple(ModelRecord(name, False, {}, "", 9) for name in styles)
        return render(Evaluation(models, ("humaneval",), None, tuple(cells), {}, {}, {})).splitlines()[-1]

    assert asked({"base": "chat", "sub": "chat"}) == "asked: chat"
    assert asked({"base": "chat", "sub": "plain"}) == (
        "asked in different styles (chat: base; plain: sub): differences are also of that; "
        "--prompt-style makes them the same"
    )
