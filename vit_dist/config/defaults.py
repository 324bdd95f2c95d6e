"""Every config key with its default, and durations.

A config file is a Python file with `get_config(arg=None)` that starts from `get_defaults()`,
changes values and returns the result. Any key can be overridden in the shell:
--config.section.key=value.
"""

import json
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict, FieldReference, FrozenConfigDict

from vit_dist.config.binding import check_range, check_type, did_you_mean
from vit_dist.config.durations import UNITS
from vit_dist.config.errors import ConfigError


class _Key(NamedTuple):
    """A key whose default alone does not tell its type or range.

    Attributes:
      default: the key's value where nobody sets it.
      type: of the key's values; object for any literal.
      range: an interval of numbers such as "[0, 1)"; inf and NaN are in no interval.
      none: whether the key may be None.
    """

    default: Any
    type: type
    range: str = ""
    none: bool = True


def _number(default: int | float, interval: str) -> _Key:
    """A key that is always a number in the interval, never None; int or float as its default."""
    return _Key(default, type(default), interval, none=False)


# Of durations, by unit; durations in other units are 0 or more.
_RANGES = {"percent": "[0, 100]", "minutes": "(0, inf)"}


def _durations(name: str, **default: int) -> dict[str, _Key]:
    """The keys name_steps, name_epochs, ... of which exactly one counts."""
    types = {"steps": int, "epochs": float, "examples": int, "percent": float, "minutes": float}
    # A whole run cannot be a percentage of itself; only saving may go by the clock.
    units = UNITS[:3] if name == "total" else UNITS if name == "save" else UNITS[:4]
    ranges = {u: _RANGES.get(u, "[0, inf)") for u in units}
    return {f"{name}_{u}": _Key(default.get(u), types[u], ranges[u]) for u in units}


