"""Files of weights that are cut, damaged, lie, or could run code: a clear error, no harm."""

import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from tests.support import flax_vit
from tests.support.torch_files import torch_file
from vit_dist.model.formats.containers import open_tensors
from vit_dist.model.formats.pretrained import open_pretrained


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A good file of each kind, with more than one tensor of 1 kB."""
    folder = tmp_path_factory.mktemp("files")
    tree = flax_vit.make_tree()
    np.savez(folder / "good.npz", **tree)
    state = {"patch_embed.proj.weight": np.ones((12, 3, 4, 4), "f"), "x": np.ones((64, 8), "f")}
    safetensors.numpy.save_file(state, folder / "good.safetensors")
    (folder / "good.pth").write_bytes(torch_file(state))
    return folder


class Evil:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_files_of_torch_without_torch(files, tmp_path):
    kernel = np.asarray(tensors_of(files / "good.pth")["patch_embed.proj.weight"])
    np.testing.assert_array_equal(kernel, np.ones((12, 3, 4, 4)))
    path = tmp_path / "transposed.pth"
    array = np.arange(6, dtype="f").reshape(2, 3)
    path.write_bytes(torch_file({"a": array}))
    np.testing.assert_array_equal(np.asarray(tensors_of(path)["a"]), array)


def tensors_of(path):
    return open_tensors(path).tensors


@pytest.mark.parametrize("name", ["good.npz", "good.safetensors", "good.pth"])
@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.99])
def test_files_that_were_cut(files, tmp_path, name, keep):
    data = (files / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match=f"{name}.* is damaged.*; fetch or copy it again$"):
        tensors_of(path)


@pytest.mark.parametrize("name", ["good.npz", "good.pth"])
def test_a_flipped_bit_is_noticed(files, tmp_path, name):
    data = bytearray((files / name).read_bytes())
    path = tmp_path / name
    middle = data.index(np.ones(8, "f").tobytes()) + 9 if name == "good.pth" else len(data) // 2
    data[middle] ^= 16
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged|cannot be read"):
        for tensor in tensors_of(path).values():
            np.asarray(tensor)


def _npz_with(path, name, data):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)


def _npy(header):
    text = repr(header).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def bomb(path):
    _npz_with(path, "a.npy", _npy({"descr": "<f4", "fortran_order": False, "shape": (2**27,)}))
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("b.npy", "w") as member,
    ):
        for _ in range(320):
            member.write(bytes(2**20))


def lying_shape(path):
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**40,)}
    _npz_with(path, "a.npy", _npy(header) + bytes(64))


def objects(path):
    np.savez(path, a=np.array([{}], dtype=object))


def evil_torch(path):
    path.write_bytes(torch_file({"a": np.ones(3, "f"), "evil": Evil()}))


def big_endian(path):
    path.write_bytes(torch_file({"a": np.ones(3, "f")}, byteorder=b"big"))


def bare_pickle(path):
    path.write_bytes(pickle.dumps({"a": Evil()}))


def web_page(path):
    path.write_text("<!DOCTYPE html><html>Not found</html>")


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def resnet(path):
    np.savez(path, **{"conv1/kernel": np.ones((7, 7, 3, 64), "f")})


def no_blocks(path):
    np.savez(path, **{"embedding/kernel": np.ones((4, 4, 3, 8), "f")})


def nothing(path):
    assert not path.exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bomb, "zip bomb"),
        (lying_shape, r"a.npy is damaged.*1099511627776"),
        (objects, "pickled objects, which could run any code"),
        (evil_torch, "is no ViT of .* it holds e.g. a"),  # read, and nothing in it called
        (big_endian, "big-endian"),
        (bare_pickle, "is a pickle, which could run any code"),
        (
            web_page,
            r"no .npz, .safetensors or .pth: it begins .*<!DOCTYPE.*; fetch or copy it again",
        ),
        (other_zip, r"a zip file without arrays .*: name a .npz, or what torch.save wrote"),
        (resnet, "no ViT of vision_transformer, .* it holds e.g. conv1/kernel"),
        (no_blocks, "no plain ViT: it has no transformer blocks"),
        (nothing, "there is no file"),
    ],
)
def test_files_that_are_refused(tmp_path, capsys, make, message):
    path = tmp_path / "weights.npz"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        open_pretrained(path)
    assert str(path) in str(caught.value)
    assert "never be printed" not in capsys.readouterr().out


def test_headers_of_safetensors_that_lie(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}}
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ValueError, match="damaged"):
        open_pretrained(path)


def test_a_type_that_is_not_read(tmp_path):
    header = {"a": {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}}
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ValueError, match=r"a.safetensors: a is of type F8_E4M3.*float16"):
        open_pretrained(path)


SAVERS = {
    "a.npz": lambda path, arrays: np.savez(path, **arrays),
    "compressed.npz": lambda path, arrays: np.savez_compressed(path, **arrays),
    "a.safetensors": lambda path, arrays: safetensors.numpy.save_file(arrays, path),
    "a.pth": lambda path, arrays: path.write_bytes(torch_file(arrays)),
}


@pytest.fixture(params=SAVERS)
def large(request, tmp_path_factory):
    """A file of tensors that are read in several pieces, and what they are."""
    path = tmp_path_factory.mktemp("large") / request.param
    draw = np.random.default_rng(0).standard_normal
    arrays = {"a": draw((600, 1001), "f"), "b": draw((2**18,), "f"), "c": draw((3, 4), "f")}
    SAVERS[request.param](path, arrays)
    return path, arrays


def test_large_tensors_are_read_whole(large):
    path, arrays = large
    for name, tensor in tensors_of(path).items():
        np.testing.assert_array_equal(np.asarray(tensor), arrays[name])


def test_a_file_cut_after_it_was_opened(large, tmp_path):
    path = tmp_path / large[0].name
    path.write_bytes(large[0].read_bytes())
    tensors = tensors_of(path)
    path.write_bytes(large[0].read_bytes()[: 2**20])
    with pytest.raises(ValueError, match=f"{path.name}.* is damaged or was cut"):
        for tensor in tensors.values():
            np.asarray(tensor)


@pytest.mark.parametrize("large", [n for n in SAVERS if n != "a.safetensors"], indirect=True)
def test_a_flipped_bit_in_a_large_tensor(large, tmp_path):
    """Files of safetensors are not among them: they have no checksums."""
    data = bytearray(large[0].read_bytes())
    data[2**20 + 2**19] ^= 16
    path = tmp_path / large[0].name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path.name}: .*(damaged|cannot be read)"):
        for tensor in tensors_of(path).values():
            np.asarray(tensor)
