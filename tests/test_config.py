import json

import pytest
import yaml
from pydantic import ValidationError

from secateur.config import make_recipe
from secateur.errors import ConfigError


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_an_option_wins_over_the_file_and_the_file_over_the_default(recipe_file):
    file = recipe_file("for: java\nsparsity: 0.6\nmethod: magnitude\npropagate: true\nseed: 4\n")
    recipe = make_recipe({"sparsity": 0.7, "method": None, "propagate": False, "seed": 0}, file)
    assert recipe.sparsity == 0.7
    assert recipe.method == "magnitude"
    assert recipe.propagate is False  # False and 0 are given, None is not
    assert recipe.seed == 0
    assert recipe.domains == ("java",)
    assert recipe.samples == 128
    assert make_recipe({"for": ["python"]}, file).domains == ("python",)


@pytest.mark.parametrize(
    ("given", "domains"),
    [
        ("python", ("python",)),
        (["python", "general=0.2"], ("python", "general=0.2")),
        ({"python": 0.8, "general": 0.2}, ("python=0.8", "general=0.2")),
    ],
)
def test_domains_in_three_forms(given, domains):
    assert make_recipe({"for": given}).domains == domains


def test_saved_and_read_again_it_is_the_same(recipe_file):
    recipe = make_recipe({"for": ["python", "java=2"], "sparsity": 0.55, "granularity": "per_layer", "seed": 9})
    assert make_recipe({}, recipe_file(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert "for" in recipe.to_dict()


def test_text_to_learn_from_is_of_a_recovery():
    given = {"for": "python", "recover": 1024}
    assert make_recipe(given).recover_for == ()
    assert make_recipe({**given, "recover_for": {"java": 2.0, "cpp": 1.0}}).recover_for == ("java=2.0", "cpp=1.0")
    assert make_recipe({**given, "recover_for": "java"}).to_dict()["recover_for"] == ["java"]
    with pytest.raises(ConfigError, match=r"option 'recover_for' cannot be .*of how many tokens with --recover"):
        make_recipe({"for": "python", "recover_for": ["java"]})
    with pytest.raises(ConfigError, match=r"option 'recover_for' cannot be .*--keep-quality"):
        make_recipe({**given, "recover_for": ["java"], "keep_quality": 0.9})


def test_flags_win_over_the_text_of_a_recovery(recipe_file):
    file = recipe_file("for: python\nrecover: 1024\nrecover_for: [java]\n")
    assert make_recipe({}, file).recover_for == ("java",)
    assert make_recipe({"recover": 0}, file).recover_for == ()
    assert make_recipe({"keep_quality": 0.9}, file).recover_for == ()
    assert make_recipe({"recover_for": ["cpp"]}, file).recover_for == ("cpp",)


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        make_recipe({"for": "python"}).sparsity = 0.1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sparsity", 1.0), ("sparsity", 1), ("sparsity", -0.1), ("sparsity", float("nan")), ("sparsity", float("inf")),
        ("sparsity", "x"), ("sparsity", [0.5]), ("samples", 0), ("samples", -1), ("samples", 1.5), ("samples", "many"),
        ("sequence_length", 1), ("sequence_length", 0), ("seed", -1), ("seed", 2**32), ("granularity", "per_row"),
        ("method", 3), ("method", ["wanda"]), ("propagate", "perhaps"), ("for", []), ("for", 3), ("for", [[1]]),
        ("values", "int2"), ("values", "bf16"), ("values", 8), ("group_size", 64),
        ("model", 7), ("sparsity", "0.5"), ("samples", True), ("seed", 3.0), ("propagate", "no"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_named_in_one_line(option, value):
    with pytest.raises(ConfigError) as caught:
        make_recipe({"for": "python", option: value})
    message = str(caught.value)
    assert message.startswith(f"option '{option}") or message.startswith("option 'domains")
    assert "cannot be" in message
    assert "\n" not in message
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("values", "group_size", "wanted"),
    [("base", None, None), ("int8", None, 128), ("int4", None, 64), ("int8", 32, 32), ("int4", 128, 128)],
)
def test_a_recipe_says_the_group_size_that_its_values_have(recipe_file, values, group_size, wanted):
    recipe = make_recipe({"for": "python", "values": values, "group_size": group_size})
    assert (recipe.to_dict()["values"], recipe.to_dict()["group_size"]) == (values, wanted)
    import yaml

    assert make_recipe({}, recipe_file(yaml.safe_dump(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("group_size", [0, 16, 65, 256, -64, "64", True, [64], 64.5])
def test_group_sizes_that_no_kernel_knows(group_size):
    with pytest.raises(ConfigError, match=r"option 'group_size' cannot be .*: input should be 32, 64 or 128"):
        make_recipe({"for": "python", "values": "int4", "group_size": group_size})


def test_groups_without_scales(recipe_file):
    with pytest.raises(
        ConfigError, match="'group_size' cannot be 64: only int8, int4 and nl4 values have groups; leave it"
    ):
        make_recipe({"for": "python", "group_size": 64})
    file = recipe_file("for: python\nvalues: int4\ngroup_size: 32\n")
    assert make_recipe({}, file).group_size == 32
    assert make_recipe({"values": "int8"}, file).group_size == 32
    with pytest.raises(ConfigError, match=r"'group_size' in recipe .* cannot be 32: only int8, int4 and nl4"):
        make_recipe({"values": "base"}, file)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999])
def test_sparsities_that_can_be_used(value):
    assert make_recipe({"for": "python", "sparsity": value}).sparsity == float(value)


def test_an_unknown_key_lists_the_known_ones(recipe_file):
    with pytest.raises(
        ConfigError, match=r"unknown option 'sparcity' in recipe .*known are preset, model, for, sparsity"
    ):
        make_recipe({}, recipe_file("for: python\nsparcity: 0.5\n"))


def test_a_recipe_for_nothing_is_an_error():
    with pytest.raises(ConfigError, match="option 'for' is missing: say what"):
        make_recipe({})


@pytest.mark.parametrize("text", ["- for\n- python\n", "python\n", "", "3: 4\n", "null\n"])
def test_yaml_that_is_no_mapping(recipe_file, text):
    with pytest.raises(ConfigError, match="is not a mapping of options"):
        make_recipe({}, recipe_file(text))


@pytest.mark.parametrize("text", ["for: [python\n", "a: b: c\n", "\tfor: python\n", "for: !!python/name:os.system x\n"])
def test_what_is_no_yaml(recipe_file, text):
    with pytest.raises(ConfigError, match="is not YAML") as caught:
        make_recipe({}, recipe_file(text))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        make_recipe({}, tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        make_recipe({}, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="is not YAML"):
        make_recipe({}, tmp_path / "binary.yaml")


def test_defaults_are_those_of_the_balanced_preset():
    recipe = make_recipe({"for": "python"})
    assert (recipe.method, recipe.granularity, recipe.sparsity) == ("admm", "per_output", 0.5)


def test_the_best_preset_counts_bytes_where_a_size_or_a_quality_is_asked_for(tmp_path):
    best = {"for": "python", "preset": "best"}
    assert make_recipe(best).budget == "measured"
    for asked in ({"target_size": "300MB"}, {"keep_quality": 0.9}):
        assert make_recipe(best | asked).budget == "packed"
        assert make_recipe(best | asked | {"budget": "measured"}).budget == "measured"
        assert make_recipe({"for": "python"} | asked).budget == "uniform"
    file = tmp_path / "recipe.yaml"
    file.write_text("for: python\nbudget: measured\ntarget_size: 300MB\n")
    assert make_recipe({}, file).budget == "measured"
    assert make_recipe({"preset": "best"}, file).budget == "packed"
    assert make_recipe({"sparsity": 0.5, "preset": "best"}, file).budget == "measured"


def test_a_preset_stands_for_options_that_others_win_over(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("for: python\npreset: best\nmethod: sparsegpt\n")
    assert make_recipe({"for": "python", "preset": "best"}).method == "admm"
    assert make_recipe({"for": "python", "preset": "fast"}) == make_recipe({"for": "python", "method": "wanda"})
    assert make_recipe({"for": "python", "preset": "balanced"}) == make_recipe({"for": "python"})
    assert make_recipe({"for": "python", "preset": "balanced"}).correction == 0
    assert make_recipe({"for": "python", "preset": "balanced", "correction": 0.25}).correction == 0.25
    assert make_recipe({}, file).method == "sparsegpt"
    balanced = make_recipe({"preset": "balanced"}, file)
    assert (balanced.method, balanced.correction) == ("admm", 0)
    assert balanced == make_recipe({"for": "python", "preset": "balanced"})
    saved = tmp_path / "saved.yaml"
    saved.write_text(json.dumps(make_recipe({"for": "python", "preset": "best"}).to_dict()))
    for preset in ("fast", "balanced", "best"):
        wanted = make_recipe({"for": "python", "preset": preset}).to_dict()
        assert make_recipe({"preset": preset}, file).to_dict() == wanted
        assert make_recipe({"preset": preset}, saved).to_dict() == wanted
    assert "preset" not in balanced.to_dict()
    with pytest.raises(ConfigError, match="unknown preset 'finest': known are fast, balanced, best"):
        make_recipe({"for": "python", "preset": "finest"})
