"""Some 800 JPEGs to try fine-tuning with: windows of the photographs that packages bring along.

    python -m tests.support.photographs photos --count=800 [--apart]

One directory for each photograph: scikit-learn's temple and flower, the portrait that comes with
Matplotlib, and nine of scikit-image's, each where its package is installed. Each image is a window
of it, mirrored or not, in other light and colours, of 384 px or more: photographic, as JPEGs of all
sizes and qualities, but easy, as the held-out images show what others of the same class show.

Not with --apart: windows of the left three fifths are in photos/train, of the rest in photos/val,
so no pixel that is judged was seen in training.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

SOURCES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "portrait": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
}
# With --apart: split -> which part of a photograph's width it shows, and its share of the images.
APART = {"train": ((0.0, 0.6), 0.8), "val": ((0.6, 1.0), 0.2)}
SMALLEST = 384  # of an image's shorter side


def sources() -> dict[str, Path]:
    """Class -> the photograph, as far as its package is installed."""
    found = {}
    for name, (package, file) in SOURCES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin and (Path(spec.origin).parent / file).exists():
            found[name] = Path(spec.origin).parent / file
    return found


def make_photographs(
    folder: Path, *, count: int, seed: int = 0, apart: bool = False
) -> dict[str, int]:
    """Writes folder/CLASS/001.jpg ..., with `apart` folder/SPLIT/CLASS; returns their numbers."""
    rng, made = np.random.default_rng(seed), {}
    for index, (name, path) in enumerate(found := sorted(sources().items())):
        with Image.open(path) as file:
            photograph = file.convert("RGB")
        made[name] = count // len(found) + (index < count % len(found))
        for split, ((left, right), share) in (APART if apart else {"": ((0, 1), 1)}).items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            width, height = photograph.size
            part = photograph.crop((round(left * width), 0, round(right * width), height))
            for i in range(round(share * made[name])):
                image = _variant(part, rng)
                path = folder / split / name / f"{i + 1:03d}.jpg"
                image.save(path, quality=int(rng.integers(60, 96)))
    return made


def _variant(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A window of a tenth of the area or more, in other light."""
    share, ratio = rng.uniform(0.1, 0.9), np.exp(rng.uniform(-0.3, 0.3))
    side = (share * photograph.width * photograph.height) ** 0.5
    width = int(min(side * ratio, photograph.width))
    height = int(min(side / ratio, photograph.height))
    left = int(rng.integers(0, photograph.width - width + 1))
    top = int(rng.integers(0, photograph.height - height + 1))
    shorter = int(rng.integers(SMALLEST, 513))
    scale = shorter / min(width, height)
    size = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
    image = photograph.resize(
        size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
    )
    image = ImageOps.mirror(image) if rng.random() < 0.5 else image
    image = ImageOps.grayscale(image).convert("RGB") if rng.random() < 0.3 else image
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(rng.uniform(0.5, 1.5))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=800)
    parser.add_argument("--apart", action="store_true", help="val shows other parts than train")
    given = parser.parse_args()
    made = make_photographs(given.folder, count=given.count, apart=given.apart)
    print(*(f"{n} {name}" for name, n in made.items()))
