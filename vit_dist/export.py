"""Writes a ViT for other systems, or for serving.

python -m vit_dist.export --checkpoint runs/NAME --format timm --output exported

--checkpoint takes what config.init_from takes: a run, or a file of another system, so this command
also converts between other systems. --format is one of

npz, big_vision   a .npz for vision_transformer (timm reads it as well), or for big_vision
timm              a folder for timm.create_model("local-dir:FOLDER", pretrained=True), or the
                  .safetensors alone
huggingface       a folder for transformers' from_pretrained
savedmodel        a TensorFlow SavedModel: bytes of image files in, probabilities out; for a run on
                  arrays, such as the demo's digits, uint8 arrays in
keras             a .keras file: images already scaled in, logits out
onnx              an .onnx file: uint8 images of the model's size in, probabilities and logits out;
                  needs tf2onnx, the extra `onnx`
"""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
import numpy as np
import tensorflow as tf
from absl import flags, logging

from vit_dist.config.errors import ConfigError
from vit_dist.model.formats.writing import FORMATS, write_pretrained
from vit_dist.model.posemb import METHODS
from vit_dist.model.variants import GELUS, as_pair
from vit_dist.model.vit import ViT, named_weights
from vit_dist.paths import local_path
from vit_dist.run.origins import Origin, open_origin
from vit_dist.run.served import export_hint, load_model, mean_and_std, serve
from vit_dist.storage.files import naming, write_output

ALL_FORMATS = (*FORMATS, "savedmodel", "keras", "onnx")
# Files of one model each: format -> how their names end.
_SUFFIXES = {"keras": ".keras", "onnx": ".onnx"}
# The version of ONNX's operators, which every ONNX Runtime since 1.14 (2023) knows.
_OPSET = 18


def define_flags() -> None:
    """Defines this command's flags; not at import: other commands have flags of the same names."""
    flags.DEFINE_string("checkpoint", None, "a run's folder, or weights of any system")
    flags.DEFINE_enum("format", "npz", ALL_FORMATS, "what to write")
    flags.DEFINE_string("output", None, "file or folder to write")
    flags.DEFINE_list("image_size", None, "pixels, or height,width: resamples positions to it")
    flags.DEFINE_enum(
        "posemb_method", "align_corners", tuple(METHODS), "how --image_size resamples positions"
    )
    flags.DEFINE_list(
        "init_image_size", None, "what the file was trained on, where it does not tell"
    )
    flags.DEFINE_integer("num_heads", None, "of the file, where it does not tell")
    flags.DEFINE_enum("gelu", None, GELUS, "of the file, where it does not tell")
    flags.DEFINE_list("mean", None, "of images in 0..1, where the file does not tell")
    flags.DEFINE_list("std", None, "standard deviation of images in 0..1, likewise")
    flags.DEFINE_string("ignore", "", "regex: tensors of the file that may be left out")


def main() -> int:
    """The command; returns its exit code."""
    given = flags.FLAGS
    if not given.checkpoint or not given.output:
        raise ConfigError("give what to export and where to: --checkpoint runs/NAME --output FILE")
    # A flag that is not given must not reach export(): there it would count as told.
    told = {"num_heads": given.num_heads, "gelu": given.gelu}
    files = export(
        given.checkpoint,
        given.format,
        given.output,
        image_size=_image_size("image_size", given.image_size),
        init_image_size=_image_size("init_image_size", given.init_image_size),
        method=given.posemb_method,
        ignore=given.ignore,
        mean=_numbers("mean", given.mean),
        std=_numbers("std", given.std),
        **{key: value for key, value in told.items() if value is not None},
    )
    print("wrote " + ", ".join(map(str, files)))
    return 0


def _image_size(name: str, given: Sequence[str] | None) -> tuple[int, int] | None:
    """(height, width) from a flag's list of one or two numbers."""
    if given is None:
        return None
    if len(given) > 2 or not all(text.isdigit() and int(text) for text in given):
        raise ConfigError(
            f"--{name} is a number of pixels, or height,width; got {','.join(given) or 'nothing'}"
        )
    return int(given[0]), int(given[-1])


def _numbers(name: str, given: Sequence[str] | None) -> list[float] | None:
    try:
        return None if given is None else [float(text) for text in given]
    except ValueError:
        raise ConfigError(f"--{name} is one number, or one for each channel; got {given}") from None


