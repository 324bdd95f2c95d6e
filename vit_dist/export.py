"""Writes a ViT for other systems, or to be served.

python -m vit_dist.export --checkpoint runs/NAME --format timm --output exported

--checkpoint takes what config.init_from takes: a run, or a file of another system, so this converts
between systems too. --format is one of

npz, big_vision   a .npz for vision_transformer (timm reads it as well), or for big_vision
timm              a folder for timm.create_model("local-dir:FOLDER", pretrained=True), or the
                  .safetensors alone
huggingface       a folder for transformers' from_pretrained
savedmodel        a TensorFlow SavedModel: bytes of image files in, probabilities out
keras             a .keras file: images already scaled in, logits out
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_dist.run import cli  # before TensorFlow, whose start-up notices it turns down

# isort: split
import numpy as np
import tensorflow as tf
from absl import flags

from vit_dist.data.ops.pipe import Pipe, parse
from vit_dist.model.formats.writing import FORMATS, prefix_posemb_for, write_pretrained
from vit_dist.model.posemb import METHODS, sincos2d
from vit_dist.model.variants import GELUS, as_pair, vit_config
from vit_dist.model.vit import ViT, build_vit, named_weights
from vit_dist.paths import local_path
from vit_dist.run.origins import Origin, open_origin

ALL_FORMATS = (*FORMATS, "savedmodel", "keras")
# What a run of an older version does not say of its network.
_DEFAULTS = {"prefix_posemb": "cls", "registers": 0, "layer_scale": None, "cls_token": True}
_TRAINING = ("dropout", "attention_dropout", "drop_path", "remat", "attention_block")
_UNTOLD = ("num_heads", "gelu", "norm_epsilon", "image_size")


def define_flags() -> None:
    """Defines the command's flags; not at import, where another command's would clash."""
    flags.DEFINE_string("checkpoint", None, "a run's folder, or weights of any system")
    flags.DEFINE_enum("format", "npz", ALL_FORMATS, "what to write")
    flags.DEFINE_string("output", None, "file or folder to write")
    flags.DEFINE_list("image_size", None, "pixels, or height,width: resamples positions")
    flags.DEFINE_enum("posemb_method", "align_corners", tuple(METHODS), "how it does")
    flags.DEFINE_integer("num_heads", None, "where the file does not tell")
    flags.DEFINE_enum("gelu", None, GELUS, "where the file does not tell")
    flags.DEFINE_list("mean", None, "of images in 0..1, where the file does not tell")
    flags.DEFINE_list("std", None, "the same")
    flags.DEFINE_string("ignore", "", "regex: tensors of the file that may be left out")


def main() -> int:
    """The command; returns its exit code."""
    given = flags.FLAGS
    if not given.checkpoint or not given.output:
        raise ValueError("give what to export and where to: --checkpoint runs/NAME --output FILE")
    told = {"num_heads": given.num_heads, "gelu": given.gelu}
    files = export(
        given.checkpoint,
        given.format,
        given.output,
        image_size=_image_size(given.image_size),
        method=given.posemb_method,
        ignore=given.ignore,
        mean=_numbers("mean", given.mean),
        std=_numbers("std", given.std),
        **{key: value for key, value in told.items() if value is not None},
    )
    print("wrote " + ", ".join(map(str, files)))
    return 0


def _image_size(given: Sequence[str] | None) -> tuple[int, int] | None:
    if given is None:
        return None
    if len(given) > 2 or not all(text.isdigit() and int(text) for text in given):
        raise ValueError(f"--image_size is a number of pixels, or height,width; got {given}")
    return int(given[0]), int(given[-1])


def _numbers(name: str, given: Sequence[str] | None) -> list[float] | None:
    try:
        return None if given is None else [float(text) for text in given]
    except ValueError:
        raise ValueError(f"--{name} is one number, or one for each channel; got {given}") from None


def export(
    checkpoint: str,
    format: str,
    output: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    method: str = "align_corners",
    ignore: str = "",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **told: Any,
) -> list[Path]:
    """Writes a checkpoint in another format.

    Args:
      checkpoint: see origins.open_origin.
      format: one of ALL_FORMATS.
      output: local path of the file or folder to write.
      image_size: of the model written; None for the checkpoint's own.
      method: how positions are resampled then; see posemb.resize_posemb.
      ignore: regex of tensors in the checkpoint that may be left out.
      mean, std: of images in 0..1, where the checkpoint does not tell.
      **told: keys of ViT that the checkpoint does not tell, such as num_heads.

    Returns:
      What was written.

    Raises:
      ValueError: no such checkpoint, or the format cannot hold its network.
    """
    if format not in ALL_FORMATS:
        raise ValueError(f"format {format!r} is unknown; allowed: {', '.join(ALL_FORMATS)}")
    origin = open_origin(checkpoint)
    if origin.pipe is None and origin.mean is None:
        origin = dataclasses.replace(origin, mean=mean, std=std)
    path = Path(local_path(output, "--output"))
    model = load_model(
        origin, image_size=image_size, method=method, ignore=ignore, system=format, **told
    )
    if format == "keras":
        if path.suffix != ".keras":
            raise ValueError(f"give a file that ends in .keras, not {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path)
        return [path]
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
      system: a format to be written, whose positions the model shall have; "" for its own.
      **told: keys of ViT that the checkpoint does not tell.

    Raises:
      ValueError: something that ViT needs is told nowhere, or tensors are left over.
    """
    network = {**told, **{k: v for k, v in origin.network.items() if v is not None}}
    network.setdefault("norm_epsilon", 1e-6)
    if image_size is not None:
        network.setdefault("image_size", as_pair(image_size))  # of fixed positions, not in the file
    missing = [key for key in _UNTOLD if key not in network]
    if missing:
        raise ValueError(
            f"{origin.path} does not tell {', '.join(missing)}: say it with "
            + " ".join(f"--{key}=..." for key in missing)
        )
    tensors, source = dict(origin.tensors), dict(network)
    # The network alone: how a run trained it (dropout, rematerialisation) is of no use any more.
    plain = vit_config("mu/4", image_size=4, num_classes=0)
    network = {k: v for k, v in network.items() if k in plain}
    network |= {k: plain[k] for k in _TRAINING}
    network["image_size"] = as_pair(image_size or network["image_size"])
    if system in FORMATS:
        if network["posemb"] == "sincos2d" and system != "big_vision":  # others have no such table
            height, width = (n // network["patch_size"] for n in source["image_size"])
            tensors["pos_embedding"] = sincos2d((height, width), network["width"])[None]
            network["posemb"], source["prefix_posemb"] = "learned", "none"
        network["prefix_posemb"] = prefix_posemb_for(system, {**_DEFAULTS, **network})
    model = build_vit(network)
    origin = dataclasses.replace(origin, tensors=tensors, network=source)
    origin.fill(model, method=method, ignore=ignore)
    return model


def mean_and_std(origin: Origin, channels: int) -> tuple[list[float], list[float]]:
    """Of images in 0..1, one number for each channel.

    Raises:
      ValueError: the checkpoint does not tell.
    """
    ends = origin.black_and_white(channels)
    if ends is None:
        raise ValueError(
            f"{origin.path} does not tell how images are scaled: say it with --mean and --std, "
            "for images in [-1, 1] --mean=0.5 --std=0.5"
        )
    black, white = np.broadcast_to(ends, (2, channels)).astype(np.float64)
    rounded = ((-black / (white - black)).round(6), (1 / (white - black)).round(6))
    return rounded[0].tolist(), rounded[1].tolist()


def eval_pipe(origin: Origin, model: ViT) -> Pipe:
    """How images become the model's input: the run's own eval_ops, or a plain resize."""
    if origin.checkpoint is not None:
        text = origin.checkpoint.notes["config"]["input"]["eval_ops"]
    else:
        mean, std = mean_and_std(origin, model.channels)
        text = f"decode|resize(size, antialias=True)|normalize({tuple(mean)}, {tuple(std)})"
    return parse(text, size=model.image_size, num_classes=max(model.num_classes, 1))


class Served(tf.Module):
    """The model with everything before and behind it: bytes of image files to probabilities.

    Args:
      model: with a head.
      pipe: decodes and prepares an image.
      sigmoid: whether classes are judged one by one, as a sigmoid loss does.
    """

    def __init__(self, model: ViT, pipe: Pipe, *, sigmoid: bool = False):
        super().__init__()
        self.model, self.pipe, self.sigmoid = model, pipe, sigmoid

    def prepare(self, data: tf.Tensor) -> tf.Tensor:
        """Bytes of one image file -> uint8 (height, width, channels)."""
        zero = tf.constant(0, tf.int64)
        example = {"image": data, "seed": tf.zeros((2,), tf.int32), "index": zero, "epoch": zero}
        image = self.pipe.host({**example, "label": tf.constant(0)})["image"]
        return tf.ensure_shape(image, (*self.model.image_size, self.model.channels))

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, "image_bytes")])
    def serve(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        """(B,) bytes -> "probabilities" and "logits", float32 (B, C)."""
        shape = (*self.model.image_size, self.model.channels)
        spec = tf.TensorSpec(shape, tf.uint8)
        images = tf.map_fn(self.prepare, image_bytes, fn_output_signature=spec)
        logits = self.model(self.pipe.device(images))
        activation = tf.sigmoid if self.sigmoid else tf.nn.softmax
        return {"probabilities": activation(logits), "logits": logits}


def open_served(checkpoint: str) -> tuple[Served, list[str]]:
    """A checkpoint ready to classify image files, and the names of its classes.

    Raises:
      ValueError: it has no head, or does not tell how images are prepared.
    """
    origin = open_origin(checkpoint)
    return _serve(origin, load_model(origin))


def _serve(origin: Origin, model: ViT) -> tuple[Served, list[str]]:
    if model.head is None:
        raise ValueError(f"{origin.path} has no head: it gives features, no probabilities")
    loss = origin.checkpoint.notes["config"]["loss"]["name"] if origin.checkpoint else "softmax"
    served = Served(model, eval_pipe(origin, model), sigmoid=loss == "sigmoid")
    return served, list(origin.class_names or map(str, range(model.num_classes)))


def _write_saved_model(path: Path, model: ViT, origin: Origin) -> list[Path]:
    served, names = _serve(origin, model)
    tf.saved_model.save(served, str(path), signatures={"serving_default": served.serve})
    labels = path / "labels.txt"
    labels.write_text("".join(f"{name}\n" for name in names))
    return [path, labels]


def script() -> None:
    """The program vit-dist-export: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
