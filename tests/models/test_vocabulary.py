"""The same model with fewer tokens."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from secateur.errors import ConfigError, ModelError
from secateur.models import vocabulary as vocabulary_module
from secateur.models.source import ModelFolder, load_tokenizer, resolve_model
from secateur.models.vocabulary import Pieces, Vocabulary, choose_vocabulary, smaller_model
from tests.calibration.texts import word_tokenizer
from tests.checkpoint.gguf_bases import save_sentencepiece
from tests.tiny import tiny_model

WORDS = ["value", "while", "naïve", "return", "    "]
SIZE = 300  # rows, more than the tokenizer has tokens
NEEDED = 256 + 2  # the bytes, <s> and </s>
FAMILIES = ["qwen2", "llama", "gemma2", "gpt_bigcode", "cohere"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


def tokenizer():
    return word_tokenizer(WORDS)


def save(folder, family="qwen2", **changes):
    ids = tokenizer().get_vocab()
    named = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": None}
    model = tiny_model(family, vocab_size=SIZE, dtype=torch.float32, **{**named, **changes})
    model.generation_config.eos_token_id = [ids["</s>"], ids["<s>"]]
    model.generation_config.bos_token_id, model.generation_config.pad_token_id = ids["<s>"], None
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return ModelFolder(folder, "tiny")


def needed():
    ids = tokenizer().get_vocab()
    return [*range(256), ids["<s>"], ids["</s>"]]


def smaller(folder, words, count=None):
    """Return the smaller model with some words, and the old ids of its tokens."""
    ids = tokenizer().get_vocab()
    others = [ids[word] for word in words]
    vocabulary = choose_vocabulary(folder, needed(), others, count or SIZE - 1)
    return smaller_model(folder, vocabulary), vocabulary.token_ids


def logits(folder, token_ids):
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_tokens_that_are_left(tmp_path, family):
    whole = save(tmp_path / "whole", family)
    made, kept = smaller(whole, ["while"])
    new = load_tokenizer(made)("while True: naïve").input_ids
    assert len(kept) == NEEDED + len("while") - 1
    torch.testing.assert_close(logits(made, new), logits(whole, kept[new].tolist())[:, kept], rtol=1e-5, atol=1e-6)


def test_a_head_with_a_bias_loses_the_same_rows(tmp_path):
    config = AutoConfig.for_model(
        "phi", hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=SIZE
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "whole")
    tokenizer().save_pretrained(tmp_path / "whole")
    whole = ModelFolder(tmp_path / "whole", "phi")
    made, kept = smaller(whole, [])
    torch.testing.assert_close(
        logits(made, [1, 2]), logits(whole, kept[[1, 2]].tolist())[:, kept], rtol=1e-5, atol=1e-6
    )


def test_a_token_that_is_kept_stays_one_and_one_that_is_not_is_split(tmp_path):
    made, kept = smaller(save(tmp_path / "whole"), ["value"])
    old, new = tokenizer(), load_tokenizer(made)
    text = "value while naïve value"
    assert [one.replace("\u0120", "") for one in new.tokenize(text) if "value" in one] == ["value", "value"]
    assert "while" in old.tokenize(text)
    assert "while" not in new.tokenize(text)
    assert new.decode(new(text).input_ids) == text
    words = old.convert_ids_to_tokens(kept.tolist())
    assert new.convert_ids_to_tokens(range(len(kept))) == words  # in the old order
    assert {"va", "val", "valu", "value"} <= set(words)  # without which the token could not be made


def test_tokens_are_taken_in_their_order_until_there_are_as_many(tmp_path):
    whole = save(tmp_path / "whole")
    _, kept = smaller(whole, ["while", "value"], NEEDED + 4)
    assert set(tokenizer().convert_ids_to_tokens(kept.tolist())) >= {"while"}
    assert len(kept) == NEEDED + 4
    _, kept = smaller(whole, ["while", "value", "wh"], NEEDED + 1)  # too few for either word
    assert set(tokenizer().convert_ids_to_tokens(kept.tolist())) >= {"wh"}


def test_configs_name_the_same_tokens(tmp_path):
    made, kept = smaller(save(tmp_path / "whole"), [])
    config, generation = (json.loads((made.path / f"{name}config.json").read_text()) for name in ("", "generation_"))
    tokens = load_tokenizer(made)
    assert config["vocab_size"] == len(kept)
    assert tokens.convert_ids_to_tokens([config["bos_token_id"], *generation["eos_token_id"]]) == ["<s>", "</s>", "<s>"]
    assert config.get("pad_token_id") is None
    assert (tokens.bos_token, tokens.bos_token_id) == ("<s>", config["bos_token_id"])


def test_what_a_tokenizer_puts_around_a_text_has_its_new_ids(tmp_path):
    from tokenizers.processors import Sequence, TemplateProcessing

    whole = save(tmp_path / "whole")
    changed = tokenizer()
    begin = changed.bos_token_id
    changed.backend_tokenizer.post_processor = Sequence(
        [TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])]
    )
    changed.save_pretrained(whole.path)
    settings = json.loads((whole.path / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {str(begin): {"content": "<s>", "special": True}}
    (whole.path / "tokenizer_config.json").write_text(json.dumps(settings))
    made, _ = smaller(whole, [])
    tokens = load_tokenizer(made)
    assert tokens("a").input_ids == [tokens.bos_token_id, tokens.convert_tokens_to_ids("a")]
    assert tokens.bos_token_id == NEEDED - 2


def test_merges_of_older_files_are_read(tmp_path):
    whole = save(tmp_path / "whole")
    path = whole.path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    path.write_text(json.dumps(content))
    made, _ = smaller(whole, ["while"])
    assert load_tokenizer(made).tokenize("while") == ["while"]


def test_it_is_made_once_and_other_tokens_make_another(tmp_path):
    whole = save(tmp_path / "whole")
    first, kept = smaller(whole, ["while"])
    before = (first.path / "model.safetensors").stat().st_mtime_ns
    again, _ = smaller(whole, ["while"])
    other, _ = smaller(whole, ["value"])
    assert again == first
    assert (first.path / "model.safetensors").stat().st_mtime_ns == before
    assert other.path != first.path
    assert resolve_model(first.path).weight_files() == [first.path / "model.safetensors"]  # an ordinary folder
    assert first.whole() == whole
    assert first.trimming.record == {"tokens": len(kept), "of": SIZE, "sha256": Vocabulary(kept, SIZE).sha256()}


@pytest.mark.parametrize(
    ("count", "message"), [(SIZE, "has 300 tokens"), (NEEDED - 1, f"without {NEEDED} of its tokens")]
)
def test_numbers_that_leave_all_or_too_few_are_refused(tmp_path, count, message):
    with pytest.raises(ConfigError, match=message):
        smaller(save(tmp_path / "whole"), [], count)


def test_other_kinds_of_tokenizers_are_refused(tmp_path):
    whole = save(tmp_path / "whole", "olmo")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1})))
    words.save_pretrained(whole.path)
    with pytest.raises(ModelError, match="'WordLevel'"):
        choose_vocabulary(whole, [0], [], 10)


def test_of_several_ways_to_make_a_token_the_one_that_is_taken_is_kept(tmp_path):
    """As in files that list every split of a word: `ab` + `c` comes first, but `b` + `c` is merged before it."""
    whole = save(tmp_path / "whole", "olmo")
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary = letters | {"bc": 256, "ab": 257, "abc": 258}
    merges = [("b", "c"), ("ab", "c"), ("a", "bc"), ("a", "b")]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(whole.path)
    vocabulary = choose_vocabulary(whole, range(256), [258], SIZE - 1)
    assert vocabulary.token_ids.tolist() == [*range(257), 258]
    assert load_tokenizer(smaller_model(whole, vocabulary)).tokenize("abc") == ["abc"]


def test_sentencepiece_of_byte_pairs(tmp_path):
    """With a class that does not take its pipeline from the file."""
    whole = save(tmp_path / "whole", "llama")
    save_sentencepiece(whole.path)
    old = load_tokenizer(whole)
    wanted = [token for token in old.get_vocab().values() if token < 290]
    needed_ = [old.bos_token_id, old.eos_token_id, *(i for t, i in old.get_vocab().items() if t.startswith("<0x"))]
    pieces = Pieces(whole)
    spaces = [index for token, index in old.get_vocab().items() if not token.strip("▁")]
    for others in (wanted, spaces):  # without others letters are written by their bytes
        vocabulary = choose_vocabulary(whole, sorted(one for one in needed_ if one is not None), others, 280)
        new, known = load_tokenizer(smaller_model(whole, vocabulary)), set(vocabulary.token_ids.tolist())
        for text in ("  two spaces", "naïve 日本", "a\n\tb", "é中"):
            assert new.decode(new(text).input_ids) == old.decode(old(text).input_ids)
            before, after = (one(text, add_special_tokens=False).input_ids for one in (old, new))
            assert sum(pieces.count(token, known) for token in before) == len(after)


def test_a_second_table_of_tokens_is_refused(tmp_path, monkeypatch):
    whole = save(tmp_path / "whole")
    real = vocabulary_module.load_skeleton

    def with_table(folder):
        model = real(folder)
        model.model.embed_tokens_per_layer = torch.nn.Embedding(SIZE, 8)
        return model

    monkeypatch.setattr(vocabulary_module, "load_skeleton", with_table)
    with pytest.raises(ModelError, match="embed_tokens_per_layer"):
        choose_vocabulary(whole, needed(), [], SIZE - 1)


def test_lists_of_tokens_are_left_out_and_what_is_no_token_is_no_id(tmp_path):
    whole = save(tmp_path / "whole")
    path = whole.path / "generation_config.json"
    content = json.loads(path.read_text()) | {"suppress_tokens": [1, 2], "forced_eos_token_id": True}
    path.write_text(json.dumps(content))
    config = json.loads((whole.path / "config.json").read_text())
    del config["vocab_size"]
    made, kept = smaller(whole, [])
    generation = json.loads((made.path / "generation_config.json").read_text())
    assert "suppress_tokens" not in generation
    assert generation["forced_eos_token_id"] is None
    assert json.loads((made.path / "config.json").read_text())["vocab_size"] == len(kept)


def test_another_chat_template_makes_another_folder(tmp_path):
    whole = save(tmp_path / "whole")
    (whole.path / "LICENSES").mkdir()
    first, _ = smaller(whole, [])
    (whole.path / "chat_template.jinja").write_text("{{ messages }}")
    second, _ = smaller(whole, [])
    assert second.path != first.path
    assert (second.path / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_damaged_folder_in_the_cache_is_made_again(tmp_path):
    whole = save(tmp_path / "whole")
    made, _ = smaller(whole, [])
    (made.path / "model.safetensors").write_bytes(b"x")
    again, _ = smaller(whole, [])
    assert resolve_model(again.path).path == made.path


def test_a_tokenizer_that_would_lose_text_leaves_nothing_behind(tmp_path):
    whole = save(tmp_path / "whole")
    letters = np.array([*range(200), *needed()[256:]], dtype=np.int64)  # not all bytes
    with pytest.raises(ModelError, match="leave --vocabulary out"):
        smaller_model(whole, Vocabulary(letters, SIZE))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_pieces_tell_how_long_a_text_becomes(tmp_path):
    whole = save(tmp_path / "whole")
    made, kept = smaller(whole, ["while"])
    text = "while value return while True: naïve    value"
    before, after = (load_tokenizer(one)(text).input_ids for one in (whole, made))
    pieces, known = Pieces(whole), set(kept.tolist())
    assert len(before) < len(after) == sum(pieces.count(token, known) for token in before)
    assert pieces.count(before[0], known) == 1
    assert pieces.size == SIZE
