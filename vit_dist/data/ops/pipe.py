"""Preprocessing as a pipe of ops: "decode|resize(224)|flip_lr|value_range(-1, 1)|onehot(10)".

A pipe string is a Python expression and is only ever parsed, never evaluated. An op is one
function: decorated with `op`, it takes the op's parameters and returns a function example ->
example, which draws its randomness from `example["seed"]` ((2,) int32) with stateless calls. Ops
are traced without AutoGraph: branch with `tf.cond`, and among many with `switch`.

Ops registered with `compiled=True` are compiled by XLA for the CPU of the host. A run of such ops
at the end of the pipe is compiled together, as one loop over a chunk of images. XLA's code takes a
fifth to a tenth of the time of TensorFlow's kernels for a look-up per byte, and a branch in it
costs nothing.

An op of your own is a function with the decorator `op` in a module that config.imports names.
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.data.ops.windows import whole
from vit_dist.data.sources.source import Source
from vit_dist.data.tracing import deviceless_graph, is_deviceless, switch

__all__ = ["Op", "Pipe", "Step", "op", "output_spec", "parse", "switch"]

# Modules that register ops when they are imported; parse() imports them, so that no caller has to.
OP_MODULES = tuple(
    f"vit_dist.data.ops.{name}"
    for name in ("basic", "decoding", "randaug", "autoaugment", "erasing")
)
DEFAULT_KEEP = ("image", "label")

Example = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Op:
    """A registered op; see the decorator `op`."""

    name: str
    make: Callable  # takes the op's parameters and returns the function that is applied
    on_device: bool  # whether that function takes a batch, in the step on the accelerator
    image: bool  # whether it reads or writes the image
    compiled: bool  # whether XLA compiles it for the host
    windows: bool = False  # whether it takes images that have not been read, `windows.Windowed`


_REGISTRY: dict[str, Op] = {}


def op(
    make: Callable | None = None,
    *,
    on_device: bool = False,
    image: bool = True,
    compiled: bool = False,
    windows: bool = False,
):
    """Registers `make` as an op under its own name.

    Args:
      make: Takes the op's parameters, checks them (ValueError) and returns example -> example.
      on_device: If true, `make` returns a function of a batch of images instead: (B, H, W, C) of
        values 0..255 -> float32 of the same shape, in TensorFlow that XLA compiles. It runs in the
        step, on the accelerator. A pipe has at most one, after all ops that touch the image.
      image: If false, the op neither reads nor writes the image and may stand anywhere.
      compiled: If true, `make` returns (image, seed) -> image, which takes (H, W, 3) uint8 of a
        static shape, must keep that shape, and is compiled by XLA for the CPU. Put such ops last:
        they then run as one loop over a chunk of examples. One that an op without `compiled`
        follows runs image by image, which is slower.
      windows: If true, "image" may also be a `windows.Windowed`, of which the op reads what it
        needs. Other ops get the whole image.

    Raises:
      ConfigError: Another function has registered an op of that name.
    """
    if make is None:
        return lambda make: op(
            make, on_device=on_device, image=image, compiled=compiled, windows=windows
        )
    # A config file may be executed twice, which makes new functions of the same names. They come
    # from one file, and replace each other.
    old = _REGISTRY.get(make.__name__)
    if old is not None and _origin(old.make) != _origin(make):
        raise ConfigError(
            f"op {make.__name__!r} of {_origin(make)} has the name of an op of "
            f"{_origin(old.make)}: rename it"
        )
    _REGISTRY[make.__name__] = Op(make.__name__, make, on_device, image, compiled, windows)
    return make


def _origin(make: Callable) -> str:
    """Returns the file that defines an op."""
    return make.__code__.co_filename


@dataclasses.dataclass(frozen=True)
class Step:
    """One op of a pipe with its parameters bound."""

    op: Op
    text: str  # as in the pipe, for messages
    position: int  # from 1; folded into the seed, so that each op draws numbers of its own
    args: tuple  # as given by position
    apply: Callable
    # All arguments by name, defaults included. Left out of comparisons, as a dict cannot be hashed
    # and Steps are keys of the cache of `_compiled`; `text` and `args` tell them apart.
    arguments: dict[str, Any] = dataclasses.field(compare=False, default_factory=dict)

    def __str__(self) -> str:
        return f"pipe op {self.position} {self.text!r}"


@dataclasses.dataclass(frozen=True)
class Pipe:
    """A parsed pipe; `host` runs per example in tf.data, `device` per batch in the step.

    For speed, `host` has two parts: `host_each` runs on one example, and applies all ops but the
    compiled ops at the end; `host_chunk` applies these to a batch of what `host_each` returned.
    """

    text: str
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return self.text

    @tf.autograph.experimental.do_not_convert
    def host(self, example: Example) -> Example:
        """Applies the host's ops to one example.

        Args:
          example: Tensors without batch dimension; with "seed", (2,) int32, of this example.

        Returns:
          The entries that keep(...) names; by default "image" and "label", where present.

        Raises:
          ConfigError: While tracing: an op does not fit what it gets. Names the op.
        """
        # do_not_convert: tf.data would else pass the ops through AutoGraph, which is slow and not
        # needed.
        example = self.host_each(example)
        if not self.compiled_tail:
            return example
        # A chunk of one example.
        examples = self.host_chunk({key: value[tf.newaxis] for key, value in example.items()})
        return {key: value[0] for key, value in examples.items()}

    @tf.autograph.experimental.do_not_convert
    def host_each(self, example: Example) -> Example:
        """Applies all ops of the host to one example but those of `compiled_tail`.

        Where there is such a tail, the result holds the "seed" that it needs.
        """
        seed = example["seed"]
        # What is returned, unless a keep(...) says otherwise; the last one counts.
        kept = tuple(key for key in DEFAULT_KEEP if key in example)
        for step in self.steps:
            if step.op.on_device or step in self.compiled_tail:
                continue
            # An image that has not been read stays so as far as ops can choose what to read of it.
            if "image" in example and not step.op.windows and step.op.image:
                example = {**example, "image": whole(example["image"])}
            # Each op gets a seed of its own: from a common one, whether an image is mirrored and
            # where it was cropped would be drawn from the same numbers.
            own = {**example, "seed": tf.random.fold_in(seed, step.position)}
            if step.op.compiled:
                # With the example's own seed, as over_batch folds in the position itself.
                image = _compiled((step,))(own["image"][tf.newaxis], seed[tf.newaxis])[0]
                own = {**own, "image": image}
            else:
                own = _apply(step, own)
            # The example's seed again, for the next op; keep(...) may also have dropped it.
            example = {**own, "seed": seed}
            if step.op.name == "keep":
                kept = step.args
        found = {key: example[key] for key in ((*kept, "seed") if self.compiled_tail else kept)}
        # Where no op has read the image, it is read here.
        return {key: whole(value) for key, value in found.items()}

    @tf.autograph.experimental.do_not_convert
    def host_chunk(self, examples: Example) -> Example:
        """Applies `compiled_tail` to what `host_each` returned for several examples, batched."""
        if not self.compiled_tail:
            return examples
        images = _compiled(self.compiled_tail)(examples["image"], examples["seed"])
        kept = [step.args for step in self.steps if step.op.name == "keep"]
        # host_each added the seed for this tail alone, unless the pipe asks for it.
        dropped = () if kept and "seed" in kept[-1] else ("seed",)
        rest = {key: value for key, value in examples.items() if key not in dropped}
        return {**rest, "image": images}

    @functools.cached_property
    def compiled_tail(self) -> tuple[Step, ...]:
        """The compiled ops at the end of the host's ops on images."""
        # Taken from the end backwards, up to the first op that is not compiled, then put in order
        # again.
        images = [step for step in self.steps if step.op.image and not step.op.on_device]
        return tuple(itertools.takewhile(lambda step: step.op.compiled, images[::-1]))[::-1]

    def device(self, images: tf.Tensor) -> tf.Tensor:
        """Returns a batch of images, (B, H, W, C) in 0..255, as the model's float32 input."""
        for step in self.steps:
            if step.op.on_device:
                images = step.apply(images)
        return tf.cast(images, tf.float32)


