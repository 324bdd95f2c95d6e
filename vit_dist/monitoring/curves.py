"""The names of curves in TensorBoard, which groups them by what stands before the first slash.

metrics.jsonl keeps the names that its readers know; a metric whose name says no group there gets
one here. All others have the same name in both.
"""

GROUPS = ("train", "val", "test", "speed", "memory", "optimizer", "data", "goodput")

# Name in metrics.jsonl -> name of the curve.
_CURVES = {
    **{
        f"train/{name}": f"speed/{name}"
        for name in (
            "examples_per_second",
            "examples_per_second_per_device",
            "seconds_per_step",
            "input_stall",
        )
    },
    **{
        f"train/{name}": f"optimizer/{name}"
        for name in ("learning_rate", "grad_norm", "weight_norm", "loss_scale", "skipped_steps")
    },
    "train/epoch": "data/epoch",
    "restarts": "goodput/restarts",
}
# Damaged examples: "train/masked", and "train/masked_REASON" for each reason.
_MASKED = "train/masked"


def curve_of(name: str) -> str:
    """The name of the curve for a metric of metrics.jsonl."""
    if name.startswith(_MASKED):
        return "data" + name.removeprefix("train")
    return _CURVES.get(name, name)