# The table of all keys. A comment behind or above an entry is also its row in docs/config.md, which
# tools/config_page.py makes; the comment behind a section's name is the part that reads it.
DEFAULTS: dict[str, Any] = {
    "seed": _number(0, "[0, 2147483647]"),  # int32; of weights, data order, augmentation, dropout
    "image_size": _Key(224, object),  # pixels: an int, or (height, width); pipes call it `size`
    "precision": "float32",  # of activations: float32 | bfloat16 | float16 (with loss scaling)
    **_durations("total"),  # how long to train; required
    **_durations("log", steps=50),  # how often to write metrics
    **_durations("eval", percent=10),  # how often to evaluate on val; always at the end
    **_durations("save", percent=10),  # how often to save; always at the end
    # how often to draw the model's inside for TensorBoard, at the end, too; 0: never
    **_durations("figures", steps=0),
    "keep_checkpoints": _number(2, "[1, inf)"),  # how many of the newest stay on disk
    # "max val/accuracy" or "min NAME/METRIC" of an evaluation: kept beside them, in RUN/best
    "keep_best": _Key(None, str),
    "patience": _Key(None, int, "[1, inf)"),  # steps without a better keep_best that end the run
    "resume_from": "",  # another run's folder: continue it here, optimizer and step included
    "init_from": "",  # weights to begin with: a run's folder, .npz, .safetensors, .pth, hf://org/name
    "init_image_size": _Key(None, object),  # pixels that init_from was trained at, if no file tells
    "init_ignore": "",  # regex: tensors in init_from's file that may be left out
    "posemb_method": "align_corners",  # how init_from resamples positions; model/posemb.py
    "patch_method": "refuse",  # a patch kernel of another size: refuse | pinv (FlexiViT's)
    "imports": _Key((), object),  # modules of your own to import first, e.g. ("my_ops",)
    # further evaluations by name, e.g. {"near": {"kind": "knn", "every": 500}}; docs/judging.md
    "evals": _Key(None, object),
    "data": {  # data/sources/; keys left None take the source's own default
        # demo | folder | tfds | tfrecord | array_record | raw | synthetic | mixture
        "source": "demo",
        "train_split": "train",  # as the source names it; tfds: TFDS's syntax, "train[:99%]"
        "val_split": "val",  # "" for none
        "test_split": "test",  # evaluated once, at the end; "" for none
        "name": _Key(None, str),  # tfds: builder, e.g. imagenet2012
        "data_dir": _Key(None, str),  # tfds, folder, array_record, raw: their folder
        "file_format": _Key(None, str),  # tfds: array_record | tfrecord
        "val_fraction": _Key(None, float, "[0, 1)"),  # folder without val/: share set aside for it
        "test_fraction": _Key(None, float, "[0, 1)"),  # folder without test/: share set aside
        "files": _Key(None, str),  # tfrecord: pattern with {split}, e.g. /data/{split}-*
        "class_file": _Key(None, str),  # tfrecord: names of the classes, one a line
        "image_key": _Key(None, str),  # tfrecord: feature with the encoded image
        # tfrecord, tfds: feature with the class number; tfds, for kind "real" of evals: several
        "label_key": _Key(None, str),
        "label_file": _Key(None, str),  # folder, for kind "real" of evals: JSON, e.g. real.json
        "first_label": _Key(None, int, "(-inf, inf)"),  # tfrecord: the number of the first class
        "counts": _Key(None, object),  # tfrecord: examples by split, {"train": 1281167, ...}
        "stream": _Key(None, bool),  # tfrecord: in sequence, not by index; None: from a bucket
        "num_classes": _Key(None, int, "[1, 10000000]"),  # tfrecord without class_file; synthetic
        "num_examples": _Key(None, int, "[1, inf)"),  # synthetic: in a split
        "height": _Key(None, int, "[1, inf)"),  # synthetic: pixels of the images, before the pipe
        "width": _Key(None, int, "[1, inf)"),  # synthetic: pixels of the images, before the pipe
        "image_format": _Key(None, str),  # synthetic: jpeg | array
        "options": _Key(None, object),  # a source of your own: {name: value} for its constructor
        "parts": _Key(None, object),  # mixture: [{"source": ..., "weight": ..., options}, ...]
    },
    "input": {  # data/pipeline.py
        "batch_size": _number(1024, "[1, inf)"),  # examples per optimizer step, over all replicas
        "eval_batch_size": _number(1024, "[1, inf)"),  # over all replicas
        "train_ops": (  # data/ops/; runs on every training image
            "decode_jpeg_and_inception_crop(size)|flip_lr|value_range(-1, 1)|keep('image', 'label')"
        ),
        "eval_ops": (  # runs on every image of val and test
            "decode|resize(size)|value_range(-1, 1)|keep('image', 'label')"
        ),
        "num_threads": _Key(None, int, "[1, 1024]"),  # None: as many as tf.data finds useful
        "prefetch": _number(2, "[1, inf)"),  # batches per replica kept ready
        # repeated augmentation: copies of each example in a batch; 3 in DeiT
        "repeats": _number(1, "[1, inf)"),
        "on_bad_example": "fail",  # fail: name it and end | mask: it adds 0 to loss and accuracy
        # mask: largest share of damaged examples, of an epoch (or of all that was read, if more)
        "max_bad_share": _number(0.001, "[0, 1]"),
        "cache": "off",  # of train: off | raw (bytes of the files) | decoded (before the pipe)
        "cache_dir": "",  # a folder for the cache, kept for later runs; "": in memory
        "service": "",  # host:port,host:port of vit_dist.data_service, which makes train's batches
        # seconds that a service may send nothing before the run ends
        "service_timeout": _number(120.0, "(0, inf)"),
    },
    "mixing": {  # data/mixing.py
        "mixup_alpha": _number(0.0, "[0, inf)"),  # of Beta(alpha, alpha); 0: no mixup
        "cutmix_alpha": _number(0.0, "[0, inf)"),  # of Beta(alpha, alpha); 0: no CutMix
        "probability": _number(1.0, "[0, 1]"),  # that a batch, pair or image is mixed at all
        "switch_probability": _number(0.5, "[0, 1]"),  # of CutMix, if both alphas are positive
        "mode": "batch",  # what shares one draw: batch | pair | elem (each image its own)
        # neighbours in a batch that are mixed with each other; must divide a micro-batch
        "group_size": _number(2, "[2, inf)"),
        "fold_lambda": False,  # mixup's lambda = max(lambda, 1 - lambda), as big_vision
    },
    "model": {  # model/vit.py
        "variant": "S/16",  # size/patch
        "width": _Key(None, int, "[1, inf)"),  # in place of the variant's
        "depth": _Key(None, int, "[1, inf)"),  # in place of the variant's
        "mlp_dim": _Key(None, int, "[1, inf)"),  # in place of the variant's
        "num_heads": _Key(None, int, "[1, inf)"),  # in place of the variant's
        "pool": "gap",  # tok | gap | tok_gap | map
        "posemb": "learned",  # learned | sincos2d
        "posemb_stddev": _number(0.02, "[0, inf)"),  # initial spread of learned positions
        # representation layer before the head; -1: as wide as the model
        "rep_size": _number(0, "[-1, inf)"),
        # of positions, attention's output and both layers of the MLP
        "dropout": _number(0.0, "[0, 1)"),
        "attention_dropout": _number(0.0, "[0, 1)"),  # of attention's weights
        "drop_path": _number(0.0, "[0, 1)"),  # stochastic depth: the last block's probability
        "drop_path_growth": "linear",  # from 0 at the first block, or constant (DeiT III)
        "layer_scale": _Key(None, float, "(0, inf)"),  # initial value, e.g. 1e-4; None: without
        "gelu": "tanh",  # tanh | erf
        "qkv_bias": True,  # biases of query, key and value
        # computed again for the gradient: none | attention | attention_mlp | full | auto (fits)
        "remat": "none",
        "attention_block": _Key(None, int, "[1, inf)"),  # keys at a time, e.g. 512 for many tokens
        "softmax": "float32",  # attention's dtype: float32 | compute (the activations'; big_vision)
        "cls_token": _Key(None, bool),  # None: if the pool needs one
        "registers": _number(0, "[0, inf)"),  # further learned tokens, e.g. 4
        "prefix_posemb": "cls",  # which tokens before the patches have a position: cls | all | none
        # LayerNorm's; 1e-12 in Hugging Face's ViT and DeiT
        "norm_epsilon": _number(1e-6, "(0, inf)"),
        "norm_after_pool": False,  # timm's fc_norm
        "channels": _number(3, "[1, inf)"),  # of the images that the pipes give
        # -10 / -6.9 for sigmoid losses over 21k / 1k classes
        "head_bias": _number(0.0, "(-inf, inf)"),
    },
    "loss": {  # training/losses.py
        "name": "softmax",  # softmax | sigmoid
        "label_smoothing": _number(0.0, "[0, 1)"),  # s in labels * (1 - s) + s / number of classes
        "reduction": "sum",  # sigmoid, over the classes: sum | mean (PyTorch, DeiT III)
        # sigmoid: label shares above it count as 1, others as 0
        "threshold": _Key(None, float, "[0, 1)"),
    },
    "optimizer": {  # training/optimizer.py
        "name": "adamw",  # adamw | sgd | lamb | lion | adafactor | adafactor_vit | muon
        "learning_rate": _number(1e-3, "[0, inf)"),  # the schedule's peak
        # decoupled; from big_vision: its value / peak, or decay_scale
        "weight_decay": _number(0.1, "[0, inf)"),
        "decay_scale": "learning_rate",  # what multiplies the decay: learning_rate | schedule
        # Both are (regex, factor) pairs; the first regex found in a variable's name counts.
        "decay_multipliers": _Key((("kernel$", 1.0),), object),  # (regex, factor); no match: 0
        "lr_multipliers": _Key((), object),  # (regex, factor); factor 0 freezes; no match: 1
        # factor of the learning rate per block, from the head down, e.g. 0.75
        "layer_decay": _Key(None, float, "(0, 1]"),
        "momentum_dtype": "float32",  # dtype of stored first moments: float32 | bfloat16
        "beta_1": _number(0.9, "[0, 1)"),  # adamw, lamb, lion, adafactor_vit, muon
        "beta_2": _Key(None, float, "[0, 1)"),  # as beta_1; None: lion 0.99, else 0.999
        # None: adamw 1e-8, lamb 1e-6, muon 1e-7, adafactor* 1e-30
        "epsilon": _Key(None, float, "(0, inf)"),
        "momentum": _Key(None, float, "[0, 1)"),  # None: sgd 0.9, muon 0.95
        "shard_state": False,  # ZeRO-1: each replica holds the state of a part of the variables
    },
    "schedule": {  # training/schedules.py
        "name": "cosine",  # cosine | linear | polynomial | rsqrt | step | constant
        **_durations("warmup", steps=0),  # linear, from start_factor
        **_durations("cooldown", steps=0),  # linear, to 0 at the end
        **_durations("timescale", steps=10_000),  # rsqrt
        **_durations("hold", steps=1),  # the rate changes only once in this time
        "start_factor": _number(0.0, "[0, 1]"),  # the warmup's first learning rate / peak
        # cosine, linear, polynomial: final learning rate / peak
        "end_factor": _number(0.0, "[0, 1]"),
        "power": _number(2.0, "(0, inf)"),  # polynomial
        "milestones": _Key((30.0, 60.0, 90.0), object),  # step: percent of the run
        "drop": _number(0.1, "[0, 1]"),  # step: factor at each milestone
        "decay_from": "warmup",  # warmup: decay begins at its end | start: at step 0, as timm
    },
    "step": {  # training/step.py
        "accumulation": _number(1, "[1, inf)"),  # micro-batches per replica and step
        "clip_norm": _Key(1.0, float, "(0, inf)"),  # largest global norm; None: no clipping
        "ema_decay": _Key(None, float, "(0, 1)"),  # e.g. 0.9999; None: no moving average
        "ema_warmup": False,  # decay grows from 0, 1 - (1 + updates)^(-2/3), up to ema_decay
        "all_reduce_dtype": "float32",  # dtype in which gradients travel: float32 | bfloat16
        "jit": "auto",  # XLA: auto | whole | split | off
    },
    "monitor": {  # training/watch.py, costs/devices.py, run/judged.py; docs/monitoring.md
        # JSON or TOML: peaks of devices that the table of MFU lacks, or has wrong; "": none
        "device_file": "",
        "update_norm": False,  # the norm of each update, computed in the step
        # steps from one look at each weight, gradient and update to the next; 0: never
        "watch_steps": _number(0, "[0, inf)"),
        "histograms": True,  # with watch_steps: histograms, too, not the norms alone
        # how many images of the first batch of each start are shown; 0: none
        "batch_images": _number(16, "[0, 100]"),
        # how many of the worst and of the best images of an evaluation are shown; 0: none
        "judged_images": _number(16, "[0, 100]"),
    },
    "profile": {  # monitoring/profiler.py
        # the first step, from 0, of a profile for TensorBoard; None: no profile
        "start_step": _Key(None, int, "[0, inf)"),
        "num_steps": _number(5, "[1, 1000]"),  # how many steps are profiled
    },
    "strategy": {  # cluster/strategy.py
        "name": "auto",  # auto | single | mirrored | multiworker | tpu | local
        # split the CPU into so many devices; 0: use it whole
        "virtual_cpus": _number(0, "[0, inf)"),
        "min_devices": _number(0, "[0, inf)"),  # refuse to start with fewer, over all hosts
        "tpu": "",  # "local", a TPU's name or grpc://host:8470,...; "": TPU_NAME, else "local"
        "tpu_zone": "",  # of a TPU by name
        "tpu_project": "",  # of a TPU by name
        # the longest that a run may stand still; longer, and it ends itself, to be started again
        "timeout_seconds": _number(1800.0, "(0, inf)"),
        # how long a run may always stand still, however fast it was before
        "patience_seconds": _number(600.0, "(0, inf)"),
        # GPUs: every start gives the same bits, so that a resumed run ends as an undisturbed one
        "deterministic": False,
    },
}


