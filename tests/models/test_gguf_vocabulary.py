"""The vocabulary of a GGUF, written from a tokenizer: it comes back as that tokenizer, or is refused."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers.integrations.gguf import gguf_tokenizer_mapping as reference

from secateur.errors import ModelError
from secateur.models.gguf_file import GGUFFile
from secateur.models.gguf_tokenizer import SPLITS, splitter, write_tokenizer
from secateur.models.gguf_vocabulary import probes, vocabulary_metadata
from secateur.models.gguf_writer import write_gguf
from tests.checkpoint.gguf_bases import save_base, save_sentencepiece
from tests.models.gguf_files import MERGES, TOKENS, token_types

CONFIG = {"vocab_size": 384, "eos_token_id": 258}


def base(folder: Path, pre: str = "smollm") -> Path:
    """A tokenizer with the tokens of `gguf_files`; the model beside it is not looked at."""
    folder.mkdir(parents=True)
    return save_base(folder, "llama", pre=pre)


def edited(folder: Path, **changes: object) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def keys(folder: Path, **config: object) -> dict:
    return vocabulary_metadata(folder, CONFIG | config, "llama")


def read_back(metadata: dict, folder: Path) -> Tokenizer:
    write_gguf(folder / "back.gguf", "llama", {"llama.context_length": 256, **metadata}, {})
    write_tokenizer(GGUFFile(folder / "back.gguf"), folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_keys_are_those_the_tokenizer_was_made_from(tmp_path):
    metadata = keys(base(tmp_path / "base"))
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    assert found["tokens"] == TOKENS and found["merges"] == MERGES
    assert found["token_type"] == token_types(TOKENS)
    roles = {key: value for key, value in found.items() if key.endswith(("_id", "_token"))}
    assert roles == {
        "bos_token_id": 257,
        "eos_token_id": 258,
        "eot_token_id": 257,  # an end by the model's generation_config.json that has another name than most
        "padding_token_id": 256,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    assert metadata["tokenizer.chat_template"].startswith("{% for m in messages %}")


@pytest.mark.parametrize("pre", [names[0] for names in SPLITS])
def test_the_split_is_found_and_comes_back(pre, tmp_path):
    folder = base(tmp_path / "base", pre)
    metadata = keys(folder)
    assert metadata["tokenizer.ggml.pre"] == pre
    back, original = read_back(metadata, tmp_path), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*probes(), Path(__file__).read_text(), "<|im_start|>x<tool> <|im_end|>"]:
        assert back.encode(text).ids == original.encode(text).ids, text


def test_probes_tell_all_known_splits_apart():
    texts = probes()
    words = [tuple(str(splitter(names[0]).pre_tokenizer.pre_tokenize_str(text)) for text in texts) for names in SPLITS]
    assert len(set(words)) == len(SPLITS)


# Ways to split that are nearly one that is known; some published tokenizers have them.
NEARLY = {
    "case": r"[^\r\n\p{L}\p{N}]?[\p{Lu}]*[\p{Ll}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}]+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "slash": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "marks": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "pairs": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "contractions": r"'s|'t|'re|'ve|'m|'ll|'d|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("name", NEARLY)
def test_a_split_that_is_nearly_a_known_one_is_refused(name, tmp_path):
    folder = base(tmp_path / "base", "qwen2")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    mapped = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(NEARLY[name]), "isolated"), mapped])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match="splits text in a way that has no name here"):
        keys(folder)


def test_whole_words_are_part_of_the_split(tmp_path):
    folder = base(tmp_path / "base", "llama-bpe")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    with pytest.raises(ModelError, match="no name here"):
        keys(edited(folder, model=model | {"ignore_merges": False}))


def test_an_added_token_that_takes_the_space_before_it_is_refused(tmp_path):
    folder = base(tmp_path / "base")
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    with pytest.raises(ModelError, match=r"'x <\|endoftext\|>' as"):
        keys(edited(folder, added_tokens=[token | {"lstrip": True} for token in added]))


@pytest.mark.parametrize("prefix", ["none", "metaspace", "prepended"])
def test_sentencepiece_comes_back(prefix, tmp_path):
    folder = save_sentencepiece(base(tmp_path / "base"), prefix=prefix)
    metadata = keys(folder)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is (prefix != "none")
    assert metadata["tokenizer.ggml.add_bos_token"] is True and metadata["tokenizer.ggml.unknown_token_id"] == 0
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    back, original = read_back(metadata, tmp_path), Tokenizer.from_file(str(folder / "tokenizer.json"))
    # transformers' own reading of the same keys
    name, vocabulary, _ = reference.get_gguf_tokenizer(str(tmp_path / "back.gguf"))
    theirs, _ = reference.convert_gguf_tokenizer(name, vocabulary)
    for text in [text for text in probes() if not text.startswith(" ")]:
        assert back.encode(text).ids == original.encode(text).ids, text
        if prefix != "none":  # which transformers does not read
            assert theirs.encode(text, add_special_tokens=False).ids == original.encode(text).ids[1:], text


def test_merges_that_sentencepiece_would_not_do_are_refused(tmp_path):
    folder = save_sentencepiece(base(tmp_path / "base"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = model["merges"]
    both = [merge for merge in merges if "".join(merge) == "def"]
    assert len(both) == 2
    for changed in (merges[1:], [one for one in merges if one != both[1]], sorted(merges, key=both[:1].__contains__)):
        with pytest.raises(ModelError, match="not those of sentencepiece"):
            keys(edited(folder, model=model | {"merges": changed}))


def test_ends_that_no_reader_knows_by_name_are_written(tmp_path):
    folder = base(tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256, 259, 10**6, "x", None]}))
    metadata = keys(folder, eos_token_id=257)
    # 256 and 258 have well-known names; 259 is <tool>, 257 <|im_start|>.
    ends = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")}
    assert ends == {"eos": 258, "eot": 259, "eom": 257}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    assert keys(folder)["tokenizer.ggml.eos_token_id"] == 258, "generation_config.json says so"


def test_a_chat_template_among_the_settings(tmp_path):
    folder = base(tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    several = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    for said, wanted in (("one", "one"), (several, "D"), (several[:1], None), (None, None)):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": said}))
        assert keys(folder).get("tokenizer.chat_template") == wanted


OTHER = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no tokenizer.json"),
        (lambda path: path.write_text("{}"), "cannot be read"),
        (lambda path: edited(path.parent, model=OTHER), "WordLevel"),
    ],
)
def test_other_tokenizers_are_refused(damage, message, tmp_path):
    folder = base(tmp_path / "base")
    damage(folder / "tokenizer.json")
    with pytest.raises(ModelError, match=message):
        keys(folder)


def test_more_tokens_than_rows(tmp_path):
    with pytest.raises(ModelError, match="a token 262 but the embedding only 200 rows"):
        keys(base(tmp_path / "base"), vocab_size=200)
