"""A damaged GGUF gives one clear line wherever the damage is."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from secateur.errors import ModelError
from secateur.models.gguf_file import GGUFFile
from tests.models.gguf_files import write_gguf
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "good.gguf", tiny_model("llama"))


def test_reads_what_the_reference_reader_reads(good: Path) -> None:
    ours, reference = GGUFFile(good), GGUFReader(good)
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == field.contents(), key
    assert len(ours.tensors) == len(reference.tensors)
    for tensor in reference.tensors:
        entry = ours.tensors[tensor.name]
        assert entry.shape == tuple(int(size) for size in tensor.shape[::-1])
        assert entry.offset == tensor.data_offset and entry.kind == tensor.tensor_type
        np.testing.assert_array_equal(
            ours.bfloat16(entry).float().numpy(), _rounded(np.asarray(tensor.data, np.float32)), strict=True
        )


def _rounded(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest even, by hand."""
    bits = values.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def test_every_cut_is_noticed(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    path = tmp_path / "cut.gguf"
    # The file is padded at its end, so cut at least the padding.
    for size in [*range(0, 64), *np.linspace(64, len(data) - 64, 60, dtype=int).tolist()]:
        path.write_bytes(data[:size])
        with pytest.raises(ModelError, match="cut"):
            GGUFFile(path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not a GGUF"),
        (bytes(4096), "not a GGUF"),
        (b"GGML" + bytes(60), "not a GGUF"),
        (b"PK\x03\x04" + bytes(60), "not a GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), "damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "value type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**61), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ2sI", 3, 0, 1, 2, b"\xff\xfe", 4), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 32, 99, 0), "type 99"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 31, 8, 0), "blocks have 32"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 32, 8, 2**40), "ends at byte"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9), "9 dimensions"),
    ],
)
def test_other_damage(data: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=expected):
        GGUFFile(path)
