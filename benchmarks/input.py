"""Images/s of the input pipeline on the CPU, against two other forms of the same pipeline.

    .venv/bin/python benchmarks/input.py [--rounds 5] [--images 2048] [--skip-timm]

The peers are the reference systems' form in tf.data (plain, image by image, floats on the host,
RandAugment through tf.switch_case) and timm with Pillow and two worker processes. All read the same
files on the same cores and take turns. Prints images/s, CPU time per image, the ratios, and where
the time goes. The files are 240 JPEGs of 500 x 375, cut from the two photographs that scikit-learn
ships.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _smoke
import numpy as np
from _machine import Machine
from PIL import Image

HERE = Path(__file__).resolve().parent
# Batches that are not counted, more than any of the pipelines holds ready.
WARM_UP = 6
CROP = "decode_jpeg_and_inception_crop(224)|flip_lr"
PIPES = {"crop": f"{CROP}|value_range", "randaug": f"{CROP}|randaug(2, 10)|value_range"}
WORDS = {"crop": "crop and flip", "randaug": "crop, flip and RandAugment"}
SMOKE = {"rounds": 1, "images": 64, "batch_size": 8, "files": 32, "pipes": ["randaug"]}
# How many times as fast as a peer this pipeline should be.
GOALS = {"reference": {"crop": 1.25, "randaug": 2.0}, "timm": {"crop": 3.0, "randaug": 3.0}}
PYTHONS = {
    "ours": (sys.executable, str(HERE / "input.py"), "--worker", "ours"),
    "reference": (sys.executable, str(HERE / "input.py"), "--worker", "reference"),
    "timm": (
        str(HERE.parent / ".venv-interop/bin/python"),
        str(HERE / "_timm_input_worker.py"),
    ),
}


def write_images(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """Writes `count` JPEGs of `size`, (width, height) of about 4 to 3, in two classes."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    random = np.random.RandomState(0)
    # Random windows of ratio 4 to 3, and qualities, so that the files differ in size and content.
    for i in range(count):
        photo = Image.fromarray(photos[i % len(photos)])
        width = random.uniform(0.6, 1.0) * min(photo.width, photo.height * 4 / 3)
        left = random.uniform(0, photo.width - width)
        top = random.uniform(0, photo.height - width * 3 / 4)
        box = (left, top, left + width, top + width * 3 / 4)
        cut = photo.resize(size, Image.Resampling.BICUBIC, box=box)
        path = folder / "train" / str(i % 2) / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cut.save(path, quality=int(random.randint(84, 93)))


def make_data(system: str, kind: str, folder: str, batch_size: int):
    """Returns the batches of our pipeline, or of the reference systems' form."""
    if system == "reference":
        import _input_peers

        files = sorted(map(str, Path(folder).rglob("*.jpg")))
        return _input_peers.make_data(files, batch_size, augmented=kind == "randaug")
    from vit_dist.data.ops import basic as ops
    from vit_dist.data.pipeline import make_train_data
    from vit_dist.data.sources import open as sources

    source = sources.open_source("folder", split="train", data_dir=folder)
    options = {"batch_size": batch_size, "seed": 0, "prefetch": 2}
    return make_train_data(source, ops.parse(PIPES[kind]), **options)


