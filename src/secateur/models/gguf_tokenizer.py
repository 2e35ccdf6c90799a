"""`tokenizer.json` and its companions from the vocabulary in a GGUF.

The file names how text is split before merging (`tokenizer.ggml.pre`); a name that is not known here is refused, since
a wrong split gives a tokenizer that works and is wrong. The splits are those of the published tokenizers; llama.cpp's
table says which name means which.
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from secateur.errors import ModelError
from secateur.models.gguf_config import Metadata
from secateur.models.gguf_file import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

# tokenizer.ggml.pre: how text is split. GPT-2's own pattern is built into ByteLevel.
GPT2_PRE = ("gpt-2", "default")
DIGITS_PRE = ("smollm", "starcoder", "refact")
LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
QWEN2_PRE = ("qwen2",)
SPLITS = (GPT2_PRE, DIGITS_PRE, LLAMA3_PRE, QWEN2_PRE)

SPECIAL_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
SPACE = "\u2581"
FILLER = re.compile(r"\[PAD\d+\]")


def write_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and, if there is one, `chat_template.jinja` to `folder`.

    Raises
    ------
    ModelError
        If the vocabulary is missing or inconsistent, or of a kind that is not understood.
    """
    metadata = Metadata(file)
    tokens, kinds = _vocabulary(file)
    model = file.metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(file, tokens, kinds)
    elif model == "llama":
        tokenizer = _sentencepiece(file, metadata.architecture, tokens)
    else:
        raise ModelError(f"{file.path} has a tokenizer of kind {model!r}; 'gpt2' and 'llama' are understood")
    _add_tokens(tokenizer, tokens, kinds)
    bos, eos = _adds(file, "bos", model), _adds(file, "eos", model)
    _add_ends(tokenizer, metadata, tokens, bos, eos)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        # Loads tokenizer.json as it is; a model's own class would build another splitter.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bos,
        "add_eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.count("context_length"),
    }
    for role, name in SPECIAL_ROLES.items():
        token = metadata.token(role)
        config[name] = None if token is None else tokens[token]
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _vocabulary(file: GGUFFile) -> tuple[list[str], list[int]]:
    """Return all tokens and their kinds, in the order of their ids."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ModelError(f"{file.path} has no vocabulary (tokenizer.ggml.tokens); it is not a whole language model")
    kinds = file.metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not all(isinstance(kind, int) for kind in kinds):
        raise ModelError(f"{file.path} has {len(tokens)} tokens but not as many token types")
    return [str(token) for token in tokens], [int(str(kind)) for kind in kinds]


def _byte_level(file: GGUFFile, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """Return a byte-level BPE tokenizer (GPT-2 and its heirs)."""
    merges = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelError(f"{file.path} has no merges (tokenizer.ggml.merges) for its vocabulary")
    pre = file.metadata.get("tokenizer.ggml.pre")
    # llama.cpp's converter fills the vocabulary up to the size of the embedding; published tokenizers do not.
    vocabulary = {token: i for i, token in enumerate(tokens) if not (kinds[i] == UNUSED and FILLER.fullmatch(token))}
    pairs = [_pair(file, merge) for merge in merges]
    # Llama 3 looks a whole word up before it merges.
    tokenizer = Tokenizer(_bpe(file, vocabulary, pairs, ignore_merges=pre in LLAMA3_PRE))
    tokenizer.decoder = decoders.ByteLevel()
    known = [*itertools.chain(*SPLITS)]
    if not isinstance(pre, str) or pre not in known:
        raise ModelError(
            f"{file.path} splits text in a way called {pre!r} (tokenizer.ggml.pre); known are {', '.join(known)}; "
            "give the model as a Hugging Face folder instead"
        )
    split = splitter(pre)
    tokenizer.normalizer, tokenizer.pre_tokenizer = split.normalizer, split.pre_tokenizer
    return tokenizer


def splitter(pre: str) -> Tokenizer:
    """Return a tokenizer without vocabulary that normalises and splits text in a way of `SPLITS`."""
    tokenizer = Tokenizer(BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in GPT2_PRE:
        tokenizer.pre_tokenizer = byte_level
    elif pre in DIGITS_PRE:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT if pre in LLAMA3_PRE else QWEN2_SPLIT), "isolated")
        mapped = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, mapped])
    if pre in QWEN2_PRE:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(file: GGUFFile, architecture: str, tokens: list[str]) -> Tokenizer:
    """Return a sentencepiece BPE tokenizer; its merges follow from the vocabulary, best score first."""
    gemma = architecture == "gemma3"
    if gemma:
        # Runs of spaces are stored as spaces; the tokenizer sees them as the visible space.
        tokens = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
        # The scores of Gemma do not follow its order of merging; the ids do.
        scores: list[float] = [float(-i) for i in range(len(tokens))]
    else:
        stored = file.metadata.get("tokenizer.ggml.scores")
        if not isinstance(stored, list) or len(stored) != len(tokens) or not all(isinstance(s, float) for s in stored):
            raise ModelError(f"{file.path} has no scores (tokenizer.ggml.scores) for its vocabulary")
        scores = [float(str(score)) for score in stored]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = Metadata(file).token("unknown")
    bpe = _bpe(
        file,
        vocabulary,
        joins(vocabulary, scores),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown is None else tokens[unknown],
    )
    tokenizer = Tokenizer(bpe)
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first" if prefix else "never", split=False)
        if prefix:
            steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _pair(file: GGUFFile, merge: object) -> tuple[str, str]:
    left, space, right = str(merge).partition(" ")
    if not (left and space and right) or " " in right:
        raise ModelError(f"{file.path} has {merge!r} among its merges, where two tokens are needed; fetch it again")
    return left, right


def _bpe(file: GGUFFile, vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> BPE:
    try:
        return BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"{file.path} has a vocabulary that its merges do not fit ({error})") from error


def joins(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return every way to join two tokens to a third, the best third first, as sentencepiece would join them."""
    found = []
    for token, i in vocabulary.items():
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in parts if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(scores[i], pair) for pair in pairs]
    found.sort(key=lambda item: (item[0], len(item[1][0]), len(item[1][1])), reverse=True)
    return [pair for _, pair in found]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Mark the control tokens as special and the user-defined ones as whole, with the ids they have."""
    added = [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED) and tokenizer.token_to_id(token) is not None
    ]
    tokenizer.add_tokens(added)


def _adds(file: GGUFFile, role: str, model: str) -> bool:
    """Return whether encoding adds this token; where the file is silent, what llama.cpp does."""
    stated = file.metadata.get(f"tokenizer.ggml.add_{role}_token")
    if isinstance(stated, bool):
        return stated
    return role == "bos" and (model == "llama" or file.metadata.get("tokenizer.ggml.pre") in LLAMA3_PRE)


def _add_ends(tokenizer: Tokenizer, metadata: Metadata, tokens: list[str], bos: bool, eos: bool) -> None:
    """Let encoding put the beginning and the end of sequence around a text."""
    before = metadata.token("bos") if bos else None
    after = metadata.token("eos") if eos else None
    ids = [token for token in (before, after) if token is not None]
    if not ids:
        if metadata.file.metadata.get("tokenizer.ggml.model") == "gpt2":
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    left = [] if before is None else [tokens[before]]
    right = [] if after is None else [tokens[after]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*left, "$A", *right],
        pair=[*left, "$A", *right, *(f"{token}:1" for token in left), "$B:1", *(f"{token}:1" for token in right)],
        special_tokens=[(tokens[token], token) for token in dict.fromkeys(ids)],
    )
