"""Weights of one ViT into another: other resolution, patches, channels, pooling, classes."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vit_dist.config.errors import DataError
from vit_dist.model.classes import ClassMatch, match_classes
from vit_dist.model.formats.foreign import explain_names
from vit_dist.model.formats.mapping import Arrays
from vit_dist.model.load_report import LoadReport
from vit_dist.model.patches import change_channels, resize_kernel
from vit_dist.model.posemb import resize_posemb
from vit_dist.model.unfit import UnfitError
from vit_dist.model.vit import ViT, named_weights

PATCH_METHODS = ("refuse", "pinv")
# Beginnings of the names of tensors that a checkpoint may lack, or have without a use here, where
# pooling or task differ.
_OPTIONAL = ("head/", "pre_logits/", "map_head/", "cls", "registers", "pos_embedding")
# Keys of ViT's config that must be equal where both sides know them. Shapes would show some of the
# differences, one at a time; compared here, one message names all.
_NETWORK = ("width", "depth", "mlp_dim", "num_heads", "gelu", "norm_epsilon", "qkv_bias")
# Keys whose value no shape shows: where the file does not tell, the config's is assumed.
_UNTOLD = ("num_heads", "gelu", "norm_epsilon")


def adapt_weights(
    model: ViT,
    arrays: Arrays,
    *,
    source: Mapping[str, Any],
    method: str = "align_corners",
    patch_method: str = "refuse",
    unused: Sequence[str] = (),
    unknown: Sequence[str] = (),
    ignore: str = "",
    classes: tuple[Sequence[str], Sequence[str]] = ((), ()),
    assumed: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> LoadReport:
    """Loads the weights of another ViT, resampling its positions to this one's grid.

    A head for other classes, or on other features, keeps this model's initial values (zeros in the
    recipes). A fixed sincos2d table is computed for this model's grid, and not loaded. If a token
    before the patches has a position in the checkpoint and none here, the position is added to the
    token itself: the network computes the same.

    Args:
      model: takes the weights; nothing is changed if an error is raised.
      arrays: name -> array or LazyArray, the names those of named_weights; read one at a time.
      source: the other ViT's get_config(), as far as known; image_size is needed for positions.
      method: how positions are resampled; see posemb.resize_posemb.
      patch_method: for a kernel of another patch size: "refuse" it, or resample it by "pinv"
        (FlexiViT's pseudo-inverse).
      unused: names, in the file, of what is known to be no part of a ViT; for the report.
      unknown: names, in the file, of tensors that nothing accounts for: an error.
      ignore: regex of names; an `unknown` tensor, or one that has no place here, is reported as
        unused if it matches, and is no error.
      classes: names of the classes in the order of the checkpoint's head, and in the order wanted;
        () where a side does not know. The same names in another order reorder the head; other
        names make it new.
      assumed, notes: lines for the report, of what the file does not tell and of what else to know.

    Raises:
      UnfitError: the two are not the same network, or tensors are left over: says all that differs,
        and carries what would have to be set.
      DataError: shapes that no setting mends.
    """
    _check_network(model, source, arrays, patch_method)
    # Tensors in the file that no rule has read: another network's, until the user says otherwise.
    names = [n for n in unknown if not _matches(ignore, n)]
    if names:
        meaning = explain_names(names)
        raise UnfitError(
            f"the checkpoint has tensors that no ViT of ours has: {', '.join(names[:5])}"
            f"{', ...' if len(names) > 5 else ''} "
            f"({meaning + ' is not supported' if meaning else 'another kind of network'})"
            ". If the network computes the same without them, they can be left out",
            {"init_ignore": re.escape(names[0])},
        )
    report = LoadReport(unused=[*unused, *(n for n in unknown if n not in names)])
    report.notes += notes
    report.assumed = [
        *assumed,
        *(
            f"{key} {model.get_config()[key]!r}, which the file does not tell"
            for key in _UNTOLD
            if source.get(key) is None
        ),
    ]
    # First everything is decided by shapes, so that an error leaves the model as it was; then the
    # numbers are read, one tensor at a time.
    match = match_classes(*classes)
    plan = _Plan(model, arrays, source, method, report, match)
    values = plan.make(ignore)
    if match.assumed and "head/kernel" in values:
        report.assumed.append(match.assumed)
    variables = named_weights(model)
    # Arrays that are cut from one tensor of the file (a fused qkv) are read one after the other, so
    # that the tensor is read once: see containers.open_tensors.
    for name in sorted(values, key=lambda n: getattr(arrays.get(n), "source", n)):
        variables[name].assign(values[name]())
    return report


def _matches(pattern: str, name: str) -> bool:
    return bool(pattern) and re.search(pattern, name) is not None


def _check_network(
    model: ViT, source: Mapping[str, Any], arrays: Arrays, patch_method: str
) -> None:
    """Raises UnfitError, with all that differs and what to set."""
    mine = model.get_config()
    wrong: list[str] = []
    settings: dict[str, Any] = {}

    def differs(key: str, value: Any) -> None:
        wrong.append(f"{key} {value!r} (here {mine[key]!r})")
        settings[f"model.{key}"] = value

    for key in _NETWORK:
        have = source.get(key)
        # Exact but for epsilon, which a file may have stored in float32.
        same = have == mine[key] or (key == "norm_epsilon" and _near(have, mine[key]))
        if have is not None and not same:
            differs(key, have)
    # LayerScale is trained: only whether there is one must agree, not its initial value.
    scaled = "encoderblock_0/layer_scale_0/gamma" in arrays
    if scaled != (mine["layer_scale"] is not None):
        differs("layer_scale", 1e-5 if scaled else None)
    patch = source.get("patch_size")
    if patch not in (None, mine["patch_size"]) and patch_method == "refuse":
        wrong.append(
            f"patch_size {patch} (here {mine['patch_size']}: take a variant with /{patch}, or "
            "resample the kernel)"
        )
        settings["patch_method"] = "pinv"
    # Pooling by one token commutes with the LayerNorm, so only for "gap" and "map" its place
    # matters. With different poolings there is nothing to compare.
    pools = {source.get("pool"), mine["pool"]}
    after = source.get("norm_after_pool")
    if len(pools) == 1 and pools <= {"gap", "map"} and after not in (None, mine["norm_after_pool"]):
        differs("norm_after_pool", after)
    if wrong:
        raise UnfitError(
            f"the checkpoint is another network than the config's: {', '.join(wrong)}", settings
        )


def _near(a: Any, b: float) -> bool:
    return a is not None and math.isclose(a, b, rel_tol=1e-3)


class _Plan:
    """Decides, from shapes alone, where each variable's value comes from.

    Args:
      model, arrays, source, method: see adapt_weights.
      report: gets a line for each tensor.
      classes: whether and how the head's classes fit.
    """

    def __init__(
        self,
        model: ViT,
        arrays: Arrays,
        source: Mapping[str, Any],
        method: str,
        report: LoadReport,
        classes: ClassMatch,
    ):
        self.model, self.arrays, self.source = model, arrays, source
        self.method, self.report, self.classes = method, report, classes
        self.mine = model.get_config()
        self.values: dict[str, Callable[[], np.ndarray]] = {}
        registers = arrays["registers"].shape[1] if "registers" in arrays else 0
        entries = {"cls": int("cls" in arrays), "none": 0}
        entries["all"] = entries["cls"] + registers
        # Entries before the patches in the table of positions, (for the cls token, for registers),
        # of the checkpoint ("theirs") and of this model ("ours").
        self.theirs, self.ours = (0, 0), (0, 0)
        if "pos_embedding" in arrays:
            self.theirs = _entries(entries[source.get("prefix_posemb", "cls")], entries["cls"])
        if model.posemb == "learned":
            self.ours = _entries(model.posemb_prefix, int(model.cls_token))
        # Which key makes the head's input differ from what the checkpoint's head has learnt on; ""
        # for none. Such a head is not loaded.
        self.other_features = ""
        if _shape(arrays, "pre_logits/kernel") != _shape(named_weights(model), "pre_logits/kernel"):
            self.other_features = "model.rep_size"
        # A pool that is not known is taken to be this model's.
        elif source.get("pool", self.mine["pool"]) != self.mine["pool"]:
            self.other_features = "model.pool"

    def make(self, ignore: str) -> dict[str, Callable[[], np.ndarray]]:
        """Variable's name -> a function that reads its value; others keep their initial values."""
        variables = named_weights(self.model)
        # Every variable of the model: taken, changed, or left as it is.
        for name, variable in variables.items():
            want = tuple(variable.shape)
            if name not in self.arrays:
                if not name.startswith(_OPTIONAL):
                    raise DataError(f"the checkpoint has no {name}: it is another network")
                self.report.new.append(f"{name} {want}, which the checkpoint lacks")
                if name == "pos_embedding":
                    self.report.notes.append(
                        "the positions are new, as the checkpoint computes its own (sincos2d)"
                    )
            elif name == "pos_embedding":
                self._positions(want)
            elif name == "embedding/kernel":
                self._kernel(want)
            elif name.startswith("head/") and self.other_features:
                self.report.new.append(f"{name} {want}, as {self.other_features} differs")
            elif name.startswith("head/") and self.classes.other:
                self.report.new.append(f"{name} {want}, as {self.classes.other}")
                if name == "head/kernel":
                    self.report.notes.append(f"the head is new: {self.classes.other}")
            elif name.startswith("head/") and self.classes.order is not None:
                self._reordered(name, want)
            else:
                self._take(name, want)
        # Every tensor of the checkpoint that is left: of a part that the model does without.
        for name in sorted(set(self.arrays) - set(variables)):
            if not name.startswith(_OPTIONAL) and not _matches(ignore, name):
                raise DataError(
                    f"the checkpoint has {name}, which this model has no place for: it is another "
                    "network"
                )
            self.report.unused.append(f"{name} {tuple(self.arrays[name].shape)}")
            if name == "pos_embedding":
                self.report.notes.append(
                    "the checkpoint's positions are left out, as this model computes its own "
                    "(sincos2d)"
                )
        return self.values

    def _read(self, name: str) -> np.ndarray:
        return np.asarray(self.arrays[name], np.float32)

    def _take(self, name: str, want: tuple[int, ...]) -> None:
        have = tuple(self.arrays[name].shape)
        folded = self._lost_positions(name)
        if have == want:
            if folded is not None:
                # token + position is what the network saw: now it is in the token.
                self.values[name] = lambda: self._read(name) + folded()
                self.report.resized.append(f"{name} {want}, with its position added")
            else:
                self.values[name] = lambda: self._read(name)
                self.report.loaded.append(name)
        elif name.startswith(("head/", "registers", "pre_logits/")):
            self.report.new.append(f"{name} {want}, the checkpoint's is {have}")
        else:
            raise DataError(f"{name} is {have} in the checkpoint and {want} here: another network")

    def _reordered(self, name: str, want: tuple[int, ...]) -> None:
        """Takes a head that has the wanted classes in another order."""
        have, order = tuple(self.arrays[name].shape), self.classes.order
        if have != want:
            self._take(name, want)
            return
        # Outputs are the last axis, of kernel (D, C) and bias (C,).
        self.values[name] = lambda: self._read(name)[..., order]
        self.report.mapped.append(f"{name} {want}, its classes by name in the order of the data")

    def _lost_positions(self, name: str) -> Callable[[], np.ndarray] | None:
        """Returns how to read the positions of tokens `name` for which this model has none.

        None where `name` is no token before the patches, or keeps its positions.
        """
        index = ("cls", "registers").index(name) if name in ("cls", "registers") else -1
        if index < 0 or not self.theirs[index] or self.ours[index]:
            return None
        # The table begins with the cls token's entry, if any; registers follow.
        begin = index * self.theirs[0]
        return lambda: self._read("pos_embedding")[:, begin : begin + self.theirs[index]]

    def _positions(self, want: tuple[int, ...]) -> None:
        have = tuple(self.arrays["pos_embedding"].shape)
        old_grid, new_grid = _grid(self.source), self.model.grid
        prefix = sum(self.theirs)
        if len(have) != 3 or have[1] != prefix + old_grid[0] * old_grid[1] or have[2] != want[2]:
            raise DataError(
                f"a position table of shape {have} does not hold {prefix} prefix tokens and a grid "
                f"of {old_grid[0]}x{old_grid[1]} in width {want[2]}"
            )
        if old_grid == new_grid and self.theirs == self.ours:
            self._take("pos_embedding", want)
            return

        def resampled() -> np.ndarray:
            # Entries of tokens before the patches have no place in the grid: they stay apart.
            table = self._read("pos_embedding")
            cls, registers, patches = np.split(table, (self.theirs[0], prefix), axis=1)
            patches = resize_posemb(
                patches, old_grid=old_grid, new_grid=new_grid, method=self.method
            )
            parts = zip((cls, registers), self.ours, strict=True)
            return np.concatenate([*(_with_length(t, n) for t, n in parts), patches], axis=1)

        self.values["pos_embedding"] = resampled
        how = self.method if old_grid != new_grid else "as the tokens before the patches differ"
        self.report.resized.append(f"pos_embedding {have} -> {want} ({how})")

    def _kernel(self, want: tuple[int, ...]) -> None:
        name = "embedding/kernel"
        have = tuple(self.arrays[name].shape)
        if have == want:
            self._take(name, want)
            return
        if len(have) != 4 or have[3] != want[3]:
            raise DataError(f"{name} is {have} in the checkpoint and {want} here: another network")

        def changed() -> np.ndarray:
            kernel = self._read(name)
            # Channels first: they are summed or repeated pixel by pixel, whatever the size of a
            # patch.
            if have[2] != want[2]:
                kernel = change_channels(kernel, want[2])
            return resize_kernel(kernel, want[0]) if have[:2] != want[:2] else kernel

        self.values[name] = changed
        how = [
            *(["channels repeated or summed"] if have[2] != want[2] else []),
            *(["pinv"] if have[:2] != want[:2] else []),
        ]
        self.report.resized.append(f"{name} {have} -> {want} ({', '.join(how)})")


def _grid(source: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) of the patches of another ViT."""
    height, width = source["image_size"]
    return height // source["patch_size"], width // source["patch_size"]


def _shape(tensors: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _entries(total: int, cls: int) -> tuple[int, int]:
    """Divides `total` entries before the patches: the cls token's (at most `cls`), and the rest."""
    return min(total, cls), total - min(total, cls)


def _with_length(entries: np.ndarray, count: int) -> np.ndarray:
    """(1, n, D) -> (1, count, D): cut, or filled up with zeros."""
    missing = max(count - entries.shape[1], 0)
    return np.pad(entries[:, :count], ((0, 0), (0, missing), (0, 0)))
