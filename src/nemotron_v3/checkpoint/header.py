"""The header of a safetensors file and other JSON that came from outside, read without trusting it.

A safetensors file is eight bytes (the header's length, little-endian), a JSON header naming each
tensor's dtype, shape and place, and the tensors' bytes, which cover the rest of the file without a
gap. Every claim of the header is checked here before anybody touches a tensor.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import torch

from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.config.files import MAX_JSON_BYTES, open_regular, parse_object, read_object

# MAX_JSON_BYTES holds for headers too: all 51,023 tensors of the largest release in one file would
# need one of 8 MB.

# Bits an element, for every dtype of the format.
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
WEIGHT_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
TORCH_DTYPES = WEIGHT_DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "C64": torch.complex64,
}
WEIGHT_DTYPE_NAMES = ", ".join(
    str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES.values()
)
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES.values()}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_FOREIGN = {
    b"PK\x03\x04": "a zip archive, as torch.save writes them",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"version ": "a git-lfs pointer: fetch the file itself with `git lfs pull`",
    b"<!DOCTYP": "a web page",
    b"<html": "a web page",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `dtype` as the format names it, and its bytes `[begin, end)` counted
    from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@overload
def weight_dtype(dtype: torch.dtype, done: str) -> torch.dtype: ...
@overload
def weight_dtype(dtype: str | torch.dtype | None, done: str) -> torch.dtype | None: ...
def weight_dtype(dtype: Any, done: str) -> torch.dtype | None:
    """A dtype that weights may be `done` (loaded, saved) in, by itself or by its name
    (`"bfloat16"`, `"torch.bfloat16"`); None for `"auto"`, which leaves the choice here.

    Raises `CheckpointError` for any other.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    found = _BY_NAME.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in _BY_NAME.values():
        asked = repr(dtype) if isinstance(dtype, str) else dtype
        raise CheckpointError(f"no model is {done} in dtype {asked}: give {WEIGHT_DTYPE_NAMES}")
    return found


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """`config.files.parse_object`, whose errors become a `CheckpointError`."""
    try:
        return parse_object(raw, where)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """`config.files.read_object`, whose errors become a `CheckpointError`; `OSError` stays."""
    try:
        return read_object(path, limit)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def open_weights(path: Path) -> BinaryIO:
    """`config.files.open_regular`, whose errors become a `CheckpointError`; `OSError` stays."""
    try:
        return open_regular(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def read_header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of an open safetensors file of `size` bytes, in the order of their bytes, and the
    file's notes (`__metadata__`).

    Raises `CheckpointError`, naming `path`, unless the tensors' bytes cover the file exactly.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    # A header of 640 bytes begins as a pickle does: only an impossible length is looked up.
    if len(start) < 8 or length > min(size - 8, MAX_JSON_BYTES):
        for magic, what in _FOREIGN.items():
            if start.startswith(magic):
                raise CheckpointError(f"{path}: not safetensors but {what}")
    if len(start) < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file")
    if length > size - 8:
        raise CheckpointError(
            f"{path}: truncated or not safetensors: its header would take {length} bytes, "
            f"the file has {size}"
        )
    if length > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: a header of {length} bytes, more than {MAX_JSON_BYTES}")
    raw = file.read(length)
    listing = parse_json(raw, f"the header of {path}")
    notes = listing.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    entries = {name: _entry(name, claim, 8 + length, path) for name, claim in listing.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_cover(ordered, 8 + length, size, path)
    return ordered, notes


def _entry(name: str, claim: Any, data: int, path: Path) -> Entry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(claim, dict) or claim.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: needs dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}")
    if not _sizes(shape) or len(shape) > 8:
        raise CheckpointError(f"{where}: shape {shape} is not a list of sizes")
    if not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets {offsets} are not two positions")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise CheckpointError(
            f"{where}: {dtype} {shape} does not take the {end - begin} bytes "
            f"that data_offsets {offsets} give it"
        )
    # Beside a size of 0 the others take no bytes, and would still overflow a tensor's strides.
    if math.prod(max(1, size) for size in shape) >= 2**62:
        raise CheckpointError(f"{where}: shape {shape} is not in 64 bits")
    return Entry(dtype, tuple(shape), data + begin, data + end)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)


def _check_cover(entries: dict[str, Entry], data: int, size: int, path: Path) -> None:
    position = data
    for name, entry in entries.items():
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "follows a gap"
            raise CheckpointError(f"{path}: tensor {name!r} {what}")
        position = entry.end
    if position > size:
        raise CheckpointError(
            f"{path}: truncated: its tensors end at byte {position}, the file at {size}; fetch or "
            "copy it again"
        )
    if position < size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor")
