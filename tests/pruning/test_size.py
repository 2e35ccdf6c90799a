"""The size of a sub-model: foretold from headers, and chosen by the user."""

import pytest
import torch

from secateur.checkpoint.format import MANIFEST, Encoding, read_json
from secateur.checkpoint.quantise import quantise
from secateur.config import make_recipe
from secateur.errors import ConfigError
from secateur.models.source import ModelFolder
from secateur.pruning.base import Base
from secateur.pruning.masks import Target, keep_top
from secateur.pruning.method import Pruned
from secateur.pruning.size import HIGHEST, Footprint, ways, weight_bytes
from secateur.pruning.weight import pack_weight
from tests.pruning.test_base import tied_base
from tests.pruning.tiny_derivation import derive_tiny
from tests.tiny import save_tiny

# So that weights outweigh tokenizer, headers and manifest.
SIZES = {"hidden_size": 512, "intermediate_size": 2048}


@pytest.fixture(scope="module", params=["llama", "qwen2"])  # the second has a tied head
def base(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(request.param) / "base", request.param, **SIZES)


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def opened(base):
    return Base.open(ModelFolder(base, "tiny"))


def recipe(**options):
    return make_recipe({"for": "python", **options})


@pytest.mark.parametrize(
    "options",
    [
        {"values": "base", "sparsity": 0.37},
        {"values": "int8", "sparsity": 0.0},
        {"values": "int8", "sparsity": 0.5, "granularity": "per_layer"},
        {"values": "nl4", "sparsity": 0.61, "group_size": 32},
        {"values": "nl4", "sparsity": 0.45, "budget": "measured"},
        {"values": "nl4", "sparsity": 0.45, "budget": "packed"},
    ],
)
def test_the_size_is_foretold(base, tmp_path, options):
    derive_tiny(base, tmp_path / "out", **options)
    foretold, found = Footprint.of(opened(base)).folder(recipe(**options)), size(tmp_path / "out")
    assert found <= foretold <= 1.02 * found + 100_000


@pytest.mark.parametrize("values", ["base", "int8", "nl4"])
def test_the_result_is_just_below_the_target(base, tmp_path, values):
    whole = Footprint.of(opened(base)).folder(recipe(values=values, sparsity=0.0))
    target = int(0.7 * whole)
    made = derive_tiny(base, tmp_path / "out", values=values, target_size=target)
    assert 0.95 * target - 100_000 <= size(tmp_path / "out") <= target
    chosen = read_json(tmp_path / "out" / MANIFEST)["recipe"]
    assert "target_size" not in chosen
    assert made.manifest["sparsity"] == pytest.approx(chosen["sparsity"], abs=1e-3)
    # One step less would be too much.
    less = recipe(values=values, sparsity=round(chosen["sparsity"] - 0.002, 4))
    assert Footprint.of(opened(base)).folder(less) > target


@pytest.mark.parametrize(("head", "matrices"), [(1, 1), (2, 2)])
def test_a_head_that_is_stored_beside_a_tied_embedding_counts(tmp_path, head, matrices):
    base = opened(tied_base(tmp_path, head))
    assert len(Footprint.of(base, base.stored_names()).whole) == matrices
    foretold = [Footprint.of(base, names).outer(recipe()) for names in (base.stored_names(), None)]
    assert foretold[0] == matrices * foretold[1]


KINDS = [
    ("base", None, "int8"),
    *(("int8", 128, embedding) for embedding in ("int8", "nl4")),
    *(("nl4", groups, embedding) for groups in (32, 64, 128) for embedding in ("int8", "nl4")),
]


def kinds(recipes):
    return [(one.values, one.group_size, one.embedding_values) for one in recipes]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_there_is_a_way_of_each_kind_with_the_lowest_sparsity(base, share):
    footprint = Footprint.of(opened(base))
    target = int(share * footprint.folder(recipe(values="base", sparsity=0.0)))
    found = ways(Footprint.of(opened(base)), recipe(target_size=target))
    assert kinds(found) == KINDS
    for one in found:
        assert footprint.folder(one) <= target
        assert one.target_size is None
        if one.sparsity:
            assert footprint.folder(one.model_copy(update={"sparsity": one.sparsity - 0.002})) > target
        # Each can be carried out again as it is.
        assert make_recipe(one.to_dict()) == one


def test_kinds_that_cannot_be_so_small_are_left_out(base):
    least = {kind: least_size(base, *kind) for kind in KINDS}
    target = (min(least.values()) + max(least.values())) // 2
    assert kinds(ways(Footprint.of(opened(base)), recipe(target_size=target))) == [
        kind for kind in KINDS if least[kind] <= target
    ]


