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
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
import numpy as np
import tensorflow as tf
from absl import flags, logging

from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.ops.pipe import Pipe, parse
from vit_dist.model.formats.writing import FORMATS, prefix_posemb_for, write_pretrained
from vit_dist.model.posemb import METHODS, sincos2d
from vit_dist.model.variants import GELUS, as_pair, vit_config
from vit_dist.model.vit import ViT, build_vit, named_weights
from vit_dist.paths import local_path
from vit_dist.run.origins import Hint, Origin, open_origin
from vit_dist.storage.files import naming, write_output

ALL_FORMATS = (*FORMATS, "savedmodel", "keras", "onnx")
# Files of one model each: format -> how their names end.
_SUFFIXES = {"keras": ".keras", "onnx": ".onnx"}
# The version of ONNX's operators, which every ONNX Runtime since 1.14 (2023) knows.
_OPSET = 18
# Keys of ViT that runs of older versions did not record -> the only value that they could have.
_DEFAULTS = {"prefix_posemb": "cls", "registers": 0, "layer_scale": None, "cls_token": True}
# Keys of ViT that only matter in training; the written network gets their defaults.
_TRAINING = ("dropout", "attention_dropout", "drop_path", "remat", "attention_block")
# Keys of ViT that no tensor's shape tells and a file may not tell either -> their keys in a config.
# (norm_epsilon, too, but it has a common value: 1e-6 unless told.)
_UNTOLD = {"num_heads": "model.num_heads", "gelu": "model.gelu", "image_size": "image_size"}
# Keys of UnfitError.settings, what would make weights fit -> the flag of this command for it.
_FLAGS = {
    "init_image_size": "init_image_size",
    "image_size": "image_size",
    "init_ignore": "ignore",
    "model.num_heads": "num_heads",
    "model.gelu": "gelu",
    "mean": "mean",
    "std": "std",
}


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


def hint(settings: Mapping[str, Any]) -> str:
    """The origins.Hint of this command: Say --num_heads=..."""
    flags = [f"--{_FLAGS[k]}={shlex.quote(str(v))}" for k, v in settings.items() if k in _FLAGS]
    return f"Say {' '.join(flags)}" if flags else "No flag of this command mends that"


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
      mean, std: of images in 0..1, by channel, if the checkpoint does not tell.
      **told: keys of ViT that the checkpoint does not tell, such as num_heads.

    Returns:
      The files and folders written.

    Raises:
      ConfigError: an unknown format, or an output of another kind than the format's.
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
    origin = open_origin(checkpoint, image_size=init_image_size, hint=hint)
    # A run and a file that tells have the last word on how images are scaled.
    if origin.pipe is None and origin.mean is None:
        origin = dataclasses.replace(origin, mean=mean, std=std)
    model = load_model(
        origin, image_size=image_size, method=method, ignore=ignore, system=format, **told
    )
    with naming(path):
        return _write(path, format, model, origin)


def _write(path: Path, format: str, model: ViT, origin: Origin) -> list[Path]:
    if format == "keras":
        return _write_keras(path, model)
    if format == "onnx":
        return _write_onnx(path, model, origin)
    if format == "savedmodel":
        return _write_saved_model(path, model, origin)
    mean, std = mean_and_std(origin, model.channels)
    return write_pretrained(
        path,
        format,
        {name: variable.numpy() for name, variable in named_weights(model).items()},
        model.get_config(),
        mean=mean,
        std=std,
        class_names=origin.class_names,
    )


