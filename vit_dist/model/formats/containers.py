"""Files of tensors: .npz, .safetensors and PyTorch's .pth, opened without running what is in them.

Opening reads names and shapes only; a tensor is read when asked for, so a file takes up the memory
of its largest tensor. All sizes are checked against the file before memory is asked for.
"""

import dataclasses
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from vit_dist.config.errors import DataError
from vit_dist.model.formats.tensors import (
    AGAIN,
    LazyArray,
    TensorFile,
    as_float,
    check_size,
    is_floating,
    open_zip,
    read_exactly,
    read_member,
)
from vit_dist.model.formats.torch_file import open_torch

_MAX_HEADER = 2**16  # bytes of a .npy header


def open_tensors(path: Path) -> TensorFile:
    """Opens a file of tensors, whatever its extension says.

    Raises:
      DataError: no such file, a file of another kind, damaged, cut, or not safe to open.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    # The first bytes tell what it is: .npz and PyTorch's files are zip files, of which the members
    # tell; a safetensors file begins with the length of a JSON header.
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise DataError(f"{path} is damaged: it is empty{AGAIN}")
    # A zip file: NumPy's and PyTorch's both are, and differ in the names of their members.
    if head[:4] == b"PK\x03\x04":
        with open_zip(path) as archive:
            names = archive.namelist()
        if any(name.endswith("data.pkl") for name in names):
            return _remember_last(open_torch(path))
        if any(name.endswith(".npy") for name in names):
            return _remember_last(_open_npz(path))
        raise DataError(
            f"{path} is a zip file without arrays (it holds e.g. {names[:1]}): name a .npz, or "
            "what torch.save wrote"
        )
    # safetensors: 8 bytes with the length of a JSON header, then the header.
    if head[8:9] == b"{" and path.stat().st_size > int.from_bytes(head[:8], "little"):
        return _remember_last(_open_safetensors(path))
    if head[:1] == b"\x80":  # the opcode PROTO
        raise DataError(
            f"{path} is a pickle, which could run any code and is not opened. A PyTorch file of "
            "before version 1.6: where you trust it, save it again with torch.save(torch.load("
            "path, weights_only=True), new_path)"
        )
    raise DataError(
        f"{path} is damaged, or no .npz, .safetensors or .pth: it begins with {head!r}{AGAIN}"
    )


def _remember_last(file: TensorFile) -> TensorFile:
    """`file`, but reading one tensor several times in a row reads the disk once.

    A fused matrix is asked for once for each array that is cut from it.
    """
    # At most one tensor: several would add up to the file.
    last: dict[str, np.ndarray] = {}

    def remembering(name: str, read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        def reread() -> np.ndarray:
            if name not in last:
                last.clear()  # before the next one takes up its memory
                last[name] = read()
            return last[name]

        return reread

    tensors = {
        name: dataclasses.replace(tensor, read=remembering(name, tensor.read), source=name)
        for name, tensor in file.tensors.items()
    }
    return dataclasses.replace(file, tensors=tensors)


def merge(files: Mapping[str, TensorFile]) -> TensorFile:
    """The parts of a sharded checkpoint as one."""
    tensors: dict[str, LazyArray] = {}
    for file in files.values():
        tensors.update(file.tensors)
    return dataclasses.replace(next(iter(files.values())), tensors=tensors)


def _open_npz(path: Path) -> TensorFile:
    tensors = {}
    with open_zip(path) as archive:
        infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        for info in infos:
            shape, dtype, fortran, start = _npy_header(path, archive, info)
            name = info.filename.removesuffix(".npy")

            # Bound as defaults: a closure would see the values of the loop's last turn.
            def read(info=info, shape=shape, dtype=dtype, fortran=fortran, start=start):
                data = read_member(path, info.filename)[start:]
                # Fortran order: the first axis counts fastest.
                array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
                return as_float(array)

            tensors[name] = LazyArray(shape, read, name, is_floating(dtype))
    return TensorFile(tensors, "npz")


def _npy_header(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    where = f"{path}: {info.filename}"
    try:
        with archive.open(info) as member:
            # NumPy's own functions for the header, which never unpickle. max_header_size bounds
            # what they parse.
            version = np.lib.format.read_magic(member)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(member, max_header_size=_MAX_HEADER)
            start = member.tell()
    except Exception as error:  # whatever a damaged file makes zipfile, zlib and NumPy raise
        raise DataError(f"{where} is damaged or was cut ({error}){AGAIN}") from error
    # An array of objects is a pickle inside of the .npy.
    if dtype.hasobject:
        raise DataError(
            f"{where} holds pickled objects, which could run any code; not opened. Where you trust "
            "it, save its arrays of numbers alone with numpy.savez"
        )
    if dtype == np.dtype("V2"):
        dtype = np.dtype(ml_dtypes.bfloat16)  # as NumPy writes what it does not know
    check_size(where, shape, dtype, info.file_size - start)
    return tuple(shape), dtype, fortran, start


# The types of a safetensors file that NumPy has too, with bfloat16 from ml_dtypes.
_SAFETENSORS_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(np.bool_),
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
}


def _open_safetensors(path: Path) -> TensorFile:
    try:
        with safetensors.safe_open(path, framework="np") as file:  # checks the whole header
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or was cut: {error}{AGAIN}") from None
    # The library has checked the header; it is parsed again because it does not tell where in the
    # file each tensor lies.
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    # Text for people and programs, kept in `metadata`; all other entries are tensors.
    header.pop("__metadata__", None)

    def reader(name: str, entry: Mapping[str, Any]) -> Callable[[], np.ndarray]:
        begin, end = entry["data_offsets"]  # counted from the end of the header

        def read() -> np.ndarray:
            try:
                with path.open("rb") as raw:
                    # Offsets count from the end of the header.
                    raw.seek(8 + length + begin)
                    data = read_exactly(raw, end - begin)
            except (EOFError, OSError) as error:
                raise DataError(f"{path}: {name} is damaged or was cut ({error}){AGAIN}") from None
            array = np.frombuffer(data, _SAFETENSORS_DTYPES[entry["dtype"]])
            return as_float(array.reshape(entry["shape"]))

        return read

    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise DataError(
                f"{path}: {name} is of type {entry['dtype']}, which is not read: save it as "
                "float32, float16 or bfloat16"
            )
        floating = is_floating(_SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[name] = LazyArray(tuple(entry["shape"]), reader(name, entry), name, floating)
    return TensorFile(tensors, "safetensors", metadata)
