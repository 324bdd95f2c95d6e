"""What a new user gets wrong: one message that begins with "error:", exit code 2, no traceback."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tensorflow as tf
from PIL import Image

from tests.support import processes, tiny
from vit_dist.run import cli
from vit_dist.run.check import check

ROOT = Path(__file__).resolve().parents[2]
DEMO = ("--config=configs/demo.py", "--workdir=WORK")
HEAD = "from vit_dist.config import get_defaults\ndef get_config(arg=''):\n    c = get_defaults()\n"

# flags -> parts of the message. WORK is a fresh folder with what `files` puts there; DEMO above.
FLAGS = [
    # the command line
    ((), ["give a config file: --config configs/demo.py"]),
    (("--workdir=WORK",), ["give a config file: --config"]),
    (("--config=configs/demo.py",), ["give a folder for this run: --workdir runs/NAME"]),
    ((*DEMO, "runs/x"), ["unexpected argument 'runs/x'", "flags begin with --"]),
    ((*DEMO, "--wrokdir=x"), ["flag 'wrokdir'", "workdir"]),
    (("--config.seed=1", "--workdir=WORK"), ["give a config file before --config.seed"]),
    (("--config.seed=1", *DEMO), ["--config.seed=1", "before", "--config"]),
    ((*DEMO, "--config.image_sise=8"), ["--config.image_sise", "did you mean 'image_size'?"]),
    ((*DEMO, "--config.model.widht=8"), ["--config.model.widht", "did you mean 'width'?"]),
    ((*DEMO, "--config.modle.width=8"), ["'modle'", "did you mean 'model'?"]),
    ((*DEMO, "--config.seed=abc"), ["--config.seed=abc"]),
    ((*DEMO, "--config.model.depth=1.5"), ["config.model.depth must be int or None, got 1.5"]),
    ((*DEMO, "--config.model.qkv_bias=maybe"), ["qkv_bias=maybe"]),
    ((*DEMO, "--config.image_size=big"), ["config.image_size", "(height, width)", "'big'"]),
    # the config file
    (("--config=configs/nope.py", "--workdir=WORK"), ["configs/nope.py does not exist"]),
    (("--config=configs/nope.py", "--workdir=WORK", "--config.seed=1"), ["does not exist"]),
    (("--config=configs/demo.py:x", "--workdir=WORK"), ["demo.py:", ":pretrain or :finetune"]),
    (("--config=WORK/syntax.py", "--workdir=WORK"), ["WORK/syntax.py:4: "]),
    (("--config=WORK/raises.py", "--workdir=WORK"), ["WORK/raises.py:4: ", "division by zero"]),
    (("--config=WORK/reads.py", "--workdir=WORK"), ["WORK/reads.py:4: No such file", "/nowhere"]),
    (("--config=WORK/empty.py", "--workdir=WORK"), ["empty.py has no function get_config"]),
    (("--config=WORK/none.py", "--workdir=WORK"), ["WORK/none.py returns None"]),
    (("--config=WORK/other.py", "--workdir=WORK"), ["get_config() must return a config, got 3"]),
    (
        ("--config=WORK/unknown.py", "--workdir=WORK"),
        ["WORK/unknown.py:4: ", "'image_sise'; did you mean 'image_size'?"],
    ),
    (("--config=WORK/nested.py", "--workdir=WORK"), ["nested.py:4: ", "did you mean 'width'?"]),
    (("--config=WORK/type.py", "--workdir=WORK"), ["WORK/type.py:4: ", "'dropout'", "float"]),
    (("--config=WORK/section.py", "--workdir=WORK"), ["config.model.widht is unknown", "'width'"]),
    # values
    ((*DEMO, "--config.input.train_ops=flip|keep('image')"), ["op 1 'flip'", "'flip_lr'"]),
    ((*DEMO, "--config.input.eval_ops=resize(siez)"), ["op 1", "'siez'", "'size'"]),
    ((*DEMO, "--config.input.eval_ops=resize(size"), ["not a chain of ops"]),
    ((*DEMO, "--config.image_size=18"), ["18x18", "4x4", "multiple of 4"]),
    (
        (*DEMO, "--config.strategy.deterministic=True", "--config.step.jit=off"),
        ["strategy.deterministic", "step.jit=off", "step.jit=auto"],
    ),
    ((*DEMO, "--config.strategy.virtual_cpus=3"), ["128", "3 replicas", "nearest", "129"]),
    (
        (*DEMO, "--config.strategy.virtual_cpus=2", "--config.step.accumulation=3"),
        ["128", "2 replicas x 3 micro-batches", "126"],
    ),
    (
        (*DEMO, "--config.total_epochs=3", "--config.total_steps=9"),
        ["total_steps=9", "total_epochs=3", "one unit only"],
    ),
    (("--config=WORK/endless.py", "--workdir=WORK"), ["config.total is not set", "total_epochs"]),
    ((*DEMO, "--config.total_steps=9", "--config.schedule.warmup_steps=9"), ["9 steps of warmup"]),
    ((*DEMO, "--config.optimizer.name=adam"), ["'adam' is unknown", "adamw, sgd"]),
    (
        (*DEMO, "--config.optimizer.lr_multipliers=(('^haed/', 10.0),)"),
        ["lr_multipliers", "'^haed/' matches no variable"],
    ),
    # data
    ((*DEMO, "--config.data.source=foldre"), ["'foldre'", "'folder'"]),
    ((*DEMO, "--config.data.source=folder"), ["data_dir"]),
    ((*DEMO, "--config.data.source=folder", "--config.data.data_dir=WORK/no"), ["WORK/no"]),
    (
        (*DEMO, "--config.data.source=folder", "--config.data.data_dir=WORK/images"),
        ["WORK/images/cats", "holds no image"],
    ),
    (
        (*DEMO, "--config.data.source=folder", "--config.data.data_dir=WORK/damaged"),
        ["WORK/damaged/dogs/1.png", "is not an image"],
    ),
    ((*DEMO, "--config.data.test_split=tset"), ["no split 'tset'"]),
    ((*DEMO, "--config.data.source=tfds", "--config.data.name=mnits"), ["'mnits'", "mnist"]),
    # folders of runs
    ((*DEMO, "--config.init_from=WORK/no"), ["no checkpoint at WORK/no", "no such folder"]),
    ((*DEMO, "--config.init_from=WORK/images"), ["no whole checkpoint at WORK/images"]),
    ((*DEMO, "--config.resume_from=WORK/no"), ["no checkpoint at WORK/no"]),
    (("--config=configs/demo.py", "--workdir=WORK/file"), ["workdir WORK/file", "--workdir"]),
    (("--config=configs/demo.py", "--workdir=WORK/file/run"), ["workdir WORK/file/run"]),
    # machines
    ((*DEMO, "--config.strategy.name=multiworker"), ["TF_CONFIG", "launch/workers.sh"]),
    ((*DEMO, "--config.strategy.name=tpu"), ["found no TPU 'local'", "strategy.name=auto"]),
    ((*DEMO, "--config.strategy.name=mirorred"), ["'mirorred'", "mirrored"]),
    ((*DEMO, "--config.strategy.name=single", "--config.strategy.virtual_cpus=2"), ["'single'"]),
]
REAL = [7, 18]  # of FLAGS: also with `python -m`, to see that a fork is no different


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder that WORK stands for."""
    work = tmp_path_factory.mktemp("work")
    bodies = {
        "syntax": "    return c +\n",
        "raises": "    1 / 0\n",
        "reads": "    open('/nowhere')\n",
        "none": "",
        "other": "    return 3\n",
        "unknown": "    c.image_sise = 8\n    return c\n",
        "nested": "    c.model.widht = 8\n    return c\n",
        "type": "    c.model.dropout = 'x'\n    return c\n",
        "section": "    c.model = type(c)({**c.model, 'widht': 3})\n    return c\n",
        "endless": "    return c\n",
    }
    for name, body in bodies.items():
        (work / f"{name}.py").write_text(HEAD + body)
    (work / "empty.py").write_text("")
    (work / "file").write_text("")
    for folder in ("images/cats", "images/dogs", "damaged/cats", "damaged/dogs"):
        (work / folder).mkdir(parents=True)
        if folder != "images/cats":
            Image.new("RGB", (8, 8)).save(work / folder / "0.png")
    (work / "damaged" / "dogs" / "1.png").write_text("no image")
    return work