def get_defaults() -> ConfigDict:
    """DEFAULTS as a locked ConfigDict: a config file changes values, a misspelt key is an error."""

    def build(section: Mapping[str, Any]) -> ConfigDict:
        config = ConfigDict()
        for key, value in section.items():
            if isinstance(value, _Key) and value.none:
                # An `object` takes a literal in the shell, so that None can be given; finalize()
                # checks the type. Strings need no quotes then, so they stay strings.
                kind = str if value.type is str else object
                value = FieldReference(value.default, field_type=kind)
            elif isinstance(value, _Key):
                value = value.default
            config[key] = build(value) if isinstance(value, dict) else value
        return config

    return build(DEFAULTS).lock()


def finalize(config: ConfigDict, overrides: Mapping[str, Any] | None = None) -> FrozenConfigDict:
    """Checks keys, types and ranges, and keeps one unit of each duration.

    The unit that is kept is the shell's, else the config file's, else the default's.

    Args:
      config: from a config file, overrides already applied.
      overrides: dotted key -> value given on the command line.

    Returns:
      A copy that cannot be changed.

    Raises:
      ConfigError: two units of one duration given in the same place, a key that is missing or
        unknown, or a value of a wrong type or out of range.
    """
    # Frozen: this function has returned it before.
    if isinstance(config, FrozenConfigDict):
        return config
    if not hasattr(config, "copy_and_resolve_references"):
        raise ConfigError(f"get_config() must return a config, got {config!r}")
    config = config.copy_and_resolve_references()
    _check_names(config, "config")
    _unset_texts(config, DEFAULTS, overrides or {})
    _check_keys(config, DEFAULTS, "config")
    # "" stands for the top of the config, which has durations of its own.
    for section_name in ("", *(k for k, v in DEFAULTS.items() if isinstance(v, dict))):
        section = config[section_name] if section_name else config
        default = get_defaults()[section_name] if section_name else get_defaults()
        prefix = f"{section_name}." if section_name else ""
        names = {k.rsplit("_", 1)[0] for k in default if k.rsplit("_", 1)[-1] in UNITS}
        for name in sorted(names):
            _keep_one(section, default, name, prefix, overrides or {})
    _freeze_lists(config)
    return FrozenConfigDict(config)


