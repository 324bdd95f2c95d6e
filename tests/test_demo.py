"""The demo judges its own figures, and the README states the same ranges."""

import re
from pathlib import Path

import pytest
from absl import flags

from vit_dist import demo

ROOT = Path(__file__).resolve().parents[1]
SEEN = {"Xeon": (0.9722, 0.7472, 0.9833), "EPYC": (0.9639, 0.7639, 0.9861)}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the demo with these accuracies in the place of training; returns its exit code."""

    def run(pretrained, before, finetuned):
        results = iter((pretrained, finetuned))

        def train(config, workdir):
            # A new user is shown what the model looks like inside.
            assert config.figures_percent == 34.0
            return {"test_accuracy": next(results)}

        monkeypatch.setattr(demo, "train", train)
        monkeypatch.setattr(demo, "evaluate", lambda *_, **__: {"test": {"accuracy": before}})
        values = flags.FlagValues()
        flags.DEFINE_string("workdir", str(tmp_path), "", flag_values=values)
        values(["demo"])
        monkeypatch.setattr(flags, "FLAGS", values)
        return demo.main()

    return run


@pytest.mark.parametrize("machine", SEEN)
def test_what_was_seen_is_in_range(machine, run, capsys):
    assert run(*SEEN[machine]) == 0
    out, errors = capsys.readouterr()
    assert not errors and f"{SEEN[machine][2]:.2%}   (expected: 97 to 100 %)" in out


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("accuracy", [0.1, 0.9, 1.01, float("nan")])
def test_what_is_out_of_range_fails(index, accuracy, run, capsys):
    found = list(SEEN["EPYC"])
    found[index] = accuracy
    assert run(*found) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {list(demo.EXPECTED)[index]}: ") and "log.txt" in error


def test_the_readme_states_these_ranges():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^(\S.*?)  +test accuracy +(\d+) to (\d+) %$", text, re.M)
    assert [(name, (int(low), int(high))) for name, low, high in rows] == list(
        demo.EXPECTED.items()
    )