def in_folder(flags, work):
    return [flag.replace("WORK", str(work)) for flag in flags]


def check_output(code, text, parts, work):
    messages = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(messages) == 1, text
    for part in parts:
        assert part.replace("WORK", str(work)) in messages[0], messages[0]
    assert "Traceback" not in text
    assert code == 2
    return messages[0]


@pytest.mark.parametrize(
    "flags,parts", FLAGS, ids=[" ".join(flags) or "none" for flags, _ in FLAGS]
)
def test_one_message_says_what_was_given_and_what_to_do(flags, parts, work, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, text = processes.run(*in_folder(flags, work), log=tmp_path / "log")
    check_output(code, text, parts, work)


@pytest.mark.slow
def test_the_real_command_says_the_same(work):
    def run(flags):
        command = [sys.executable, "-m", "vit_dist.train", *in_folder(flags, work)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        for number, done in zip(REAL, pool.map(run, [FLAGS[i][0] for i in REAL]), strict=True):
            check_output(done.returncode, done.stderr, FLAGS[number][1], work)
            assert done.stdout == ""


def test_a_mistake_of_ours_keeps_its_traceback(capsys):
    """Only what a user can mend is cut down to a message."""

    def main():
        return {}["missing"]

    with pytest.raises(SystemExit) as left:
        cli._guard(lambda _: main())(None)
    assert left.value.code == 1
    assert "Traceback" in capsys.readouterr().err


def check_and_then_set_devices():
    check(tiny.get_config())
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    assert len(tf.config.list_logical_devices("CPU")) == 2


def test_checking_touches_no_device(tmp_path):
    """After check() the logical devices can still be set."""
    code, text = processes.call(check_and_then_set_devices, log=tmp_path / "log")
    assert code == 0, text[-3000:]