def _unset_texts(
    config: ConfigDict, defaults: Mapping[str, Any], overrides: Mapping[str, Any], prefix: str = ""
) -> None:
    """Makes None, or "" where that stands for none, of the shell's "None" for a text.

    The shell gives a key of type str its text unquoted, so that --config.data.class_file=None would
    be a file of that name.
    """
    for key, default in defaults.items():
        if isinstance(default, dict):
            if isinstance(config.get(key), ConfigDict):
                _unset_texts(config[key], default, overrides, f"{prefix}{key}.")
        elif overrides.get(prefix + key) == "None" and config.get(key) == "None":
            unset = "" if default == "" else None
            if unset == "" or (isinstance(default, _Key) and default.type is str and default.none):
                with config.unlocked(), config.ignore_type():
                    config[key] = unset


def make_section(name: str, values: Mapping[str, Any], where: str) -> ConfigDict:
    """A section of the defaults with some of its values replaced, checked as `finalize` does it.

    Args:
      name: of a section of DEFAULTS.
      values: key -> value.
      where: what messages call the section, such as "config.data".

    Raises:
      ConfigError: a key that is unknown, or a value of a wrong type or out of range.
    """
    section = get_defaults()[name]
    with section.unlocked(), section.ignore_type():
        for key, value in values.items():
            section[key] = value
    _check_keys(section, DEFAULTS[name], where)
    return section


