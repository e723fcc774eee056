"""The wheel holds all of the package, and works where the repository is not."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("build")

ROOT = Path(__file__).parents[2]
LOADED = """
import sys
from pathlib import Path
import streamprune
assert Path(streamprune.__file__).is_relative_to(sys.prefix), streamprune.__file__
from transformers import AutoModelForCausalLM, AutoTokenizer
text = AutoTokenizer.from_pretrained("pruned")("the harbour", return_tensors="pt")
model = AutoModelForCausalLM.from_pretrained("pruned")
print(type(model).__name__, *model(**text).logits.shape)
"""


def run(directory: Path, *command: object) -> str:
    """What a command prints, in `directory` and with nothing on Python's path but what it has by itself."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(directory / "modules")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist, and the wheel made of it by the setuptools that is there."""
    directory = tmp_path_factory.mktemp("built")
    source = directory / "source"
    for folder in ("streamprune", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    run(directory, sys.executable, "-m", "build", "--no-isolation", "--outdir", ".", "source")
    return directory


def test_wheel_and_sdist_hold_every_file_of_the_package(built: Path) -> None:
    package = {file.relative_to(ROOT) for file in (ROOT / "streamprune").rglob("*") if file.is_file()}
    kernels = {file.relative_to(ROOT) for file in (ROOT / "kernels").rglob("*") if file.is_file()}
    sources = {str(file) for file in package | kernels if "__pycache__" not in file.parts}
    assert {"streamprune/py.typed", "streamprune/data/heldout.txt", "streamprune/output/_ragged_template.py"} < sources
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {name.replace("kernels/src/", "streamprune/kernels/") for name in sources}
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert sources | {"pyproject.toml", "README.md", "LICENSE"} <= members


def test_the_wheel_prunes_where_the_repository_is_not(built: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """In an empty environment that sees the packages of this one, but not what those install in the editable way."""
    venv.create(tmp_path / "env", symlinks=True)
    (site_packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (site_packages / "seen.pth").write_text("\n".join(seen) + "\n")
    python, command = (tmp_path / "env" / "bin" / name for name in ("python", "streamprune"))
    (wheel,) = built.glob("*.whl")
    run(tmp_path, python, "-m", "pip", "install", "--no-index", "--no-deps", "--ignore-installed", wheel)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(tmp_path, command, "--version") == f"streamprune, version {version}\n"
    assert "moreau-gs" in run(tmp_path, command, "methods")
    options = ("--model", tiny_llama, "--method", "taylor", "--layers", "2:6", "--seq-len", 32)
    assert "layers 2:6 lose 19 of 37 channels" in run(tmp_path, command, "plan", *options)
    assert "wrote pruned (ragged)" in run(tmp_path, command, *options, "--output", "pruned", "--quiet")
    assert run(tmp_path, python, "-c", LOADED).startswith("StreampruneLlamaForCausalLM 1 ")
    assert run(tmp_path, command, "verify", "pruned").count(" ok ") == 5
