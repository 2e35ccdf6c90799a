from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from secateur.calibration.held_out import Window, held_out_windows
from secateur.errors import ConfigError, CorpusError
from tests.calibration.texts import byte_tokenizer, source, write_data, write_folder, write_json_lines


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for domain in ("python", "java", "cpp", "javascript"):
        write_data(tmp_path, domain)
    return tmp_path


def windows_of(data: Path, domain: str = "python", **options: Any) -> list[Window]:
    tokenizer = options.pop("tokenizer", None) or byte_tokenizer()
    return held_out_windows(domain, tokenizer, data=data, **{"window_length": 100, **options})


def text_of(window: Window) -> str:
    return str(byte_tokenizer().decode(window.token_ids.tolist()))


def test_windows_come_from_held_out_files_the_same_each_time(data: Path) -> None:
    windows = windows_of(data)
    assert [(w.document, w.token_ids.tolist()) for w in windows] == [
        (w.document, w.token_ids.tolist()) for w in windows_of(data)
    ]
    assert all(window.document.startswith("pack 1/held_out") for window in windows)
    assert all(text_of(window) in 2 * source(f"python {window.document[7:-2]}") for window in windows)


def test_many_files_before_a_second_window_of_one(data: Path) -> None:
    windows = windows_of(data)
    assert [len({w.document for w in half}) for half in (windows[:5], windows[5:])] == [5, 5]
    assert Counter(window.document for window in windows).most_common(1)[0][1] == 2
    one = windows_of(data, windows_per_document=1)
    assert [w.document for w in one] == [w.document for w in windows[:5]]
    texts = [text_of(window) for window in windows]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("max_tokens", [2, 50, 151, 350])
def test_max_tokens_is_kept(data: Path, max_tokens: int, begin: bool) -> None:
    windows = windows_of(data, max_tokens=max_tokens, tokenizer=byte_tokenizer(begin=begin))
    total = sum(len(window.token_ids) for window in windows)
    assert max_tokens * 0.6 <= total <= max_tokens
    assert all(2 <= len(window.token_ids) <= 100 for window in windows)


def test_bytes_are_those_of_the_tokens_that_are_predicted(tmp_path: Path) -> None:
    text = "".join(f"zeile {i} ist schön\n" for i in range(9))
    file = write_json_lines(tmp_path / "a.jsonl", [{"text": text}, {"text": text + "."}])
    for begin in (False, True):
        for window in held_out_windows(str(file), byte_tokenizer(begin=begin), window_length=50):
            assert window.n_bytes == len(window.token_ids) - 1  # each token is a byte
            assert (window.token_ids[0] == 0) == begin


class SlowTokenizer:
    """A tokenizer without offsets, as transformers' slow ones are."""

    is_fast = False

    def __init__(self) -> None:
        self.fast = byte_tokenizer()
        self.bos_token_id, self.eos_token_id = self.fast.bos_token_id, self.fast.eos_token_id

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return self.fast(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: list[int]) -> str:
        return str(self.fast.decode(token_ids))


def test_bytes_without_offsets_are_the_same(data: Path) -> None:
    slow = windows_of(data, tokenizer=SlowTokenizer())
    assert [window.n_bytes for window in slow] == [window.n_bytes for window in windows_of(data)]


def test_code_gives_each_language_its_part(data: Path) -> None:
    windows = windows_of(data, "code", max_tokens=800)
    tokens: Counter[str] = Counter()
    for window in windows:
        tokens[text_of(window).split(" held")[0]] += len(window.token_ids)
    assert set(tokens) == {"python", "java", "cpp", "javascript"}
    assert all(150 <= count <= 200 for count in tokens.values())


def test_limits_that_leave_nothing(data: Path) -> None:
    limits: list[dict[str, Any]] = [{"max_tokens": 1}, {"window_length": 1}, {"windows_per_document": 0}]
    for options in limits:
        with pytest.raises(ConfigError, match="predict nothing"):
            windows_of(data, **options)


def test_text_that_is_too_short(tmp_path: Path) -> None:
    file = write_json_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(CorpusError, match="too short to predict anything"):
        held_out_windows(str(file), byte_tokenizer())


def test_folder_of_a_user(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", [f"{i}.go" for i in range(20)])
    windows = held_out_windows(str(tmp_path / "mine"), byte_tokenizer(), window_length=64)
    assert windows
    assert all(text_of(w).split("line")[0].strip(": ") == w.document for w in windows)
