"""What is built and given away: everything that the package needs, under one version."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes

import pytest

import tensornet_compress
from tests.documents import ROOT

BUILD = "import sys; out = sys.argv[1]; from setuptools import build_meta as b; b.build_wheel(out); b.build_sdist(out)"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and a source distribution, made of a copy so that nothing is left in the tree."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "tensornet_compress", copy / "tensornet_compress", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, copy / name)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=copy, check=True, capture_output=True)
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


def files_of_the_package():
    kept = (".py", ".typed", ".css", ".j2", ".toml", ".yaml")
    return {str(path.relative_to(ROOT)) for path in (ROOT / "tensornet_compress").rglob("*") if path.suffix in kept}


def test_the_wheel_holds_the_package_its_commands_and_its_licence(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = message_from_bytes(wheel.read(f"{info}/METADATA"))
        entries = wheel.read(f"{info}/entry_points.txt").decode()
    assert files_of_the_package() <= names
    assert {name for name in names if name.endswith(".py")} <= files_of_the_package(), "tests or benchmarks are in the wheel"
    assert metadata["Version"] == tensornet_compress.__version__
    assert {"hf", "report", "arrays", "peft", "lm-eval"} <= set(metadata.get_all("Provides-Extra"))
    assert "tensornet-compress = tensornet_compress.cli.__main__:run" in entries
    assert "tensornet = tensornet_compress.integrations.numcodecs_codec:TensorNetCodec" in entries
    assert any(name.endswith("LICENSE") for name in names)


def test_the_source_distribution_builds_the_same_package(built):
    with tarfile.open(built[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert files_of_the_package() | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_one_version_everywhere():
    version = tensornet_compress.__version__
    top = re.search(r"^## (\S+)( \(unreleased\))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert version == (f"{top[1]}.dev0" if top[2] else top[1])
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dynamic"]


def test_the_package_is_a_command():
    done = subprocess.run([sys.executable, "-m", "tensornet_compress", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == tensornet_compress.__version__, done.stderr