def _check_names(config: ConfigDict, where: str, above: tuple[ConfigDict, ...] = ()) -> None:
    """What FrozenConfigDict cannot hold, and refuses with an assertion or never comes back from."""
    if any(config is section for section in above):
        raise ConfigError(f"{where} contains itself")
    for key in config:
        if not isinstance(key, str) or "." in key:
            raise ConfigError(f"{where} has the key {key!r}: keys are names, without dots")
        if isinstance(config[key], ConfigDict):
            _check_names(config[key], f"{where}.{key}", (*above, config))


def _freeze_lists(config: ConfigDict) -> None:
    """Makes dicts in lists unchangeable, such as data.parts: FrozenConfigDict takes no others."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            _freeze_lists(value)
        elif isinstance(value, list | tuple) and any(map(_is_section, value)):
            with config.unlocked(), config.ignore_type():
                config[key] = tuple(
                    MappingProxyType(dict(x)) if _is_section(x) else x for x in value
                )


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping | ConfigDict)


def _check_keys(config: ConfigDict, defaults: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for unknown and missing keys, wrong types and numbers out of range."""
    # A ConfigDict's lock does not see it when a config file replaces a whole section, so all keys
    # are compared with DEFAULTS again.
    for key in config:
        if key not in defaults:
            raise ConfigError(f"{where}.{key} is unknown{did_you_mean(key, defaults)}")
    for key, default in defaults.items():
        if key not in config:
            raise ConfigError(
                f"{where} lacks {key}: start from vit_dist.config.get_defaults() and change values "
                "in its sections"
            )
        name, value = f"{where}.{key}", config[key]
        if isinstance(default, dict):
            if not isinstance(value, ConfigDict):
                raise ConfigError(f"{name} must be a section of keys, got {value!r}")
            _check_keys(value, default, name)
        elif not isinstance(default, _Key):
            check_type(name, value, type(default))
        else:
            if default.type is not object:
                check_type(name, value, default.type | None if default.none else default.type)
            if default.range and value is not None:
                check_range(name, value, default.range, none=default.none)


