"""What is installed: requirement files that pip can read, and metadata that agrees with itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import tinylm
from tests.oldest_versions import oldest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

EXTRAS = {
    "serve": {"fastapi", "uvicorn", "sse-starlette", "prometheus-client", "llguidance"},
    "track": {"tensorboard", "wandb", "trackio"},
    "eval": {"lm-eval"},
    "export": {"gguf"},
    "onnx": {"onnx"},
    "hub": {"datasets"},
    "cloud": {"fsspec", "s3fs", "gcsfs", "huggingface_hub"},
    "report": {"plotly"},
}


def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(file: Path) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-r ")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_pip_reads_the_requirements(repository: Path, name: str) -> None:
    """The original project's requirements.txt could not be parsed by pip, so nobody could install it.

    Everything here is installed already when the tests run, so this needs no network.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    options = ["--dry-run", "--no-deps", "--no-index", "-r", name]
    done = subprocess.run([*pip, *options], cwd=repository, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_exact(repository: Path, name: str) -> None:
    for requirement in requirements(repository / name):
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), f"{name}: {requirement}"


def test_every_dependency_is_pinned_within_its_bounds(repository: Path) -> None:
    pins = {pin.name.lower(): pin for pin in requirements(repository / "requirements.txt")}
    dependencies = [Requirement(text) for text in project(repository)["dependencies"]]
    for dependency in dependencies:
        assert dependency.specifier, f"{dependency} has no lower bound"
        (exact,) = pins[dependency.name.lower()].specifier
        assert dependency.specifier.contains(exact.version)
        assert pins[dependency.name.lower()].extras == dependency.extras
    assert str(pins["torch"]) == "torch==2.13.0"


def test_the_extras(repository: Path) -> None:
    extras = project(repository)["optional-dependencies"]
    for name, packages in EXTRAS.items():
        assert {Requirement(text).name for text in extras[name]} == packages


def test_the_version_is_one(repository: Path) -> None:
    assert project(repository)["version"] == tinylm.__version__
    assert f"\nversion: {tinylm.__version__}\n" in (repository / "CITATION.cff").read_text(encoding="utf-8")


def test_import_is_light(repository: Path) -> None:
    code = "import sys, tinylm; print('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_the_oldest_versions_are_the_lower_bounds(repository: Path) -> None:
    """`make test-oldest` installs what this prints. torch 2.10 was allowed, and lacked arguments that are passed."""
    assert oldest("name[b,a]>=1.2,<3", {}) == "name[a,b]==1.2"
    assert oldest("Name[a]", {"name": "7.1"}) == "Name[a]==7.1"
    done = subprocess.run(
        [sys.executable, "tests/oldest_versions.py"], cwd=repository, capture_output=True, text=True, check=True
    )
    lines, expected = done.stdout.splitlines(), project(repository)
    requirements = [*expected["dependencies"], *expected["optional-dependencies"]["test"]]
    assert [Requirement(line).name for line in lines] == [Requirement(text).name for text in requirements]
    for line, text in zip(lines, requirements, strict=True):
        assert not Requirement(text).specifier or Requirement(line).specifier != Requirement(text).specifier
        assert all(Requirement(text).specifier.contains(pin.version) for pin in Requirement(line).specifier)