def _apply(step: Step, *args):
    try:
        return step.apply(*args)
    except KeyError as error:
        # The op asked for an entry that the example does not have.
        raise ConfigError(f"{step} needs {error}; it got {sorted(args[0])}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{step} does not fit its input: {error}") from error


# Cached by Steps, so that every trace of one Pipe finds the same function, with what XLA has
# compiled for it.
@functools.lru_cache(maxsize=64)
def _compiled(steps: tuple[Step, ...]) -> Callable:
    """Returns a function of images (B, H, W, 3) uint8 and the examples' seeds (B, 2) int32.

    It applies `steps` to each image in one XLA-compiled loop, and returns the images, likewise.
    """

    def over_batch(images: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        def one_image(element):
            image, seed = element
            for step in steps:
                image = _apply(step, image, tf.random.fold_in(seed, step.position))
            return image

        spec = tf.TensorSpec(images.shape[1:], tf.uint8)
        # One image at a time: the pipeline's other threads work on other chunks.
        return tf.map_fn(
            one_image, (images, seeds), parallel_iterations=1, fn_output_signature=spec
        )

    jitted = tf.function(over_batch, jit_compile=True, autograph=False)

    def checked(images: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        step, shape = steps[0], images.shape[1:]
        # While tracing, so that the message comes before any data is read.
        if images.dtype != tf.uint8:
            raise ConfigError(f"{step}: the image is still encoded; put decode before this op")
        if not shape.is_fully_defined() or shape[-1] != 3:
            raise ConfigError(
                f"{step} takes images of one fixed size with 3 channels, not {shape}; put decode "
                "and resize(...) or a crop of fixed size before it"
            )
        # Where only shapes are asked for, nothing is compiled: that would start a device.
        return over_batch(images, seeds) if is_deviceless() else jitted(images, seeds)

    return checked


def parse(pipe: str, **names) -> Pipe:
    """Parses a pipe string.

    Args:
      pipe: Names or calls of ops joined by "|", with literals or `names` as arguments.
      **names: Values that arguments may name, e.g. `size=(224, 224), num_classes=10`.

    Raises:
      ConfigError: The string is no such expression, or an op or its arguments are wrong. Names the
        op, its position (from 1), what is allowed and the nearest known name.
    """
    # Here and not at the top, because these modules import this one.
    for module in OP_MODULES:
        importlib.import_module(module)
    try:
        body = ast.parse(pipe.strip(), mode="eval").body
    except SyntaxError as error:
        raise ConfigError(
            f"pipe {pipe!r} is not a chain of ops joined by '|': {error.msg} at character "
            f"{error.offset}"
        ) from None
    nodes = _chain(body)
    steps = tuple(_parse_step(node, i, names) for i, node in enumerate(nodes, 1))
    _check_order(steps)
    return Pipe(text=pipe.strip(), steps=steps)


def _chain(node: ast.expr) -> list[ast.expr]:
    # Python reads "a|b|c" as (a|b)|c, so the chain goes on at the left.
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _chain(node.left) + _chain(node.right)
    return [node]


def _parse_step(node: ast.expr, position: int, names: Mapping) -> Step:
    text = ast.unparse(node)
    where = f"pipe op {position} {text!r}"
    # An op without arguments needs no brackets: "flip_lr" is flip_lr().
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise ConfigError(f"{where}: expected the name or the call of an op; known: {_known()}")
    name = call.func.id
    if name not in _REGISTRY:
        raise ConfigError(f"{where}: unknown op{_nearest(name, _REGISTRY)}; known: {_known()}")
    make = _REGISTRY[name].make
    signature = inspect.signature(make)
    # A keyword without a name is "**".
    if any(isinstance(arg, ast.Starred) for arg in call.args) or None in (
        keyword.arg for keyword in call.keywords
    ):
        raise ConfigError(f"{where}: * and ** are not supported; the op is {name}{signature}")
    args = [_value(arg, where, names) for arg in call.args]
    kwargs = {k.arg: _value(k.value, where, names) for k in call.keywords if k.arg is not None}
    try:
        # Bound first, so that a wrong name is told from an error inside of the op.
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        wrong = [key for key in kwargs if key not in signature.parameters]
        near = _nearest(wrong[0], signature.parameters) if wrong else ""
        raise ConfigError(f"{where}: {error}{near}; the op is {name}{signature}") from None
    try:
        apply = make(*args, **kwargs)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}; the op is {name}{signature}") from error
    bound.apply_defaults()
    return Step(_REGISTRY[name], text, position, tuple(args), apply, dict(bound.arguments))


def _value(node: ast.expr, where: str, names: Mapping):
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise ConfigError(
                f"{where}: unknown name {node.id!r}{_nearest(node.id, names)}; arguments are "
                f"literals or one of {sorted(names)}"
            )
        return names[node.id]
    if isinstance(node, (ast.Tuple, ast.List)):
        # A list becomes a tuple: Steps are hashed with their arguments.
        return tuple(_value(element, where, names) for element in node.elts)
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise ConfigError(
            f"{where}: argument {ast.unparse(node)!r} is not a literal; arguments are literals or "
            f"one of {sorted(names)}"
        ) from None
    # 1e999 is a literal of Python's, too. No op has a use for it, and few would notice.
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value} is no finite number")
    return value


