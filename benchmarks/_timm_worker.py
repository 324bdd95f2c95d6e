"""The peer of train_step.py and workers.py: the same step by timm on PyTorch, eager, float32, CPU.

With WORLD_SIZE it is one of several workers under DistributedDataParallel with gloo. Runs in an
interpreter of its own, which `make bench` installs. Reads numbers of steps from stdin, runs them
and prints the seconds, until stdin ends.
"""

import os
import sys
import time

import _torch_alone  # noqa: F401 (before timm)
import timm
import torch

NAMES = {"Ti/16": "vit_tiny_patch16_224", "S/16": "vit_small_patch16_224"}


def main() -> None:
    variant, size, depth, batch_size, threads = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(
        NAMES[variant], pretrained=False, num_classes=1000, img_size=size, depth=depth
    ).train()
    num_params = sum(p.numel() for p in model.parameters())
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    if workers > 1:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    share = batch_size // workers
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    loss_fn = torch.nn.CrossEntropyLoss()
    images = torch.randint(0, 256, (share, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(0, 1000, (share,))
    print("ready", num_params, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        # As our step: scale uint8 images, forward, backward, clip by the global norm, AdamW.
        for _ in range(int(line)):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(model(images.float() / 127.5 - 1), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
