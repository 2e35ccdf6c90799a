"""Tokenizers made from a GGUF's vocabulary split as the published ones do."""

from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer
from transformers.integrations.gguf import gguf_tokenizer_mapping as reference

from secateur.errors import ModelError
from secateur.models.gguf_file import GGUFFile
from secateur.models.gguf_tokenizer import write_tokenizer
from secateur.models.source import load_tokenizer
from tests.models.gguf_files import MERGES, TOKENS, token_types

ODD = [
    "",
    "def f(x):\n    return 12 + 345\n\tdefdef",
    "e\u0301 é ﬁ 你好 👩‍👩‍👧 \u00a0\u2003 ½ Ⅷ ٣",
    "don't DON'T we'll",
    "\r\n\r\n  a   b ",
    "<|im_start|>user\nhi<|im_end|><tool> <|nothing|>",
]


def write(
    path: Path, pre: str | None, tokens: list[str] = TOKENS, merges: list[str] = MERGES, bos: bool | None = None
) -> GGUFFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(token_types(tokens))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    if bos is not None:
        writer.add_add_bos_token(bos)
    return _close(writer, path)


def _close(writer: gguf.GGUFWriter, path: Path) -> GGUFFile:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    return [text[begin:end] for _, (begin, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["a", " 12345", " don", "'t", " DON", "'", "T", "\n ", " x"]),
        ("smollm", ["a", " ", "1", "2", "3", "4", "5", " don", "'t", " DON", "'", "T", "\n ", " x"]),
        ("llama-bpe", ["a", " ", "123", "45", " don", "'t", " DON", "'T", "\n", " ", " x"]),
        ("qwen2", ["a", " ", "1", "2", "3", "4", "5", " don", "'t", " DON", "'T", "\n", " ", " x"]),
    ],
)
def test_splits(pre: str, expected: list[str], tmp_path: Path) -> None:
    write_tokenizer(write(tmp_path / "t.gguf", pre), tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert words(tokenizer, "a 12345 don't DON'T\n  x") == expected


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("text", ODD)
def test_text_comes_back(pre: str, text: str, tmp_path: Path) -> None:
    write_tokenizer(write(tmp_path / "t.gguf", pre, bos=False), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer(text)["input_ids"]
    back = tokenizer.decode(ids)
    # Qwen composes characters (NFC) before it splits.
    assert back == (text.replace("e\u0301", "é") if pre == "qwen2" else text)
    assert ids == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids


def test_control_tokens_are_special_and_user_defined_ones_only_whole(tmp_path: Path) -> None:
    write_tokenizer(write(tmp_path / "t.gguf", "smollm"), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer("<|im_start|><tool>def")["input_ids"]
    assert ids == [TOKENS.index(token) for token in ("<|im_start|>", "<tool>", "def")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool>def"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (257, 258)
    assert len(tokenizer) == TOKENS.index("12") + 1  # filler is no token


@pytest.mark.parametrize(
    ("pre", "stated", "adds"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False), ("qwen2", True, True)],
)
def test_begin_of_sequence(pre: str, stated: bool | None, adds: bool, tmp_path: Path) -> None:
    write_tokenizer(write(tmp_path / "t.gguf", pre, bos=stated), tmp_path)
    assert (load_tokenizer(tmp_path)("def")["input_ids"][0] == 257) is adds


def sentencepiece(path: Path, architecture: str) -> GGUFFile:
    gemma = architecture == "gemma3"
    space = "  " if gemma else "▁▁"
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        space,
        "▁a",
        "ab",
        "▁ab",
        "▁",
        "a",
        "b",
        "c",
    ]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 8]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(8)])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return _close(writer, path)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("text", ["ab abc", " ab", "a  b\n", "é你", "<s>ab"])
def test_sentencepiece_agrees_with_transformers(architecture: str, text: str, tmp_path: Path) -> None:
    file = sentencepiece(tmp_path / "t.gguf", architecture)
    write_tokenizer(file, tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    name, vocabulary, _ = reference.get_gguf_tokenizer(str(file.path))
    theirs, _ = reference.convert_gguf_tokenizer(name, vocabulary)
    # Theirs has no post-processor before it is wrapped; the beginning of sequence is compared below.
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text).ids == [1, *ids]
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)
    assert load_tokenizer(tmp_path)(text)["input_ids"] == [1, *ids]


@pytest.mark.parametrize("pre", [None, "some-new-one"])
def test_an_unknown_split_is_refused_by_name(pre: str | None, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=repr(pre)):
        write_tokenizer(write(tmp_path / "t.gguf", pre), tmp_path)


@pytest.mark.parametrize("merges", [["d"], ["d e f"], [" d"], ["d zz"]])
def test_merges_that_do_not_fit_are_refused(merges: list[str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="merges"):
        write_tokenizer(write(tmp_path / "t.gguf", "smollm", merges=merges), tmp_path)
