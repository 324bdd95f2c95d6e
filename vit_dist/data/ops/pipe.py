"""Preprocessing as a pipe of ops: "decode|resize(224)|flip_lr|value_range(-1, 1)|onehot(10)".

A pipe string is a Python expression and is only ever parsed, never evaluated. An op is one
function: decorated with `op`, it takes the op's parameters and returns a function example ->
example, which draws its randomness from `example["seed"]` ((2,) int32) with stateless calls. Ops
are traced without AutoGraph: branch with `tf.cond`, and among many with `switch`.

Ops that XLA can compile are compiled, together and as a loop over many images: TensorFlow's own
kernels take 5 to 10 times as long for a look-up per byte, and a branch costs nothing there.
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping

import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.data.sources.source import Source
from vit_dist.data.tracing import deviceless_graph, is_deviceless, switch

__all__ = ["Op", "Pipe", "Step", "op", "output_spec", "parse", "switch"]

# Modules that register ops when imported; parse() imports them, so that no caller has to.
OP_MODULES = tuple(
    f"vit_dist.data.ops.{name}"
    for name in ("basic", "decoding", "randaug", "autoaugment", "erasing")
)
DEFAULT_KEEP = ("image", "label")

Example = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Op:
    """A registered op: `make(*parameters)` returns the function that is applied."""

    name: str
    make: Callable
    on_device: bool
    image: bool
    compiled: bool


_REGISTRY: dict[str, Op] = {}


def op(
    make: Callable | None = None,
    *,
    on_device: bool = False,
    image: bool = True,
    compiled: bool = False,
):
    """Registers `make` as an op under its own name.

    Args:
      make: Takes the op's parameters (checking them: ValueError) and returns example -> example.
      on_device: It returns images -> images instead, which runs on a batch on the accelerator:
        (B, H, W, C) of values 0..255 -> float32 of the same shape, in XLA-compilable TensorFlow. It
        comes after all ops on the host that touch the image, and a pipe has at most one.
      image: False for an op that neither reads nor writes the image; it may stand anywhere.
      compiled: It returns (image, seed) -> image, (H, W, 3) uint8 of a static shape that it keeps,
        and XLA compiles it for the host. Those that come last among the host's ops on images run as
        one loop over a chunk of examples; it is slower to have one before others.
    """
    if make is None:
        return lambda make: op(make, on_device=on_device, image=image, compiled=compiled)
    assert make.__name__ not in _REGISTRY, f"op {make.__name__!r} is registered twice"
    _REGISTRY[make.__name__] = Op(make.__name__, make, on_device, image, compiled)
    return make


@dataclasses.dataclass(frozen=True)
class Step:
    """One op of a pipe with its parameters bound."""

    op: Op
    text: str
    position: int
    args: tuple
    apply: Callable

    def __str__(self) -> str:
        return f"pipe op {self.position} {self.text!r}"


@dataclasses.dataclass(frozen=True)
class Pipe:
    """A parsed pipe; `host` runs per example in tf.data, `device` per batch on the accelerator."""

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
          What `keep` names, by default "image" and "label" (as far as there).

        Raises:
          ConfigError: While tracing: an op does not fit what it gets. Names the op.
        """
        example = self.host_each(example)
        if not self.last:
            return example
        examples = self.host_chunk({key: value[tf.newaxis] for key, value in example.items()})
        return {key: value[0] for key, value in examples.items()}

    @tf.autograph.experimental.do_not_convert
    def host_each(self, example: Example) -> Example:
        """The part of `host` that comes before `host_chunk`, on one example."""
        seed = example["seed"]
        kept = tuple(key for key in DEFAULT_KEEP if key in example)
        for step in self.steps:
            if step.op.on_device or step in self.last:
                continue
            # Each op has a stream of its own, else a flip would go with the crop's corner.
            own = {**example, "seed": tf.random.fold_in(seed, step.position)}
            if step.op.compiled:
                image = _compiled((step,))(own["image"][tf.newaxis], seed[tf.newaxis])[0]
                own = {**own, "image": image}
            else:
                own = _apply(step, own)
            example = {**own, "seed": seed}
            if step.op.name == "keep":
                kept = step.args
        return {key: example[key] for key in ((*kept, "seed") if self.last else kept)}

    @tf.autograph.experimental.do_not_convert
    def host_chunk(self, examples: Example) -> Example:
        """The rest of `host`, on what `host_each` returned for several examples, batched."""
        if not self.last:
            return examples
        images = _compiled(self.last)(examples["image"], examples["seed"])
        kept = [step.args for step in self.steps if step.op.name == "keep"]
        dropped = () if kept and "seed" in kept[-1] else ("seed",)
        rest = {key: value for key, value in examples.items() if key not in dropped}
        return {**rest, "image": images}

    @functools.cached_property
    def last(self) -> tuple[Step, ...]:
        """The compiled ops that no other op on the host's images follows."""
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
        raise ConfigError(f"{step} needs {error}; it got {sorted(args[0])}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{step} does not fit its input: {error}") from error