def _check_order(steps: tuple[Step, ...]) -> None:
    device = None
    for step in steps:
        if step.op.on_device and device is not None:
            raise ConfigError(
                f"{step}: {str(device)!r} has scaled the image already, and each such op expects "
                "values 0..255; use one of them"
            )
        if step.op.on_device:
            device = step
        elif step.op.image and device is not None:
            raise ConfigError(
                f"{step} works on uint8 images on the host, and {device} runs on the accelerator "
                f"after the host's ops: write {device.op.name!r} after {step.op.name!r}"
            )


def output_spec(source: Source, pipe: Pipe) -> dict[str, tf.TensorSpec]:
    """Returns the specs of an example of `source` after `pipe`; reads nothing, touches no device.

    Returns:
      The tf.TensorSpec of each entry of `pipe.host`'s output, without batch dimension, and under
      "device_image" that of the image after `pipe.device`.

    Raises:
      ConfigError: An op does not fit its input, or the image has no static shape in the end.
    """
    with deviceless_graph():
        example = {
            # Nodes that stand for an example; nothing is ever fed to them.
            key: tf.compat.v1.placeholder(spec.dtype, spec.shape)
            for key, spec in {**source.element_spec, **POSITION_SPEC}.items()
        }
        output = pipe.host(example)
        if "image" not in output:
            raise ConfigError(f"pipe {str(pipe)!r} drops the image: name it in keep(...)")
        image = output["image"]
        if image.dtype == tf.string:
            raise ConfigError(f"pipe {str(pipe)!r} never decodes the image: begin with decode")
        if not image.shape.is_fully_defined():
            raise ConfigError(
                f"pipe {str(pipe)!r} leaves images of varying shape {image.shape}; end it with "
                "resize(...) or a crop of fixed size"
            )
        # As a batch of one image, whose axis goes again.
        device = pipe.device(image[tf.newaxis])[0]
        spec = {key: tf.TensorSpec(value.shape, value.dtype) for key, value in output.items()}
        return {**spec, "device_image": tf.TensorSpec(device.shape, device.dtype)}


# What the pipeline adds to each example: its number in the source, the epoch, and a seed of both.
POSITION_SPEC = {
    "index": tf.TensorSpec((), tf.int64),
    "epoch": tf.TensorSpec((), tf.int64),
    "seed": tf.TensorSpec((2,), tf.int32),
}


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _known() -> str:
    return ", ".join(sorted(_REGISTRY))