def _keep_one(
    section: ConfigDict, default: ConfigDict, name: str, prefix: str, overrides: Mapping[str, Any]
) -> None:
    """Sets all units of the duration `name` but the one that counts to None, in place."""
    keys = [f"{name}_{u}" for u in UNITS if f"{name}_{u}" in default]
    given = [k for k in keys if k in section and section[k] is not None]
    shell = [k for k in given if prefix + k in overrides]
    file = [k for k in given if section[k] != default[k]]
    # The command line wins over the file, and a file's value over the default of another unit.
    chosen = shell or file or given
    if len(chosen) > 1:
        values = ", ".join(f"{prefix}{k}={section[k]}" for k in chosen)
        raise ConfigError(f"config has {values}: give the duration '{name}' in one unit only")
    with section.unlocked():
        for key in given:
            if key not in chosen:
                section[key] = None


def parse_image_size(value: Any, *, key: str = "image_size") -> tuple[int, int]:
    """(height, width) of config.image_size or another key: a positive int, or a pair of them.

    Raises:
      ConfigError: anything else.
    """
    pair = (value, value) if isinstance(value, int) else value
    if not (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair)
    ):
        raise ConfigError(f"config.{key} must be a positive int or (height, width), got {value!r}")
    return int(pair[0]), int(pair[1])


def to_json(config: ConfigDict) -> str:
    """The resolved config as indented JSON, keys sorted."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    """In JSON's types: what _freeze_lists made, and paths and NumPy's numbers of a config file."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    raise ConfigError(
        f"the config holds {value!r}, of type {type(value).__name__}, which config.json cannot "
        "hold: give text, numbers, lists or dictionaries"
    )


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The resolved config in JSON's types, tuples as lists: what a resume compares."""
    return json.loads(to_json(config))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """ "key: old -> new" for every key whose value differs, JSON values on both sides.

    A key that one of the two lacks, as versions differ, counts as its default; one that has no
    default any more, or is a name of the user's, as None.
    """
    return _changes(old, new, as_json(get_defaults()), "")


def _changes(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str
) -> list[str]:
    found = []
    for key in sorted(set(old) | set(new)):
        default = defaults.get(key)
        a, b = old.get(key, default), new.get(key, default)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = default if isinstance(default, Mapping) else {}
            found += _changes(a, b, inner, f"{prefix}{key}.")
        # As text: 1 and 1.0 are equal to Python, and NaN is not equal to itself.
        elif json.dumps(a) != json.dumps(b):
            found.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return found
