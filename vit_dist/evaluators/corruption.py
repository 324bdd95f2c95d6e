"""Errors on groups of sets, such as ImageNet-C's corruptions (arXiv 1903.12261), in one number."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vit_dist.config.errors import ConfigError
from vit_dist.evaluators.named import Named


@dataclasses.dataclass(frozen=True)
class CorruptionError(Named):
    """What other evaluations found, averaged.

    Attributes:
      members: names of these evaluations, each with "accuracy" and "examples".
    """

    members: tuple[str, ...] = ()


def make_corruption_error(
    *, of: Mapping[str, Any], baseline: Mapping[str, Any] | None = None
) -> CorruptionError:
    """Makes a function of the metrics of other evaluations.

    Args:
      of: group (a corruption) -> names of evaluations (its severities).
      baseline: group -> the error of another model in it, a share: the mean over the severities.

    Returns:
      A function whose metrics are "error/GROUP", the mean of 1 - accuracy over the group;
      "mean_error", the mean of these over the groups; and with `baseline` "mce": the mean of
      error / baseline over the groups, which is the sum of a corruption's errors over that of the
      baseline's, averaged over corruptions. All are shares, not percent.

    Raises:
      ConfigError: an empty group, or a baseline that has other groups or no errors.
    """
    for group, names in of.items():
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise ConfigError(
                f"of[{group!r}] must be a list of names in config.evals, got {names!r}"
            )
    if not of:
        raise ConfigError("of must name groups of evaluations, got {}")
    if baseline is not None and set(baseline) != set(of):
        raise ConfigError(
            f"baseline must give an error for each group of `of`: {sorted(of)}, got "
            f"{sorted(baseline)}"
        )
    for group, error in (baseline or {}).items():
        if isinstance(error, bool) or not isinstance(error, (int, float)) or not 0 < error <= 1:
            raise ConfigError(f"baseline[{group!r}] must be a share in (0, 1], got {error!r}")

    def evaluate(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        errors = {
            group: 1 - sum(found[name]["accuracy"] for name in names) / len(names)
            for group, names in of.items()
        }
        relative = [errors[group] / error for group, error in (baseline or {}).items()]
        return {
            **({"mce": sum(relative) / len(relative)} if relative else {}),
            "mean_error": sum(errors.values()) / len(errors),
            **{f"error/{group}": error for group, error in errors.items()},
        }

    def metric_names(class_names: Sequence[str], num_train: int) -> Sequence[str]:
        mce = ("mce",) if baseline else ()
        return (*mce, "mean_error", *(f"error/{group}" for group in of))

    members = tuple(dict.fromkeys(name for names in of.values() for name in names))
    return CorruptionError(evaluate, metric_names, members)
