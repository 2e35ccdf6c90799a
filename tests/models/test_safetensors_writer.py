"""Files of our own writer are read by the official library, aligned, and always the same bytes."""

import json
import struct
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from secateur.errors import OutputError
from secateur.models.safetensors_writer import Lazy, write_safetensors

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int64, torch.bool]


def header_of(path: Path) -> tuple[int, dict[str, dict[str, object]]]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return 8 + length, json.loads(data[8 : 8 + length])


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return (
        torch.arange(int(np.prod(shape)), dtype=torch.float32)
        .reshape(shape)
        .remainder(2 if dtype == torch.bool else 100)
        .to(dtype)
    )


def read(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (3, 5), (64, 2), (2, 3, 4)])
def test_round_trip(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {
        "first": sample(dtype, shape),
        "lazy": Lazy(shape, dtype, lambda: sample(dtype, shape)),
        "ü.1": sample(dtype, (7,)),
    }
    write_safetensors(tmp_path / "m.safetensors", tensors, {"format": "pt"})
    got = read(tmp_path / "m.safetensors")
    assert set(got) == set(tensors)
    for name in ("first", "lazy"):
        assert got[name].dtype == dtype and torch.equal(got[name], sample(dtype, shape))
    assert torch.equal(got["ü.1"], sample(dtype, (7,)))
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_layout_is_aligned_and_has_no_holes(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for i, dtype in enumerate(DTYPES * 3):
        tensors[f"odd{i}"] = sample(dtype, (3 + i,))
        tensors[f"even{i}"] = sample(dtype, (64, i % 3))
    write_safetensors(tmp_path / "m", tensors)
    start, header = header_of(tmp_path / "m")
    assert start % 64 == 0
    position = 0
    order = list(header)
    for name in order:
        begin, end = header[name]["data_offsets"]  # type: ignore[misc]
        assert begin == position
        position = end
        size = tensors[name].nbytes
        assert (start + begin) % (64 if size % 64 == 0 else tensors[name].element_size()) == 0
    assert position + start == (tmp_path / "m").stat().st_size
    whole = [name for name in tensors if tensors[name].nbytes % 64 == 0]
    assert order[: len(whole)] == whole
    assert all(torch.equal(value, tensors[name]) for name, value in read(tmp_path / "m").items())


def test_no_tensors(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m", {})
    assert read(tmp_path / "m") == {}


def test_views_numpy_and_byte_order(tmp_path: Path) -> None:
    matrix = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    big = np.arange(5, dtype=">f4")
    parameter = torch.nn.Parameter(torch.ones(3))
    tensors = {"t": matrix.T, "rows": matrix[1:], "big": big, "slice": np.arange(10)[::2], "parameter": parameter}
    write_safetensors(tmp_path / "m", tensors)
    got = read(tmp_path / "m")
    assert torch.equal(got["t"], matrix.T) and torch.equal(got["rows"], matrix[1:])
    assert got["big"].tolist() == [0, 1, 2, 3, 4] and got["slice"].tolist() == [0, 2, 4, 6, 8]
    assert got["parameter"].tolist() == [1, 1, 1]


def test_bytes_are_deterministic(tmp_path: Path) -> None:
    tensors = {"b": sample(torch.int8, (5,)), "a": sample(torch.float32, (5,)), "c": sample(torch.bool, (64,))}
    for name in ("one", "two"):
        write_safetensors(tmp_path / name, tensors, {"x": "1"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_lazy_tensors_are_made_one_at_a_time_in_file_order(tmp_path: Path) -> None:
    made: list[tuple[str, weakref.ref[torch.Tensor]]] = []

    def make(name: str) -> torch.Tensor:
        assert all(reference() is None for _, reference in made)
        tensor = torch.zeros(16)
        made.append((name, weakref.ref(tensor)))
        return tensor

    write_safetensors(tmp_path / "m", {name: Lazy((16,), torch.float32, partial(make, name)) for name in "xyz"})
    assert [name for name, _ in made] == ["x", "y", "z"]


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.int32), np.zeros((1, 2), np.float32)])
def test_a_lazy_tensor_that_is_not_what_it_said_leaves_no_file(wrong: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="said"):
        write_safetensors(tmp_path / "m", {"x": Lazy((2,), torch.float32, lambda: wrong)})  # type: ignore[arg-type, return-value]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex64"):
        write_safetensors(tmp_path / "m", {"x": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="<U1"):
        write_safetensors(tmp_path / "m", {"x": np.array(["a"])})


def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_safetensors(tmp_path / "missing" / "m", {"x": torch.zeros(2)})


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(tmp_path / "m", {"x": torch.zeros(2)})
    before = (tmp_path / "m").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left"):
        write_safetensors(tmp_path / "m", {"x": torch.ones(2)})
    assert (tmp_path / "m").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