def work(system: str, folder: str, kind: str, batch_size: str) -> None:
    """The worker's process: reads numbers of images from stdin, loads them, prints the seconds."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    batches = iter(make_data(system, kind, folder, int(batch_size)))
    next(batches)
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line) // int(batch_size)):
            next(batches)
        print(time.perf_counter() - began, flush=True)


class Worker:
    """A pipeline in a process of its own, which stands still while others are measured.

    A pipeline works ahead in its own threads, so without SIGSTOP it would take the others' CPU.
    """

    def __init__(self, system: str, kind: str, folder: str, batch_size: int):
        self.batch_size = batch_size
        self.system, self.errors = system, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*PYTHONS[system], folder, kind, str(batch_size)],
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            # A session of its own, by which signals and CPU time include its worker processes.
            start_new_session=True,
        )
        # "ready": the pipeline has made its first batch.
        self.answer()
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def measure(self, images: int) -> tuple[float, float]:
        """Seconds of wall clock and of CPU per image."""
        # What was made before the stop is used up first, or it would count as made for free.
        self.signal(signal.SIGCONT)
        self.load(WARM_UP * self.batch_size)
        before = self.cpu_seconds()
        seconds = self.load(images)
        cpu = self.cpu_seconds() - before
        self.signal(signal.SIGSTOP)
        return seconds / images, cpu / images

    def load(self, images: int) -> float:
        self.process.stdin.write(f"{images}\n")
        self.process.stdin.flush()
        return float(self.answer())

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            raise SystemExit(
                f"{self.errors.read()[-2000:]}\nthe pipeline {self.system!r} ended with code {code}"
            )
        return line

    def cpu_seconds(self) -> float:
        """CPU time so far of the process and its workers."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # a process that has just ended
                # proc(5), counted from behind the program's name: 3 is the session, 11 and 12 are
                # user and system time in ticks.
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)  # reaches stopped processes too
            self.process.wait()
            # Its worker processes have become this one's (`adopt_orphans`): once waited for, their
            # CPU time counts as the benchmark's own.
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.waitpid(-self.process.pid, 0)
        self.errors.close()


def adopt_orphans() -> None:
    """Makes this process the parent of its children's children when these have ended."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER, prctl(2)


def compare(folder: str, systems: list[str], args: argparse.Namespace) -> None:
    adopt_orphans()
    for kind in args.pipes:
        machine = Machine(smoke=args.smoke, record=args.record)
        workers = {}
        try:
            for system in systems:
                workers[system] = Worker(system, kind, folder, args.batch_size)
            results = {system: [] for system in systems}
            for _ in range(args.rounds):
                for system, worker in workers.items():
                    results[system].append(worker.measure(args.images))
        finally:
            for worker in workers.values():
                worker.end()
        report(kind, results, machine)


def report(kind: str, results: dict[str, list[tuple[float, float]]], machine: Machine) -> None:
    rates = {}
    for system, measured in results.items():
        seconds, cpu = (statistics.median(column) for column in zip(*measured, strict=True))
        rates[system] = f"{1 / seconds:.0f} images/s, {cpu * 1e3:.2f} ms CPU an image"
    print(f"\n{PIPES[kind]}")
    for system in [name for name in rates if name != "ours"]:
        pairs = list(zip(results[system], results["ours"], strict=True))
        rounds = [theirs[1] / ours[1] for theirs, ours in pairs]
        wall = statistics.median(theirs[0] / ours[0] for theirs, ours in pairs)
        machine.conclude(
            f"{WORDS[kind]} beside {system}: {rates['ours']}; {system} {rates[system]}; ours is "
            f"{wall:.2f} times as fast (goal {GOALS[system][kind]}), by CPU time "
            f"{statistics.median(rounds):.2f} times (n={len(rounds)})",
            rounds,
        )


def profile(folder: str, *, rounds: int) -> None:
    """Prints the CPU time per image of the pipeline's parts, each run by one thread."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import _input_profile

    _input_profile.main(sorted(map(str, Path(folder).rglob("*.jpg")))[:64], rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--files", type=int, default=240)
    parser.add_argument("--skip-timm", action="store_true")
    parser.add_argument("--skip-profile", action="store_true")
    parser.add_argument("--profile-only", action="store_true")
    parser.add_argument("--pipes", nargs="+", choices=PIPES, default=list(PIPES))
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = _smoke.parse(parser, SMOKE)
    if args.worker:
        work(*args.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args.files)
        sizes = [path.stat().st_size for path in Path(folder).rglob("*.jpg")]
        print(f"{len(sizes)} JPEGs of 500 x 375, {np.mean(sizes) / 1e3:.0f} KB on average")
        if not args.profile_only:
            systems = [name for name in PYTHONS if name != "timm" or not args.skip_timm]
            compare(folder, systems, args)
        if not args.skip_profile:
            profile(folder, rounds=args.rounds)


if __name__ == "__main__":
    main()
