"""Files of torch.save, made without PyTorch: tensors, and what training scripts put beside them."""

import io
import pickle
import sys
import types
import zipfile
from unittest import mock

import numpy as np


def torch_file(content, *, byteorder=b"little"):
    """The bytes of a file of torch.save.

    Args:
      content: nested dictionaries; arrays in them become tensors, other objects stay.
      byteorder: what the file says of its numbers.
    """
    utils, torch = types.ModuleType("torch._utils"), types.ModuleType("torch")

    def _rebuild_tensor_v2():
        """Named only: the reader must not call it."""

    class FloatStorage:
        pass

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = (
        "torch._utils",
        "_rebuild_tensor_v2",
    )
    FloatStorage.__module__, FloatStorage.__qualname__ = "torch", "FloatStorage"
    utils._rebuild_tensor_v2, torch.FloatStorage = _rebuild_tensor_v2, FloatStorage
    found = []

    class Tensor:
        def __init__(self, array):
            self.key, self.array = str(len(found)), np.asarray(array, np.float32)
            found.append(self)

        def __reduce__(self):
            strides = tuple(s // 4 for s in self.array.strides)
            return _rebuild_tensor_v2, (Storage(self), 0, self.array.shape, strides, False, {})

    class Storage:
        def __init__(self, tensor):
            self.tensor = tensor

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                tensor = obj.tensor
                return ("storage", FloatStorage, tensor.key, "cpu", tensor.array.size)
            return None

    def convert(value):
        if isinstance(value, dict):
            for key, entry in value.items():
                value[key] = convert(entry)
            return value
        return Tensor(value) if isinstance(value, np.ndarray) else value

    data = io.BytesIO()
    content = convert(_copied(content))
    with mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        Pickler(data, protocol=2).dump(content)
    arrays = {tensor.key: tensor.array for tensor in found}
    return as_zip(data.getvalue(), arrays, byteorder=byteorder)


def _copied(value):
    """Dictionaries are copied, so that `convert` changes none of the caller's."""
    if type(value) is dict:
        return {key: _copied(entry) for key, entry in value.items()}
    return value


def as_zip(pickled, arrays=None, *, byteorder=b"little"):
    """The zip file of torch.save around a pickle; arrays are its storages, by key."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        for key, array in (arrays or {}).items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return out.getvalue()