def least_size(base, values, groups, embedding):
    chosen = {"embedding_values": embedding, "group_size": groups} if values != "base" else {}
    return Footprint.of(opened(base)).folder(recipe(values=values, sparsity=HIGHEST, **chosen))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"values": "int8"}, KINDS[1:3]),
        ({"values": "nl4"}, KINDS[5:7]),
        ({"values": "nl4", "embedding_values": "nl4"}, KINDS[6:7]),
        ({"values": "nl4", "group_size": 32, "embedding_values": "int8"}, KINDS[3:4]),
        ({"values": "base"}, KINDS[:1]),
        ({"embedding_values": "nl4"}, [KINDS[0], *KINDS[2::2]]),
    ],
)
def test_what_is_given_stays(base, options, expected):
    target = Footprint.of(opened(base)).folder(recipe(values="base", sparsity=0.6))
    assert kinds(ways(Footprint.of(opened(base)), recipe(target_size=target, **options))) == expected


def test_what_cannot_be_so_small_is_refused(base, tmp_path):
    for options, said in (({}, "nl4, embedding nl4,"), ({"values": "base"}, "base values")):
        with pytest.raises(ConfigError, match=rf"size of 0 MB cannot be reached: with {said} and 90% removed"):
            derive_tiny(base, tmp_path / "out", target_size=1000, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "bytes_"), [("300MB", 300_000_000), ("1.5 GB", 1_500_000_000), ("20kb", 20_000), (7, 7), ("12 B", 12)]
)
def test_sizes_are_read(given, bytes_):
    assert recipe(target_size=given).target_size == bytes_


@pytest.mark.parametrize("given", ["300", "MB", "-3MB", "3 TB", "", "1e3MB", 0, -5, 2.5, True])
def test_what_is_no_size_is_refused(given):
    with pytest.raises(ConfigError, match="option 'target_size' cannot be"):
        recipe(target_size=given)


def test_a_size_and_a_sparsity_are_one_too_many(tmp_path):
    said = "sparsity and target_size decide the same thing"
    with pytest.raises(ConfigError, match=said):
        recipe(target_size="3MB", sparsity=0.5)
    file = tmp_path / "recipe.yaml"
    file.write_text("for: python\nsparsity: 0.7\ntarget_size: 3MB\n")
    with pytest.raises(ConfigError, match=said):
        make_recipe({}, file)
    # A flag wins over a file.
    file.write_text("for: python\nsparsity: 0.7\n")
    assert make_recipe({"target_size": "3MB"}, file).target_size == 3_000_000
    file.write_text("for: python\ntarget_size: 3MB\n")
    found = make_recipe({"sparsity": 0.7}, file)
    assert (found.sparsity, found.target_size) == (0.7, None)


def test_bytes_that_are_asked_for_are_shared_out_by_bytes(base, tmp_path):
    options = {"values": "nl4", "embedding_values": "nl4"}
    target = Footprint.of(opened(base)).folder(recipe(**options, sparsity=0.45))
    best = recipe(preset="best", target_size=target)
    assert {one.budget for one in ways(Footprint.of(opened(base)), best)} == {"packed"}
    done = derive_tiny(base, tmp_path / "out", method="admm", budget="packed", target_size=target)
    assert done.manifest["recipe"]["budget"] == "packed"
    assert 0.97 * target <= size(tmp_path / "out") <= target


@pytest.mark.parametrize("values", ["base", "int8", "nl4"])
@pytest.mark.parametrize("rows", [7, 64])
def test_rows_of_their_own_length_are_counted(tmp_path, values, rows):
    """Where scores compete in the whole weight a row keeps more or less, and each ends with a whole byte."""
    encoding = Encoding("bf16") if values == "base" else Encoding(values, 64)
    weight = torch.randn(rows, 123, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for sparsity in (0.1, 0.5, 0.83):
        mask = keep_top(weight.abs().float(), Target(sparsity, "per_layer"))
        codes = quantise(weight, mask, None, values=encoding.values, group_size=64) if encoding.bits else None
        packed, _ = pack_weight(encoding, "w", Pruned(weight, mask), codes, weight.dtype)
        stored = sum(one.nbytes for one in vars(packed).values() if one is not None)
        assert stored <= weight_bytes(weight.shape, encoding, 2, sparsity, "per_layer") <= stored + rows + 64
