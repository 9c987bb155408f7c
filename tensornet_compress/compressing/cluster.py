"""Jobs on other machines: joblib's backends for Ray and Dask. All machines see the same folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from joblib import parallel_config

from tensornet_compress.errors import TensorNetError

_KINDS = ("processes", "ray", "dask")


@contextmanager
def cluster(place: str | None) -> Iterator[None]:
    """Inside, ``run_jobs`` uses a cluster: ``ray`` or ``dask`` for one of this machine, ``ray://HOST:PORT`` or
    ``dask://HOST:PORT`` for one that runs, ``processes`` of this machine; None for none.

    Raises:
        TensorNetError: no such kind, its package is not installed, or nobody answers at the address.
    """
    if place is None:
        yield
        return
    kind, address = cluster_kind(place)
    if kind == "processes":
        with parallel_config("loky", n_jobs=-1):
            yield
        return
    try:
        module: Any = import_module("ray" if kind == "ray" else "distributed")
    except ImportError as error:
        raise TensorNetError(
            f"cluster {place!r} needs the package {kind}: pip install 'tensornet-compress[{kind}]' ({error})"
        ) from error
    with (_on_ray if kind == "ray" else _on_dask)(module, address):
        yield


def cluster_kind(place: str) -> tuple[str, str]:
    """The kind and the address, perhaps empty, of a cluster's name.

    Raises:
        TensorNetError: there is no such kind.
    """
    kind, _, address = place.partition("://")
    if kind not in _KINDS or (address and kind == "processes"):
        raise TensorNetError(f"unknown cluster {place!r}; give processes, ray, ray://HOST:PORT, dask or dask://HOST:PORT")
    return kind, address


@contextmanager
def _on_ray(ray: Any, address: str) -> Iterator[None]:
    from ray.util.joblib import register_ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=f"ray://{address}" if address else None, log_to_driver=False, include_dashboard=False)
        except Exception as error:
            raise TensorNetError(f"no Ray cluster answers at {address or 'this machine'!r} ({error})") from error
    try:
        register_ray()
        with parallel_config("ray", n_jobs=-1):
            yield
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _on_dask(distributed: Any, address: str) -> Iterator[None]:
    try:
        client = distributed.Client(f"tcp://{address}", timeout=10) if address else distributed.Client(dashboard_address=None)
    except (OSError, TimeoutError) as error:
        raise TensorNetError(f"no Dask scheduler answers at {address!r} ({error})") from error
    with client, parallel_config("dask", n_jobs=-1):
        yield
