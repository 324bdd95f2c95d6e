"""Some 800 JPEGs to try fine-tuning with: windows of the photographs that packages bring along.

    python -m tests.support.photographs photos --count=800

One directory for each photograph: scikit-learn's temple and flower, and the portrait that comes
with Matplotlib, where that is installed. Each image is a window of it, mirrored or not, in other
light and colours, of 384 px or more: photographic, as JPEGs of all sizes and qualities, but easy,
as the held-out images show what others of the same class show.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

SOURCES = {
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "portrait": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
}
SMALLEST = 384  # of an image's shorter side


def sources() -> dict[str, Path]:
    """Class -> the photograph, as far as its package is installed."""
    found = {}
    for name, (package, file) in SOURCES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin and (Path(spec.origin).parent / file).exists():
            found[name] = Path(spec.origin).parent / file
    return found


def make_photographs(folder: Path, *, count: int, seed: int = 0) -> dict[str, int]:
    """Writes folder/CLASS/001.jpg ...; returns how many of each class."""
    rng, made = np.random.default_rng(seed), {}
    for index, (name, path) in enumerate(found := sorted(sources().items())):
        (folder / name).mkdir(parents=True, exist_ok=True)
        with Image.open(path) as file:
            photograph = file.convert("RGB")
        made[name] = count // len(found) + (index < count % len(found))
        for i in range(made[name]):
            image = _variant(photograph, rng)
            image.save(folder / name / f"{i + 1:03d}.jpg", quality=int(rng.integers(60, 96)))
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
    given = parser.parse_args()
    print(*(f"{n} {name}" for name, n in make_photographs(given.folder, count=given.count).items()))