def load_model(
    origin: Origin,
    *,
    image_size: int | tuple[int, int] | None = None,
    method: str = "align_corners",
    ignore: str = "",
    system: str = "",
    **told: Any,
) -> ViT:
    """Builds the ViT of a checkpoint and fills it.

    Args:
      origin: see open_origin.
      image_size, method, ignore: see export.
      system: the format to be written, which decides which tokens have positions; "" leaves the
        checkpoint's own.
      **told: keys of ViT that the checkpoint does not tell.

    Raises:
      DataError: something that ViT needs is told nowhere, or the checkpoint has tensors too many or
        too few.
    """
    # What the checkpoint tells wins over what the user tells; None means that it does not tell.
    network = {**told, **{k: v for k, v in origin.network.items() if v is not None}}
    network.setdefault("norm_epsilon", 1e-6)
    if image_size is not None:
        # A file with computed positions was trained at any size: it takes the one asked for.
        network.setdefault("image_size", as_pair(image_size))
    missing = [key for key in _UNTOLD if key not in network]
    if missing:
        raise DataError(
            f"{origin.path} does not tell {', '.join(missing)}. "
            + origin.hint({_UNTOLD[key]: "..." for key in missing})
        )
    tensors, source = dict(origin.tensors), dict(network)
    # Of what the checkpoint says, only the network: its dropout and the like are set to none.
    plain = vit_config("mu/4", image_size=4, num_classes=0)
    network = {k: v for k, v in network.items() if k in plain}
    network |= {k: plain[k] for k in _TRAINING}
    network["image_size"] = as_pair(image_size or network["image_size"])
    if system in FORMATS:
        # Only big_vision computes sin-cos positions; the other systems get them as a learned table.
        if network["posemb"] == "sincos2d" and system != "big_vision":
            height, width = (n // network["patch_size"] for n in source["image_size"])
            tensors["pos_embedding"] = sincos2d((height, width), network["width"])[None]
            network["posemb"], source["prefix_posemb"] = "learned", "none"
        network["prefix_posemb"] = prefix_posemb_for(system, {**_DEFAULTS, **network})
    # Built with new weights, all of which are replaced below.
    model = build_vit(network)
    if "norm_epsilon" not in {**told, **origin.network}:
        del source["norm_epsilon"]  # the report says that it is assumed
    origin = dataclasses.replace(origin, tensors=tensors, network=source)
    report = origin.fill(model, method=method, ignore=ignore)
    for line in report.remarks():
        logging.warning("%s: %s", origin.path, line)
    if report.new:
        # A variable without a tensor, such as attention pooling that the config names and the file
        # lacks, would be random.
        raise DataError(f"{origin.path} does not hold all of its network: {report.new[0]}")
    return model


def mean_and_std(origin: Origin, channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of images in 0..1, one number for each channel.

    Raises:
      DataError: the checkpoint does not tell.
    """
    ends = origin.black_and_white(channels)
    if ends is None:
        raise DataError(
            f"{origin.path} does not tell how images are scaled, such as to [-1, 1], which is a "
            f"mean and std of 0.5. {origin.hint({'mean': '...', 'std': '...'})}"
        )
    # A pixel v in 0..1 becomes (v - mean) / std: black = -mean / std, white = (1 - mean) / std. So
    # white - black = 1 / std. Rounded, as these were float32: 0.5 and not 0.49999997.
    black, white = np.broadcast_to(ends, (2, channels)).astype(np.float64)
    rounded = ((-black / (white - black)).round(6), (1 / (white - black)).round(6))
    return rounded[0].tolist(), rounded[1].tolist()


def eval_pipe(origin: Origin, model: ViT) -> Pipe:
    """How images become the model's input: the run's own eval_ops, or for files a plain resize."""
    if origin.checkpoint is not None:
        text = origin.checkpoint.notes["config"]["input"]["eval_ops"]
    else:
        mean, std = mean_and_std(origin, model.channels)
        text = f"decode|resize(size, antialias=True)|normalize({tuple(mean)}, {tuple(std)})"
    return parse(text, size=model.image_size, num_classes=max(model.num_classes, 1))


class Served(tf.Module):
    """From stored images to probabilities: preparation, model and activation in one module.

    Args:
      model: with a head.
      pipe: prepares an image. A pipe that does not decode belongs to a run on arrays.
      sigmoid: whether each class has a probability of its own, as after training with a sigmoid
        loss; otherwise the probabilities of all classes sum to 1.

    Attributes:
      takes_files: whether `pipe` takes the bytes of files; else it takes arrays, and `prepare`
        decodes files before it.
      classify: a tf.function of prepared images, uint8 (b, height, width, channels), to
        "probabilities" and "logits", float32 (b, C). Traced once, for `serve` and for others.
    """

    def __init__(self, model: ViT, pipe: Pipe, *, sigmoid: bool = False):
        super().__init__()
        self.model, self.pipe, self.sigmoid = model, pipe, sigmoid
        shape = (None, None, model.channels)
        self.takes_files = self._output_of(tf.TensorSpec((), tf.string)) is not None
        resizes = self.takes_files or self._output_of(tf.TensorSpec(shape, tf.uint8)) is not None
        # The shape of one image as an array; without an op that resizes it is the model's own.
        self.array_shape = shape if resizes else (*model.image_size, model.channels)
        spec = tf.TensorSpec((None, *model.image_size, model.channels), tf.uint8, "images")
        self.classify = tf.function(self._classify, autograph=False, input_signature=[spec])

    def _output_of(self, spec: tf.TensorSpec) -> tf.TensorShape | None:
        """The static shape of what the pipe makes of such an image; None if it cannot take one."""
        # Tried in a graph that is thrown away, and never run: building it shows shapes and errors.
        with tf.Graph().as_default():
            try:
                image = self._apply(tf.compat.v1.placeholder(spec.dtype, spec.shape))
            # Ops raise it for input of a wrong dtype or rank.
            except ValueError:
                return None
        known = image.dtype == tf.uint8 and image.shape.is_fully_defined()
        return image.shape if known else None

    def _apply(self, image: tf.Tensor) -> tf.Tensor:
        # A pipe takes whole examples; a random op in it draws the same for each image.
        zero = tf.constant(0, tf.int64)
        example = {"image": image, "seed": tf.zeros((2,), tf.int32), "index": zero, "epoch": zero}
        return self.pipe.host({**example, "label": tf.constant(0)})["image"]

    def prepare(self, data: tf.Tensor) -> tf.Tensor:
        """Bytes of one image file -> uint8 (height, width, channels).

        Raises:
          DataError: the run is on arrays of one size, and the image has another.
          InvalidArgumentError: the file cannot be decoded.
        """
        if self.takes_files:
            return self.prepare_array(data)
        if self.model.channels not in (1, 3):
            return self._refuse_files()
        # A run on arrays has no op that decodes: files are decoded here, in the run's channels.
        zero = tf.zeros((2,), tf.int32)
        image = parse("decode|keep('image')").host({"image": data, "seed": zero})["image"]
        if self.model.channels == 1:
            image = tf.image.rgb_to_grayscale(image)
        # In a graph the size is not known yet; there ensure_shape fails when it runs.
        if tf.executing_eagerly() and not image.shape.is_compatible_with(self.array_shape):
            raise DataError(
                f"the image is {image.shape[0]} x {image.shape[1]} pixels; this run takes images "
                f"of {' x '.join(map(str, self.model.image_size))} as they are"
            )
        return self.prepare_array(tf.ensure_shape(image, self.array_shape))

    def _refuse_files(self) -> tf.Tensor:
        text = (
            f"this run is on arrays of {self.model.channels} channels, and image files have 1 or "
            "3: give its arrays to a SavedModel (python -m vit_dist.export --format=savedmodel)"
        )
        if tf.executing_eagerly():
            raise DataError(text)
        # Traced with a SavedModel of arrays, and never asked for unless by mistake.
        with tf.control_dependencies([tf.debugging.Assert(False, [text])]):
            return tf.zeros((*self.model.image_size, self.model.channels), tf.uint8)

    def prepare_array(self, image: tf.Tensor) -> tf.Tensor:
        """One image as the pipe takes it -> uint8 (height, width, channels)."""
        shape = (*self.model.image_size, self.model.channels)
        return tf.ensure_shape(self._apply(image), shape)

    def _classify(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = self.model(self.pipe.device(images))
        activation = tf.sigmoid if self.sigmoid else tf.nn.softmax
        return {"probabilities": activation(logits), "logits": logits}

    def _prepare_all(self, images: tf.Tensor, prepare: Any) -> tf.Tensor:
        shape = (*self.model.image_size, self.model.channels)
        spec = tf.TensorSpec(shape, tf.uint8)
        # One image after the other: files have different sizes before the pipe resizes them.
        return tf.map_fn(prepare, images, fn_output_signature=spec)

    @tf.function(
        autograph=False, input_signature=[tf.TensorSpec((None,), tf.string, "image_bytes")]
    )
    def serve(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        """Bytes of image files, string (b,) -> "probabilities" and "logits", float32 (b, C)."""
        return self.classify(self._prepare_all(image_bytes, self.prepare))

    def signature(self) -> Any:
        """The function that a SavedModel serves: `serve`, or one of arrays for a run on arrays."""
        if self.takes_files:
            return self.serve

        def serve_arrays(images: tf.Tensor) -> dict[str, tf.Tensor]:
            return self.classify(self._prepare_all(images, self.prepare_array))

        spec = tf.TensorSpec((None, *self.array_shape), tf.uint8, "images")
        return tf.function(serve_arrays, autograph=False, input_signature=[spec])


def open_served(checkpoint: str, *, hint: Hint = hint) -> tuple[Served, list[str]]:
    """A checkpoint ready to classify image files, and the names of its classes.

    Args:
      checkpoint: see origins.open_origin.
      hint: says in messages what to do if the checkpoint does not tell something.

    Raises:
      DataError: the checkpoint has no head, or does not tell how images are prepared.
    """
    origin = open_origin(checkpoint, hint=hint)
    return _serve(origin, load_model(origin))


def hint_without_flags(checkpoint: str) -> Hint:
    """The Hint of a command without flags for what a file does not tell: export the file first.

    Args:
      checkpoint: the file, as the command was given it.
    """

    def hinted(settings: Mapping[str, Any]) -> str:
        return (
            f"{hint(settings)} to python -m vit_dist.export --checkpoint={shlex.quote(checkpoint)} "
            "--format=timm --output=FOLDER, and take that FOLDER"
        )

    return hinted


def _serve(origin: Origin, model: ViT) -> tuple[Served, list[str]]:
    if model.head is None:
        raise DataError(f"{origin.path} has no head: it gives features, no probabilities")
    # Files of other systems do not tell their loss; published ones are classified with softmax.
    loss = origin.checkpoint.notes["config"]["loss"]["name"] if origin.checkpoint else "softmax"
    served = Served(model, eval_pipe(origin, model), sigmoid=loss == "sigmoid")
    return served, list(origin.class_names or map(str, range(model.num_classes)))


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
    served, names = _serve(origin, model)
    path.mkdir(parents=True, exist_ok=True)
    tf.saved_model.save(served, str(path), signatures={"serving_default": served.signature()})
    labels = path / "labels.txt"
    labels.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return [path, labels]


def _write_onnx(path: Path, model: ViT, origin: Origin) -> list[Path]:
    """The network behind the preparation of files, which ONNX has no operators for."""
    import onnx
    import tf2onnx

    served, names = _serve(origin, model)
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
