"""What several files say of the package agrees: versions, Pythons, dependencies, commands."""

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from vit_dist import __version__

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github").rglob("*.yml"))
PAGES = sorted(ROOT.glob("*.md"))
DOCKERFILE = (ROOT / "launch" / "docker" / "Dockerfile").read_text()
DEVICES = ("cpu", "gpu", "tpu")


def supported() -> list[str]:
    """The Pythons that requires-python allows: ">=3.11,<3.14" -> 3.11, 3.12, 3.13."""
    first, end = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    return [f"3.{minor}" for minor in range(int(first), int(end))]


def steps_of(workflow: Path) -> list[dict]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def instructions(name: str) -> list[str]:
    """The arguments of each such instruction of the Dockerfile, with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return re.findall(rf"^{name} (.*)$", text, re.M)


def is_command(path: Path) -> bool:
    return 'if __name__ == "__main__":' in path.read_text()


# Commands


def test_every_command_has_a_console_script():
    commands = [path.stem for path in (ROOT / "vit_dist").glob("*.py") if is_command(path)]
    assert len(commands) > 5
    assert PROJECT["scripts"] == {
        f"vit-dist-{name.replace('_', '-')}": f"vit_dist.{name}:script" for name in commands
    }


@pytest.mark.parametrize("target", PROJECT["scripts"].values())
def test_console_scripts_exist(target):
    module, function = target.split(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
    assert found, f"{module} has no function {function}"
    assert not found[0].args.args, "what pip writes calls it without arguments"


# Versions


def test_the_version_stands_once():
    assert "version" not in PROJECT and "version" in PROJECT["dynamic"]
    attribute = PYPROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "vit_dist.__version__"
    # As a literal setuptools reads it from the source; else it would import the package, and fail
    # where nothing is installed yet.
    source = (ROOT / "vit_dist" / "__init__.py").read_text()
    assert f'__version__ = "{__version__}"\n' in source


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(
        r"^## \[(\d\S+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert citation["version"] == __version__
    assert headings[0] == (__version__, str(citation["date-released"]))
    assert [date for _, date in headings] == sorted((d for _, d in headings), reverse=True)


def test_the_license_is_the_same_everywhere():
    assert PROJECT["license"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"]


# Pythons


def test_pythons_agree():
    minors = [version.split(".")[1] for version in supported()]
    classifiers = " ".join(PROJECT["classifiers"])
    assert re.findall(r"Python :: (3\.\d+)", classifiers) == supported()
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^PYTHONS := (.*)$", makefile, re.M)[1].split() == supported()
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py3{minors[0]}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == supported()[0]
    assert re.search(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.M)[1] in supported()


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "Makefile", "launch/docker/Dockerfile"]
)
def test_texts_name_the_same_pythons(name):
    found = re.findall(r"\b(3\.\d+) to (3\.\d+)\b", (ROOT / name).read_text())
    assert found and set(found) == {(supported()[0], supported()[-1])}


def test_pythons_are_found_where_they_are():
    command = [ROOT / "tools" / "pythons.sh", f"3.{sys.version_info.minor}", "3.0"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    version, _, python = found[0].partition("=")
    assert len(found) == 1 and version == f"3.{sys.version_info.minor}"
    told = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout
    assert told.startswith(f"Python {version}.")


def test_none_of_the_pythons_is_an_error():
    done = subprocess.run([ROOT / "tools" / "pythons.sh", "3.0"], capture_output=True, text=True)
    assert done.returncode == 1 and "none of Python 3.0" in done.stderr


# Dependencies


def test_requirements_are_the_dependencies_and_the_cpu_extra():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line.partition("#")[0].strip() for line in lines]
    assert sorted(filter(None, lines)) == sorted([*PROJECT["dependencies"], *EXTRAS["cpu"]])


# Workflows and forms


def test_workflows_run_all_and_the_quick_part_on_every_python():
    runs = {step["run"]: path for path in WORKFLOWS for step in steps_of(path) if "run" in step}
    assert ".ci/run" in runs and (ROOT / ".ci" / "run").exists()
    quick = yaml.safe_load(runs["make check"].read_text())["jobs"]["check"]
    assert quick["strategy"]["matrix"]["python"] == supported()
    for path in WORKFLOWS:
        for step in steps_of(path):
            version = str(step.get("with", {}).get("python-version", supported()[0]))
            assert version in supported() or version == "${{ matrix.python }}"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_forms_and_workflows_parse(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_form_for_hardware_asks_for_the_doctor():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "hardware.yml").read_text())
    (field,) = [entry for entry in form["body"] if entry.get("id") == "doctor"]
    assert "python -m vit_dist.doctor" in field["attributes"]["description"]
    assert field["validations"]["required"]


# Pages at the top; tests of docs look at the others


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_targets_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in link or (ROOT / link).exists(), f"{link}: there is no such file"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"(?:`|^)make (?:[A-Z]+=\S+ )*([a-z-]+)", text, re.M)
    assert set(named) <= set(targets)
    for module in re.findall(r"python -m (vit_dist\.\w+)", text):
        if not module.endswith(".NAME"):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


# The image


def test_the_image_has_a_stage_for_each_extra():
    stages = {base.split(" AS ")[1]: base.split(" AS ")[0] for base in instructions("FROM")}
    assert all(stages[device] == "base" and device in EXTRAS for device in DEVICES)
    assert stages["vit_dist"] == "${DEVICE}"


def test_the_image_runs_as_a_user_with_a_home():
    assert instructions("USER") == ["${UID}"]
    assert int(dict(a.split("=") for a in instructions("ARG") if "=" in a)["UID"]) > 0
    assert any("useradd --create-home" in run for run in instructions("RUN"))


def test_what_the_image_copies_exists_and_is_sent():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sent = [line[1:] for line in ignore if line.startswith("!")]
    sources = [word for copy in instructions("COPY") for word in copy.split()[:-1]]
    assert ignore[1] == "*" and sorted(sent) == sorted(sources)
    assert all((ROOT / source).exists() for source in sources)
    assert not any(fnmatch.fnmatch(".venv-py3.11", pattern) for pattern in sent)


@pytest.mark.parametrize("device", DEVICES)
def test_the_image_installs_the_dependencies_and_its_extra(device):
    """The line of Python that writes them, run as the builder's shell does."""
    (line,) = [run for run in instructions("RUN") if run.startswith("python -c")]
    command = line.split(" > ")[0].replace("python", sys.executable, 1)
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env={"DEVICE": device}, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [*PROJECT["dependencies"], *EXTRAS[device]], done.stderr


def test_the_code_is_copied_after_what_it_needs_is_installed():
    """Else each change of the code would install gigabytes anew."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE)
    steps = re.findall(r"^(?:COPY .*|RUN .*pip install.*)$", text, re.M)
    assert steps[0].startswith("COPY pyproject.toml ") and "-r /tmp/requirements.txt" in steps[1]
    assert any(step.startswith("COPY vit_dist ") for step in steps[2:])
