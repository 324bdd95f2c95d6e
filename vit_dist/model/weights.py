"""Weights of one ViT into another: other resolution, other pooling, other classes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_dist.model.posemb import resize_posemb
from vit_dist.model.vit import ViT, named_weights

# What may be absent from a checkpoint, or be of no use here, when pooling or task change.
_OPTIONAL = ("head/", "pre_logits/", "map_head/", "cls", "pos_embedding")


@dataclasses.dataclass
class LoadReport:
    """What became of every tensor, by name."""

    loaded: list[str] = dataclasses.field(default_factory=list)
    resized: list[str] = dataclasses.field(default_factory=list)  # "name (1,16,64) -> (1,64,64)"
    replaced: list[str] = dataclasses.field(default_factory=list)  # keeps its initial value here
    skipped: list[str] = dataclasses.field(default_factory=list)  # of the checkpoint, not used

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors unchanged"]
        for title in ("resized", "replaced", "skipped"):
            names = getattr(self, title)
            lines += [f"{title}: {name}" for name in names]
        return "\n".join(lines)


def adapt_weights(
    model: ViT,
    arrays: Mapping[str, np.ndarray],
    *,
    source: Mapping[str, Any],
    method: str = "align_corners",
) -> LoadReport:
    """Loads the weights of another ViT of ours, resampling its positions to this one's grid.

    A head for another number of classes stays as this model has it (recipes: zeros); a fixed
    sincos2d table is this model's own, computed for its grid.

    Args:
      model: takes the weights; nothing is changed if an error is raised.
      arrays: name -> array, the names those of named_weights.
      source: the other ViT's get_config(): at least image_size, patch_size, pool, gelu; num_heads
        where it is known, since no shape tells it.
      method: how positions are resampled; see posemb.resize_posemb.

    Raises:
      ValueError: the two are not the same network: names what differs and what to set.
    """
    _check_numerics(model, source)
    report, values = LoadReport(), {}
    variables = named_weights(model)
    # A head learnt on the representation layer means nothing without it, and the reverse.
    same_features = ("pre_logits/kernel" in arrays) == ("pre_logits/kernel" in variables)
    for name, variable in variables.items():
        want = tuple(variable.shape)
        if name not in arrays:
            if not name.startswith(_OPTIONAL):
                raise ValueError(f"the checkpoint has no {name}; its model is another one")
            report.replaced.append(f"{name} {want}, which the checkpoint lacks")
            continue
        value, have = arrays[name], tuple(arrays[name].shape)
        if name == "pos_embedding":
            value = _resampled(model, value, source, method)
        if name.startswith("head/") and not same_features:
            report.replaced.append(f"{name} {want}, as model.rep_size differs")
        elif tuple(value.shape) == want:
            values[name] = value
            if value is arrays[name]:
                report.loaded.append(name)
            else:
                report.resized.append(f"{name} {have} -> {want} ({method})")
        elif name.startswith("head/"):
            report.replaced.append(f"{name} {want}, the checkpoint's is {have}")
        else:
            raise ValueError(
                f"{name} is {have} in the checkpoint and {want} in this config: "
                "set model.variant (and width, mlp_dim, rep_size) as it was trained"
            )
    _account_for_rest(report, arrays, variables)
    for name, value in values.items():
        variables[name].assign(value)
    return report


def _check_numerics(model: ViT, source: Mapping[str, Any]) -> None:
    remedies = {"gelu": "model.gelu", "patch_size": "the patch in model.variant"}
    if "num_heads" in source:
        remedies["num_heads"] = "model.num_heads"
    for key, remedy in remedies.items():
        have, want = source[key], model.get_config()[key]
        if have != want:
            raise ValueError(
                f"the checkpoint was trained with {key} {have!r}, this config has {want!r}: "
                f"set {remedy} to match"
            )


def _resampled(model: ViT, table: np.ndarray, source: Mapping[str, Any], method: str) -> np.ndarray:
    """The position table for the model's grid; the very same array if it fits already."""
    old_prefix = int(source["pool"] == "tok")
    if _grid(source) == model.grid and old_prefix == model.prefix:
        return table
    return resize_posemb(
        table,
        old_grid=_grid(source),
        new_grid=model.grid,
        old_prefix=old_prefix,
        new_prefix=model.prefix,
        method=method,
    )


def _account_for_rest(
    report: LoadReport, arrays: Mapping[str, np.ndarray], variables: Mapping[str, Any]
) -> None:
    for name in sorted(set(arrays) - set(variables)):
        if not name.startswith(_OPTIONAL):
            raise ValueError(
                f"the checkpoint has {name}, which this config has no place for: set "
                "model.variant, model.depth and model.layer_scale as it was trained"
            )
        report.skipped.append(f"{name} {tuple(arrays[name].shape)}")


def _grid(source: Mapping[str, Any]) -> tuple[int, int]:
    height, width = source["image_size"]
    return height // source["patch_size"], width // source["patch_size"]
