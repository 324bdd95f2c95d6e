"""The peer of input.py: timm's transforms and PyTorch's DataLoader, with two worker processes.

Runs in an interpreter of its own, which `make bench` installs. Reads numbers of images from stdin,
loads them and prints the seconds, until stdin ends. Batches are uint8, as timm's prefetcher takes
them.
"""

import sys
import time
from pathlib import Path

import _torch_alone  # noqa: F401 (before timm)
import torch
from PIL import Image
from timm.data import create_transform


class Images(torch.utils.data.IterableDataset):
    """Endless images of a folder, in a random order."""

    def __init__(self, files, transform):
        self.files, self.transform = files, transform

    def __iter__(self):
        # Each worker process has an order of its own.
        generator = torch.Generator().manual_seed(torch.utils.data.get_worker_info().id)
        while True:
            for i in torch.randperm(len(self.files), generator=generator).tolist():
                with Image.open(self.files[i]) as image:
                    yield torch.as_tensor(self.transform(image.convert("RGB")))


def main() -> None:
    folder, kind, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    transform = create_transform(
        224,
        is_training=True,
        use_prefetcher=True,  # leaves uint8, scaled on the device
        scale=(0.05, 1.0),
        interpolation="bilinear",
        color_jitter=None,
        auto_augment="rand-m9-inc1" if kind == "randaug" else None,
    )
    files = sorted(map(str, Path(folder).rglob("*.jpg")))
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(Images(files, transform), batch_size, num_workers=2)
    batches = iter(loader)
    next(batches)
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line) // batch_size):
            next(batches)
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
