"""The compiler of another environment: what it is asked once, and how it fails."""

import json
import stat
from pathlib import Path

import pytest

from vit_dist.config.errors import ConfigError, UserError
from vit_dist.costs.compiled import Compiled, Compiler, TooLarge, cache_folder
from vit_dist.costs.tpu_compiler import exceeded, schedule_of

FIGURES = {
    "arguments": 100,
    "outputs": 90,
    "aliased": 80,
    "temp": 1000,
    "code": 7,
    "accessed": 5e6,
    "flops": 2e6,
    "cycles": 4e6,
    "offchip": 3e6,
    "seconds": 3.0,
}
VERSIONS = {"jax": "1", "jaxlib": "1", "libtpu": "1"}


@pytest.fixture
def python(tmp_path):
    """Makes an executable that answers like an environment's Python, and notes its calls."""

    def make(found, versions=VERSIONS, name="python"):
        path = tmp_path / name
        path.write_text(
            "#!/bin/sh\n"
            f'echo "$@" >> {path}.calls\n'
            f"if [ \"$3\" = --versions ]; then echo '{json.dumps(versions)}'; exit; fi\n"
            f'cp "$4" {path}.program\n'
            + (f"echo '{json.dumps(found)}'\n" if found else "echo broken >&2; exit 3\n")
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def calls(path):
    with open(f"{path}.calls") as file:
        return [line.split()[2] for line in file]


@pytest.mark.spawns
def test_a_program_is_compiled_once(python, tmp_path):
    path = python(FIGURES)
    for _ in range(2):
        compiler = Compiler(path, cache=str(tmp_path / "cache"))
        found = compiler.compile(b"program", "v5e:1x1")
        assert found == Compiled(**FIGURES)
    # What aliases an argument takes no memory of its own.
    assert found.memory == 100 + 90 - 80 + 1000 + 7
    assert calls(path) == ["--versions", "v5e:1x1", "--versions"]
    with open(f"{path}.program", "rb") as file:
        assert file.read() == b"program"
    # Another program, another topology, another compiler: each is something else.
    compiler.compile(b"another", "v5e:1x1")
    compiler.compile(b"program", "v6e:1x1")
    newer = python(FIGURES, {**VERSIONS, "libtpu": "2"}, name="newer")
    Compiler(newer, cache=str(tmp_path / "cache")).compile(b"program", "v5e:1x1")
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_where_it_is_kept(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_folder()) == "/somewhere/vit_dist/tpu_compile"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert str(cache_folder()) == "/home/user/.cache/vit_dist/tpu_compile"


@pytest.mark.spawns
def test_a_refusal_is_kept_too(python, tmp_path):
    path = python({"needed": 3e10, "limit": 1.6e10, "seconds": 5.0})
    for _ in range(2):
        found = Compiler(path, cache=str(tmp_path)).compile(b"program", "v5e:1x1")
        assert found == TooLarge(3e10, 1.6e10, 5.0)
    assert calls(path).count("v5e:1x1") == 1


@pytest.mark.spawns
def test_a_cache_that_fails_costs_no_answer(python, tmp_path):
    (tmp_path / "file").write_text("no folder")
    compiler = Compiler(python(FIGURES), cache=str(tmp_path / "file"))
    assert compiler.compile(b"program", "v5e:1x1") == Compiled(**FIGURES)
    compiler = Compiler(compiler.python, cache=str(tmp_path / "cache"))
    compiler.compile(b"program", "v5e:1x1")
    compiler.kept(b"program", "v5e:1x1").write_text('{"torn')
    assert compiler.compile(b"program", "v5e:1x1") == Compiled(**FIGURES)


@pytest.mark.spawns
def test_a_compiler_that_breaks_says_why_and_keeps_nothing(python, tmp_path):
    compiler = Compiler(python(None), cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="broken"):
        compiler.compile(b"program", "v5e:1x1")
    assert not (tmp_path / "cache").exists()


@pytest.mark.spawns
def test_an_environment_that_lacks_it(python, tmp_path):
    compiler = Compiler(python(FIGURES, {**VERSIONS, "libtpu": None}), cache=str(tmp_path))
    with pytest.raises(ConfigError, match=r"has no libtpu: .*tpu-compile"):
        compiler.compile(b"program", "v5e:1x1")
    # A processor's programs need JAX alone.
    assert isinstance(compiler.compile(b"program", "cpu"), Compiled)


@pytest.mark.spawns
@pytest.mark.parametrize("path", ["/nowhere/python", "/", "/bin/cat", "/bin/true"])
def test_what_is_no_python(path):
    with pytest.raises(ConfigError, match=r"(?s)is no Python that runs.*tpu-compile"):
        Compiler(path)


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (47.30G) exceeds available HBM (15.75G). HLO "
            "module: step.",
            {"needed": 47.30 * 2**30, "limit": 15.75 * 2**30},
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 16500.5M of 15.75G hbm. Exceeded hbm capacity by 370M.",
            {"needed": 16500.5 * 2**20, "limit": 15.75 * 2**30},
        ),
        ("RESOURCE_EXHAUSTED: no number", {"needed": 0, "limit": 0}),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_what_the_compiler_says_of_memory(message, found):
    assert exceeded(message) == found


# A program as libtpu's compiler prints it, shortened. S(1) is the chip's own memory, S(2) and S(6)
# are for semaphores and scalars. Computations of fusions have no memory of their own.
SCHEDULED = (Path(__file__).parents[1] / "fixtures" / "scheduled_for_tpu.txt").read_text()


@pytest.mark.parametrize(
    ("turns", "times"), [('backend_config={"known_trip_count":{"n":"4"}}', 4), ("metadata={}", 1)]
)
def test_what_leaves_the_chip_and_how_long_it_takes(turns, times):
    text = SCHEDULED.replace("TURNS", turns)
    found = schedule_of(text)
    assert found["cycles"] == 1000 + times * 50
    whole, part = 8 * 128, 2 * 128
    # The copy and the slice read once; the fusion reads b and writes its first result; the loop's
    # fusion reads x.
    assert found["offchip"] == 2 * whole + 4 * part + 2 * 4 * whole + times * 4 * whole


def test_a_program_that_cannot_be_read():
    with pytest.raises(ValueError, match="without end"):
        schedule_of(SCHEDULED.replace("copy-start(%a)", "copy-start(%a"))