@functools.lru_cache(maxsize=64)
def _compiled(steps: tuple[Step, ...]) -> Callable:
    """Returns images (B, H, W, 3) uint8, seeds (B, 2) of the examples -> images after `steps`."""

    @tf.autograph.experimental.do_not_convert
    def each(images: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        def one(element):
            image, seed = element
            for step in steps:
                image = _apply(step, image, tf.random.fold_in(seed, step.position))
            return image

        spec = tf.TensorSpec(images.shape[1:], tf.uint8)
        return tf.map_fn(one, (images, seeds), parallel_iterations=1, fn_output_signature=spec)

    function = tf.function(each, jit_compile=True)

    def run(images: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        step, shape = steps[0], images.shape[1:]
        if images.dtype != tf.uint8:
            raise ConfigError(f"{step}: the image is still encoded; put decode before this op")
        if not shape.is_fully_defined() or shape[-1] != 3:
            raise ConfigError(
                f"{step} takes images of one fixed size with 3 channels, not {shape}; put decode "
                "and resize(...) or a crop of fixed size before it"
            )
        return each(images, seeds) if is_deviceless() else function(images, seeds)

    return run


def parse(pipe: str, **names) -> Pipe:
    """Parses a pipe string.

    Args:
      pipe: Names or calls of ops joined by "|", with literals or `names` as arguments.
      **names: Values that arguments may name, e.g. `size=(224, 224), num_classes=10`.

    Raises:
      ConfigError: The string is no such expression, or an op or its arguments are wrong. Names the
        op, its position (from 1), what is allowed and the nearest known name.
    """
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
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _chain(node.left) + _chain(node.right)
    return [node]


def _parse_step(node: ast.expr, position: int, names: Mapping) -> Step:
    text = ast.unparse(node)
    where = f"pipe op {position} {text!r}"
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise ConfigError(f"{where}: expected the name or the call of an op; known: {_known()}")
    name = call.func.id
    if name not in _REGISTRY:
        raise ConfigError(f"{where}: unknown op{_nearest(name, _REGISTRY)}; known: {_known()}")
    make = _REGISTRY[name].make
    signature = inspect.signature(make)
    if any(isinstance(arg, ast.Starred) for arg in call.args) or None in (
        keyword.arg for keyword in call.keywords
    ):
        raise ConfigError(f"{where}: * and ** are not supported; the op is {name}{signature}")
    args = [_value(arg, where, names) for arg in call.args]
    kwargs = {k.arg: _value(k.value, where, names) for k in call.keywords if k.arg is not None}
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        wrong = [key for key in kwargs if key not in signature.parameters]
        near = _nearest(wrong[0], signature.parameters) if wrong else ""
        raise ConfigError(f"{where}: {error}{near}; the op is {name}{signature}") from None
    try:
        apply = make(*args, **kwargs)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}; the op is {name}{signature}") from error
    return Step(op=_REGISTRY[name], text=text, position=position, args=tuple(args), apply=apply)


def _value(node: ast.expr, where: str, names: Mapping):
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise ConfigError(
                f"{where}: unknown name {node.id!r}{_nearest(node.id, names)}; arguments are "
                f"literals or one of {sorted(names)}"
            )
        return names[node.id]
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(element, where, names) for element in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ConfigError(
            f"{where}: argument {ast.unparse(node)!r} is not a literal; arguments are literals or "
            f"one of {sorted(names)}"
        ) from None


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
                f"after the host's ops; move {device.op.name!r} behind it"
            )


def output_spec(source: Source, pipe: Pipe) -> dict[str, tf.TensorSpec]:
    """Returns what `pipe` makes of an example of `source`; reads nothing and touches no device.

    Returns:
      The tf.TensorSpec of each entry of `pipe.host`'s output, without batch dimension, and under
      "device_image" that of the image after `pipe.device`.

    Raises:
      ConfigError: An op does not fit its input, or the image has no static shape in the end.
    """
    with deviceless_graph():
        example = {
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
        device = pipe.device(image[tf.newaxis])[0]
        spec = {key: tf.TensorSpec(value.shape, value.dtype) for key, value in output.items()}
        return {**spec, "device_image": tf.TensorSpec(device.shape, device.dtype)}


# What the pipeline adds to each example.
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
