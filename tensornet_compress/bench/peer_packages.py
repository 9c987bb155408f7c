"""Packages that only peers need: taken from the environment, else from a side folder that is made once.

Nothing is installed into the user's environment: pinned releases go into the cache folder, without their dependencies, which
are listed here. Nothing is imported from any other folder, nor from one there that somebody else owns or could write to.
``python -m tensornet_compress.bench.peer_packages`` (``make peers``) installs them all.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensornet_compress.decompose.tensorly_adapter import tensorly_left_alone
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.whole import locked, whole_folder
from tensornet_compress.inputs.models import cache_folder

# llama-cpp-python is built from source.
_MINUTES = 40
_COMPLETE = ".complete"


class Unavailable(Exception):  # noqa: N818
    """Why a method cannot run here; the harness makes it a skipped row."""


def reason(error: Exception) -> str:
    """What a skipped row says of an error: its message, and its kind where it is not ours."""
    return str(error) if isinstance(error, (Unavailable, TensorNetError)) else f"{type(error).__name__}: {error}"


def require_fit(what: str, bits: float, allowed: float, unit: str, asked: float) -> None:
    """Raises ``Unavailable`` for what takes more ``bits`` than ``allowed``; ``asked``: what was asked for."""
    if bits > allowed * (1 + 1e-6):
        raise Unavailable(f"{what} takes {bits:.4g} bits per {unit}, asked for {asked:.4g}")


def fullest(
    grids: Sequence[tuple[int, int]], cost: Callable[[int, int], float], allowed: float, unit: str, asked: float
) -> tuple[int, int]:
    """The first of the grids (bits of a code, group) whose ``cost`` is allowed. Raises ``Unavailable`` where none is."""
    for grid in grids:
        if cost(*grid) <= allowed:
            return grid
    raise Unavailable(f"its coarsest grid takes {min(cost(*grid) for grid in grids):.3g} bits per {unit}, asked for {asked:g}")


@dataclass(frozen=True)
class SidePackage:
    """``module``: what is imported, None for a package of which only files are read; ``pins``: what is installed without
    dependencies, its own included."""

    module: str | None
    pins: tuple[str, ...]


SIDE_PACKAGES = {
    "quanto": SidePackage("optimum.quanto", ("optimum-quanto==0.2.7", "ninja==1.13.2")),
    "hqq": SidePackage("hqq.core.quantize", ("hqq==0.2.8.post1", "termcolor==3.3.0")),
    "torchao": SidePackage("torchao.quantization", ("torchao==0.18.0",)),
    "ttnopt": SidePackage(
        "ttnopt.src",
        (
            "ttnopt==0.1.0", "tensornetwork==0.4.6", "dotmap==1.3.30", "h5py==3.16.0", "graphviz==0.21", "pydot==4.0.1",
            "pyparsing==3.3.3", "pandas==3.1.1", "pyyaml==6.0.3", "python-dateutil==4.0.0", "pytz==2026.6", "tzdata==2026.6",
            "six==1.17.0",
        ),
    ),
    "teneva": SidePackage("teneva", ("teneva==0.14.11",)),
    "llama-cpp-python": SidePackage("llama_cpp", ("llama-cpp-python==0.3.36", "diskcache==5.6.3")),
    "sz3": SidePackage("pysz", ("pysz==1.1.0",)),
    "nilearn": SidePackage(None, ("nilearn==0.14.1",)),
    "zfp": SidePackage("zfpy", ("zfpy==1.0.1.post0",)),
    "tensorly-torch": SidePackage("tltorch", ("tensorly-torch==0.5.0",)),
}  # fmt: skip


@dataclass
class SideEnvironment:
    """``install``: whether missing packages may be installed into the side folder."""

    install: bool = True

    def module(self, name: str) -> Any:
        """The imported module of a side package. Raises ``Unavailable`` where it cannot be imported or installed."""
        wanted = SIDE_PACKAGES[name].module
        if wanted is None:
            raise Unavailable(f"of {name} only files are read")
        if _missing(wanted):
            _also_look_in(self.folder(name))
        try:
            with tensorly_left_alone():
                return importlib.import_module(wanted)
        except Exception as error:  # Foreign packages raise what they like while they are imported.
            raise Unavailable(f"{name} cannot be imported: {type(error).__name__}: {error}") from error

    def folder(self, name: str) -> Path:
        """The folder that a side package lies in. Raises ``Unavailable`` where it cannot be installed."""
        folder = cache_folder() / "peers" / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"
        if not _is_ours(folder, SIDE_PACKAGES[name]):
            self._install(name, SIDE_PACKAGES[name], folder)
        return folder

    def _install(self, name: str, package: SidePackage, folder: Path) -> None:
        if not self.install:
            raise Unavailable(f"{name} is not installed, and installing was refused (--no-install)")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", *package.pins, "--target"]
        with locked(folder, wait=True):
            if _is_ours(folder, package):  # Another process may have been faster.
                return
            if folder.exists():
                shutil.rmtree(folder)
            with whole_folder(folder) as made:
                try:
                    done = subprocess.run(
                        [*command, str(made)], capture_output=True, text=True, check=False, timeout=60 * _MINUTES
                    )
                except (OSError, subprocess.TimeoutExpired) as error:
                    raise Unavailable(f"{name} cannot be installed: {error}") from error
                if done.returncode:
                    lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
                    raise Unavailable(f"{name} cannot be installed: {lines[-1]}")
                (made / _COMPLETE).write_text("\n".join(package.pins), encoding="utf-8")


SIDE = SideEnvironment()


def _is_ours(folder: Path, package: SidePackage) -> bool:
    """Whether the side folder was made by this set-up, with these pins, for this user, and can be written by nobody else."""
    mark = folder / _COMPLETE
    if not mark.is_file() or mark.read_text(encoding="utf-8") != "\n".join(package.pins):
        return False
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ImportError:
        return True


def _also_look_in(folder: Path) -> None:
    """Search ``folder`` after everything else, so that the environment's own packages win."""
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()


if __name__ == "__main__":
    for side_package, described in SIDE_PACKAGES.items():
        SIDE.folder(side_package) if described.module is None else SIDE.module(side_package)
        print(f"{side_package}: ready")
