"""CPU time of crop and flip from original photographs, over that from sets resized beforehand.

    .venv/bin/python benchmarks/prepared.py [--rounds 5] [--images 2048]

Originals with short sides of 375 (as ImageNet has on average), 500 and 1000 pixels are read as the
folder of JPEGs that they are, and as `vit_dist.convert --short_side=256` writes them: JPEGs of
quality 90, and raw pixels. Prints the processor, CPU time and bytes per image, and the ratios. CPU
time is that of the whole process, with one pipeline at a time in it: it says what a core can feed,
whatever else the machine does meanwhile. The originals are cut from the two photographs that
scikit-learn ships, and are in the system's cache: nothing waits for a disk.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import _smoke
from _machine import Machine
from input import CROP, WARM_UP, write_images

SIZES = {375: (500, 375), 500: (667, 500), 1000: (1333, 1000)}  # short side -> width, height
SHORT_SIDE = 256
# (short side of the originals, format) -> how many times less CPU time it should take.
GOALS = {(500, "jpeg"): 1.2, (1000, "jpeg"): 2.3, (500, "raw"): 1.8, (1000, "raw"): 3.0}
SMOKE = {"rounds": 1, "images": 16, "batch_size": 8, "files": 16, "sides": [375]}


def prepare(folder: Path, side: int, count: int) -> dict[str, tuple[dict[str, str], int]]:
    """Writes the originals and both sets. Returns by format the source's options, and its bytes."""
    from vit_dist.data.resized import convert_resized
    from vit_dist.data.sources.open import open_source
    from vit_dist.data.sources.preparation import make_preparation

    write_images(folder / "original", count, SIZES[side])
    options = {"source": "folder", "split": "train", "data_dir": str(folder / "original")}
    found, kinds = {"original": options}, {"jpeg": "array_record", "raw": "raw"}
    for kind, source in kinds.items():
        convert_resized(
            open_source(**options),
            folder / kind,
            make_preparation(SHORT_SIDE, format=kind),
            split="train",
            examples_per_shard=1024,
        )
        found[kind] = {"source": source, "split": "train", "data_dir": str(folder / kind)}
    files = {kind: [p for p in (folder / kind).rglob("*") if p.is_file()] for kind in found}
    return {kind: (found[kind], sum(p.stat().st_size for p in files[kind])) for kind in found}


def measure(options: dict[str, str], *, images: int, batch_size: int) -> float:
    """CPU milliseconds per image."""
    from vit_dist.data.ops.basic import parse
    from vit_dist.data.pipeline import make_train_data
    from vit_dist.data.sources.open import open_source

    pipe = parse(f"{CROP}|value_range")
    data = make_train_data(open_source(**options), pipe, batch_size=batch_size, seed=0, prefetch=2)
    batches = iter(data)
    # The pipeline works ahead: when measuring begins and when it ends, equally many are ready.
    for _ in range(WARM_UP):
        next(batches)
    began = time.process_time()
    for _ in range(images // batch_size):
        next(batches)
    return (time.process_time() - began) / (images // batch_size * batch_size) * 1e3


def report(
    side: int, sizes: dict[str, float], results: dict[str, list[float]], machine: Machine
) -> None:
    width, height = SIZES[side]
    texts = {
        kind: f"{statistics.median(measured):.2f} ms CPU an image of {sizes[kind] / 1e3:.0f} KB"
        for kind, measured in results.items()
    }
    for kind in [kind for kind in results if kind != "original"]:
        ratios = sorted(a / b for a, b in zip(results["original"], results[kind], strict=True))
        goal = GOALS.get((side, kind))
        machine.conclude(
            f"{width} x {height} as {kind} of {SHORT_SIDE}: {texts[kind]}, originals "
            f"{texts['original']}, {statistics.median(ratios):.2f} times less (rounds "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}, n={len(ratios)}"
            + (f"; goal {goal})" if goal else ")"),
            ratios,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--files", type=int, default=128)
    parser.add_argument("--sides", nargs="+", type=int, choices=SIZES, default=list(SIZES))
    args = _smoke.parse(parser, SMOKE)
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    for side in args.sides:
        machine = Machine(smoke=args.smoke, record=args.record)
        with tempfile.TemporaryDirectory() as folder:
            sets = prepare(Path(folder), side, args.files)
            results: dict[str, list[float]] = {kind: [] for kind in sets}
            for _ in range(args.rounds):
                for kind, (options, _) in sets.items():
                    results[kind].append(
                        measure(options, images=args.images, batch_size=args.batch_size)
                    )
            per_image = {kind: size / args.files for kind, (_, size) in sets.items()}
            report(side, per_image, results, machine)


if __name__ == "__main__":
    main()
