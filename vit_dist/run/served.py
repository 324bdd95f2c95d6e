"""A checkpoint as a ViT, and as what classifies image files: for export, predict and figures."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.ops.pipe import Pipe, parse
from vit_dist.model.formats.writing import FORMATS, prefix_posemb_for
from vit_dist.model.posemb import sincos2d
from vit_dist.model.variants import as_pair, vit_config
from vit_dist.model.vit import ViT, build_vit
from vit_dist.run.check import check_crop
from vit_dist.run.origins import Hint, Origin, open_origin

# Keys of ViT that runs of older versions did not record -> the only value that they could have.
_DEFAULTS = {"prefix_posemb": "cls", "registers": 0, "layer_scale": None, "cls_token": True}
# Keys of ViT that only matter in training; the written network gets their defaults.
TRAINING = (
    "dropout",
    "attention_dropout",
    "drop_path",
    "drop_path_growth",
    "remat",
    "attention_block",
)
# Keys of ViT that no tensor's shape tells and a file may not tell either -> their keys in a config.
# (norm_epsilon, too, but it has a common value: 1e-6 unless told.)
_UNTOLD = {"num_heads": "model.num_heads", "gelu": "model.gelu", "image_size": "image_size"}
# Keys of UnfitError.settings, what would make weights fit -> export's flag for it.
_FLAGS = {
    "init_image_size": "init_image_size",
    "image_size": "image_size",
    "init_ignore": "ignore",
    "model.num_heads": "num_heads",
    "model.gelu": "gelu",
    "mean": "mean",
    "std": "std",
}


def export_hint(settings: Mapping[str, Any]) -> str:
    """The origins.Hint of the command export: Say --num_heads=..."""
    flags = [f"--{_FLAGS[k]}={shlex.quote(str(v))}" for k, v in settings.items() if k in _FLAGS]
    return f"Say {' '.join(flags)}" if flags else "No flag of this command mends that"


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
      image_size: pixels, of the model to build; None for the checkpoint's own.
      method: how positions are resampled to image_size; see posemb.resize_posemb.
      ignore: regex; tensors of the checkpoint whose names it matches may be left out.
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
    network |= {k: plain[k] for k in TRAINING}
    network["image_size"] = as_pair(image_size or network["image_size"])
    if system in FORMATS:
        # Only big_vision computes sin-cos positions; the other systems get them as a learned table.
        if network["posemb"] == "sincos2d" and system != "big_vision":
            # Of the grid to be written: a fixed table is never resampled.
            height, width = (n // network["patch_size"] for n in network["image_size"])
            tensors["pos_embedding"] = sincos2d((height, width), network["width"])[None]
            network["posemb"], source["prefix_posemb"] = "learned", "none"
            source["image_size"] = network["image_size"]
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
        known = {"mean": origin.mean, "std": origin.std}
        missing = {key: "..." for key, value in known.items() if value is None}
        raise DataError(
            f"{origin.path} does not tell how images are scaled, such as to [-1, 1], which is a "
            f"mean and std of 0.5. {origin.hint(missing)}"
        )
    if ends.shape[1] not in (1, channels):
        raise DataError(
            f"{origin.path} tells mean and std of {ends.shape[1]} channels, and its network takes "
            f"{channels}: correct its config.json"
        )
    # A pixel v in 0..1 becomes (v - mean) / std: black = -mean / std, white = (1 - mean) / std. So
    # white - black = 1 / std. Rounded, as these were float32: 0.5 and not 0.49999997.
    black, white = np.broadcast_to(ends, (2, channels)).astype(np.float64)
    rounded = ((-black / (white - black)).round(6), (1 / (white - black)).round(6))
    return rounded[0].tolist(), rounded[1].tolist()


def eval_pipe(origin: Origin, model: ViT) -> Pipe:
    """How images become the model's input: the run's own eval_ops, or for files a plain resize.

    Raises:
      ConfigError: the model takes larger images than the run's eval_ops can cut out.
    """
    if origin.checkpoint is not None:
        text = origin.checkpoint.notes["config"]["input"]["eval_ops"]
    else:
        mean, std = mean_and_std(origin, model.channels)
        text = f"decode|resize(size, antialias=True)|normalize({tuple(mean)}, {tuple(std)})"
        if origin.preparation:
            logging.warning(
                "%s: assumed: a plain resize to the model's size, where the file beside it asks "
                "for %s",
                origin.path,
                origin.preparation,
            )
    pipe = parse(text, size=model.image_size, num_classes=max(model.num_classes, 1))
    # A model of another size than the run's may be larger than what the run resizes images to.
    remedy = "take a smaller --image_size, or --format=keras, which prepares no images"
    check_crop(pipe, f"{origin.path}, config.input.eval_ops", remedy=remedy)
    return pipe


class Served(tf.Module):
    """From stored images to probabilities: preparation, model and activation in one module.

    Args:
      model: with a head.
      pipe: prepares an image. A pipe that does not decode belongs to a run on arrays. ConfigError
        where it gives images of another size than the model takes.
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
        of_file = self._output_of(tf.TensorSpec((), tf.string))
        made = of_file or self._output_of(tf.TensorSpec(shape, tf.uint8))
        self.takes_files, resizes = of_file is not None, made is not None
        # A number in the pipe, as of resize(224), stays when the model is made for another size.
        if made is not None and tuple(made) != (*model.image_size, model.channels):
            raise ConfigError(
                f"the model takes images of {(*model.image_size, model.channels)}, and the pipe "
                f"{pipe} gives {tuple(made)}: take the size that it gives"
            )
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


def open_served(checkpoint: str, *, hint: Hint = export_hint) -> tuple[Served, list[str]]:
    """A checkpoint ready to classify image files, and the names of its classes.

    Args:
      checkpoint: see origins.open_origin.
      hint: says in messages what to do if the checkpoint does not tell something.

    Raises:
      DataError: the checkpoint has no head, or does not tell how images are prepared.
    """
    origin = open_origin(checkpoint, hint=hint)
    return serve(origin, load_model(origin))


def hint_without_flags(checkpoint: str) -> Hint:
    """The Hint of a command without flags for what a file does not tell: export the file first.

    Args:
      checkpoint: the file, as the command was given it.
    """

    def hinted(settings: Mapping[str, Any]) -> str:
        return (
            f"{export_hint(settings)} to python -m vit_dist.export "
            f"--checkpoint={shlex.quote(checkpoint)} --format=timm --output=FOLDER, and take that "
            "FOLDER"
        )

    return hinted


def serve(origin: Origin, model: ViT) -> tuple[Served, list[str]]:
    """What `open_served` gives, of a model that `load_model` has filled."""
    if model.head is None:
        raise DataError(f"{origin.path} has no head: it gives features, no probabilities")
    # Files of other systems do not tell their loss; published ones are classified with softmax.
    loss = origin.checkpoint.notes["config"]["loss"]["name"] if origin.checkpoint else "softmax"
    served = Served(model, eval_pipe(origin, model), sigmoid=loss == "sigmoid")
    return served, list(origin.class_names or map(str, range(model.num_classes)))