def export(
    checkpoint: str,
    format: str,
    output: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    method: str = "align_corners",
    ignore: str = "",
    init_image_size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **told: Any,
) -> list[Path]:
    """Writes a checkpoint in another format.

    Args:
      checkpoint: see origins.open_origin.
      format: one of ALL_FORMATS.
      output: local path of the file or folder to write.
      image_size: pixels, of the model to write; None for the checkpoint's own.
      method: how positions are resampled to image_size; see posemb.resize_posemb.
      ignore: regex; tensors of the checkpoint whose names it matches may be left out.
      init_image_size: pixels, (height, width) of the images that the checkpoint was trained on, if
        the checkpoint does not tell.
      mean, std: of images in 0..1, one number or one for each channel, if the checkpoint does not
        tell.
      **told: keys of ViT that the checkpoint does not tell, such as num_heads.

    Returns:
      The files and folders written.

    Raises:
      ConfigError: an unknown format, an output of another kind than the format's, or something told
        that contradicts the checkpoint or cannot be.
      DataError: no such checkpoint, or the format cannot hold its network.
    """
    if format not in ALL_FORMATS:
        raise ConfigError(f"format {format!r} is unknown; allowed: {', '.join(ALL_FORMATS)}")
    path = Path(local_path(output, "--output"))
    if format in _SUFFIXES and path.suffix != _SUFFIXES[format]:
        raise ConfigError(f"give a file that ends in {_SUFFIXES[format]}, not {path}")
    if format == "onnx" and importlib.util.find_spec("tf2onnx") is None:
        raise ConfigError(
            "--format onnx needs tf2onnx, which is not installed: pip install tf2onnx, or install "
            "vit_dist with its extra 'onnx'"
        )
    origin = open_origin(checkpoint, image_size=init_image_size, hint=export_hint)
    # A file whose own size fits its positions is checked when it is opened; a run is not.
    if origin.checkpoint is not None and init_image_size is not None:
        size = {"init_image_size": as_pair(origin.network["image_size"])}
        _check_agrees(origin, size, {"init_image_size": as_pair(init_image_size)})
    _check_agrees(origin, origin.network, told)
    origin = _scaled(origin, mean=mean, std=std)
    model = load_model(
        origin, image_size=image_size, method=method, ignore=ignore, system=format, **told
    )
    with naming(path):
        return _write(path, format, model, origin)


def _check_agrees(origin: Origin, known: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Raises ConfigError where the user tells something else than the checkpoint."""
    for key, value in told.items():
        if known.get(key) is not None and known[key] != value:
            raise ConfigError(
                f"{origin.path} says {key} {known[key]!r}, and --{key} {value!r}: leave out the "
                "flag, which is for what a file does not tell"
            )


def _scaled(origin: Origin, **told: Sequence[float] | None) -> Origin:
    """The origin with mean and std as the user tells them, where it does not tell them itself.

    Raises:
      ConfigError: they are no mean and std of its channels, or others than it tells.
    """
    channels = origin.network["channels"]
    numbers = {key: values for key, values in told.items() if values is not None}
    said: dict[str, Any] = {"mean": origin.mean, "std": origin.std}
    if numbers and origin.pipe is not None:
        said = dict(zip(said, mean_and_std(origin, channels), strict=True))
    for key, values in numbers.items():
        fits = len(values) in (1, channels) and np.isfinite(values).all()
        if not fits or (key == "std" and min(values) <= 0):
            raise ConfigError(
                f"--{key} is one number{' above 0' if key == 'std' else ''}, or one for each of "
                f"{channels} channels; got {list(values)}"
            )
        # ImageNet's are published with three or four digits.
        have = values if said[key] is None else said[key]
        if len(have) in (1, channels) and not np.allclose(values, have, rtol=0, atol=1e-3):
            _check_agrees(origin, {key: list(have)}, {key: list(values)})
    # What a run's pipe tells is not kept twice.
    new: dict[str, Any] = {k: v for k, v in numbers.items() if said[k] is None}
    return dataclasses.replace(origin, **new)


def _write(path: Path, format: str, model: ViT, origin: Origin) -> list[Path]:
    if format == "keras":
        return _write_keras(path, model)
    if format == "onnx":
        return _write_onnx(path, model, origin)
    if format == "savedmodel":
        return _write_saved_model(path, model, origin)
    mean, std = mean_and_std(origin, model.channels)
    _tell_preparation(origin)
    return write_pretrained(
        path,
        format,
        {name: variable.numpy() for name, variable in named_weights(model).items()},
        model.get_config(),
        mean=mean,
        std=std,
        class_names=origin.class_names,
    )


def _tell_preparation(origin: Origin) -> None:
    """Warns where images were prepared otherwise than by the plain resize that files tell of."""
    asked = origin.preparation
    if origin.pipe is not None:
        steps = [s for s in origin.pipe.steps if s.op.image and not s.op.on_device]
        steps = [s for s in steps if s.op.name != "decode"]
        # PIL's bilinear resize, as the other systems do it. Arrays may need none.
        wanted = {"method": "bilinear", "antialias": True}
        plain = [s.op.name == "resize" and wanted.items() <= s.arguments.items() for s in steps]
        asked = "" if plain in ([], [True]) else "|".join(s.text for s in steps)
    if asked:
        logging.warning(
            "%s prepares images by %s; what is written tells of a plain resize to the model's size "
            "(bilinear, antialias=True), or of none: prepare them likewise where you use it",
            origin.path,
            asked,
        )


def _write_keras(path: Path, model: ViT) -> list[Path]:
    """A .keras file, which replaces an older one only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.part.keras")
    try:
        model.save(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return [path]


def _write_saved_model(path: Path, model: ViT, origin: Origin) -> list[Path]:
    served, names = serve(origin, model)
    path.mkdir(parents=True, exist_ok=True)
    tf.saved_model.save(served, str(path), signatures={"serving_default": served.signature()})
    labels = path / "labels.txt"
    labels.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return [path, labels]


def _write_onnx(path: Path, model: ViT, origin: Origin) -> list[Path]:
    """The network behind the preparation of files, which ONNX has no operators for."""
    import onnx
    import tf2onnx

    served, names = serve(origin, model)
    proto, _ = tf2onnx.convert.from_function(
        served.classify, input_signature=served.classify.input_signature, opset=_OPSET
    )
    told = {"class_names": json.dumps(names), "image_ops": str(served.pipe)}
    onnx.helper.set_model_props(proto, told)
    write_output(path, proto.SerializeToString())
    return [path]


def script() -> None:
    """The program vit-dist-export: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
