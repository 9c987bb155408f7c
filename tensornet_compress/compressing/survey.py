"""The survey of a model: calibration, every layer's options, and sensitivities; shared by several budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from torch import Tensor, nn

from tensornet_compress.calibrate import Batch, first_tokens, fisher_sensitivity, measure_sensitivity
from tensornet_compress.calibrate.batches import calibration_fingerprint
from tensornet_compress.calibrate.layer_metrics import calibrated_metrics, calibration_passes, stored_metrics
from tensornet_compress.compressing.clock import Clock
from tensornet_compress.compressing.layer_jobs import LayerJob, Survey, WeightSource, survey_layer
from tensornet_compress.compressing.layouts import LayoutSearch, layer_kind, search_layouts
from tensornet_compress.compressing.sizes import Sizes
from tensornet_compress.compressing.words import Method, Sensitivity
from tensornet_compress.compressing.workers import run_jobs
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric, StoredMetric, metric_kind
from tensornet_compress.nn import Skipped, Target, find_targets, layer_weight, turned
from tensornet_compress.options import FAMILIES
from tensornet_compress.options.forms import SIZE_SHARES
from tensornet_compress.progress import Progress, SilentProgress

_FINE_LAYERS = 24
PROBE_TOKENS = 512
FISHER_TOKENS = 4096


@dataclass
class ModelSurvey:
    """What was learned about a model before any bytes are allocated; several budgets and methods can share it."""

    chosen: list[Target]
    skipped: list[Skipped]
    jobs: list[LayerJob]
    layers: list[Survey]
    sensitivity: dict[str, float]
    calibration: str | None
    seconds: dict[str, float]
    searches: list[LayoutSearch] = field(default_factory=list)
    metric: str = "input"
    # Where the jobs' metrics lie when they were calibrated by block; emptied with this object.
    scratch: TemporaryDirectory[str] | None = None

    def note(self, job: LayerJob) -> str:
        """What a reader should know of how the errors of a layer were weighed."""
        if job.metric is not None or self.calibration is None or self.metric == "euclidean":
            return ""
        return "calibration gave this layer no input: its errors are Euclidean, and count like those of a middling layer"

    def damage_weight(self, layer: Survey, measured: bool) -> float:
        """What a unit of squared metric error of a layer counts: measured at the output, or relative to its own norm."""
        return self.sensitivity[layer.name] if measured else 1.0 / max(layer.energy, 1e-300)


def survey_model(
    model: nn.Module,
    calibration: Iterable[Batch] | None = None,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    method: Method = "auto",
    formats: Sequence[str] | None = None,
    sensitivity: Sensitivity | None = "fisher",
    metric: str = "input",
    shares: Sequence[float] | None = None,
    sweeps: int = 1,
    workers: int | None = None,
    source: Path | None = None,
    search: float | None = None,
    by_block: bool = False,
    progress: Progress | None = None,
) -> ModelSurvey:
    """Calibrate, list every layer's options and measure sensitivities; the model is left as found.

    Arguments as for ``compress``; ``shares`` are the sizes of networks to consider, as shares of the dense bf16 bytes, and
    ``sensitivity=None`` measures none.
    """
    metric_kind(metric)
    if method != "auto" and method not in FAMILIES:
        raise TensorNetError(f"unknown method {method!r}; choose auto or one of {FAMILIES}")
    if method == "searched" and search is None:
        raise TensorNetError("method 'searched' needs the seconds of a search for each kind of layer: give search=60, say")
    if search is not None and not search > 0:
        raise TensorNetError(f"search takes the seconds for each kind of layer, was given {search}")
    if sensitivity not in ("fisher", "probe", None):
        raise TensorNetError(f"unknown sensitivity {sensitivity!r}; choose fisher or probe")
    batches = list(calibration) if calibration is not None else []
    chosen, skipped = find_targets(model, targets, ignore)
    clock = Clock(progress or SilentProgress())
    metrics: Mapping[str, KroneckerMetric | StoredMetric] = {}
    scratch = TemporaryDirectory(prefix="tensornet-metrics-") if by_block and batches else None
    if batches:
        passes = calibration_passes(model, chosen) if by_block else 1
        with clock.stage("calibrate", passes * len(batches)) as advance:
            if scratch is None:
                metrics = calibrated_metrics(model, batches, chosen, metric, advance)
            else:
                metrics = stored_metrics(model, batches, chosen, metric, Path(scratch.name), advance)
    index = weight_index(source) if source is not None else {}
    jobs = [
        LayerJob(
            name=target.name,
            source=weight_source(model, target, index),
            metric=metrics.get(target.name),
            families=FAMILIES if method == "auto" else (method,),
            formats=None if formats is None else tuple(formats),
            shares=tuple(shares) if shares is not None else ladder(len(chosen)),
            sweeps=sweeps,
        )
        for target in chosen
    ]
    searches: list[LayoutSearch] = []
    if search is not None:
        searches = list(search_layouts(jobs, search, clock).values())
        layouts = {found.kind: found.layout for found in searches}
        jobs = [replace(job, layout=layouts[layer_kind(job.name, job.source.load().shape)]) for job in jobs]
    with clock.stage("survey", len(jobs)) as advance:
        layers = run_jobs(survey_layer, jobs, workers, advance)
    measured: dict[str, float] = {}
    if sensitivity is not None and batches:
        measured = _sensitivities(model, chosen, layers, batches, sensitivity, clock)
        measured |= _middling(jobs, layers, measured)
    fingerprint = calibration_fingerprint(batches) if batches else None
    return ModelSurvey(chosen, skipped, jobs, layers, measured, fingerprint, clock.seconds, searches, metric, scratch)


def _middling(jobs: Sequence[LayerJob], layers: Sequence[Survey], measured: Mapping[str, float]) -> dict[str, float]:
    """Sensitivities of layers that calibration never called: relative errors of theirs count as much as those of the median
    layer."""
    known = sorted(measured[layer.name] * layer.energy for layer in layers if measured[layer.name] > 0)
    unseen = [layer for job, layer in zip(jobs, layers) if job.metric is None and not measured[layer.name]]
    return {layer.name: known[len(known) // 2] / max(layer.energy, 1e-300) for layer in unseen if known}


def uniform_share(sizes: Sizes) -> tuple[float, ...]:
    """The one size that the uniform allocator needs: bits per weight over the 16 of bf16."""
    return (8 * sizes.allowed / sum(sizes.weights.values()) / 16,)


def ladder(layers: int) -> tuple[float, ...]:
    """Sizes to consider; a finer ladder when few layers share the budget, so that it can still be met."""
    if layers > _FINE_LAYERS:
        return SIZE_SHARES
    return tuple(SIZE_SHARES[0] * (SIZE_SHARES[-1] / SIZE_SHARES[0]) ** (step / 200) for step in range(201))


def weight_index(folder: Path) -> dict[str, Path]:
    index: dict[str, Path] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            index.update(dict.fromkeys(file.keys(), path))
    return index


def weight_source(model: nn.Module, target: Target, index: dict[str, Path]) -> WeightSource:
    key = f"{target.name}.weight"
    if key in index:
        dtype = layer_weight(model.get_submodule(target.name)).dtype
        return WeightSource(file=index[key], key=key, kind=target.kind, dtype=dtype)
    return WeightSource(tensor=layer_weight(model.get_submodule(target.name)).cpu().contiguous())


def _sensitivities(
    model: nn.Module,
    chosen: Sequence[Target],
    surveys: Sequence[Survey],
    batches: Sequence[Batch],
    method: Sensitivity,
    clock: Clock,
) -> dict[str, float]:
    def probe(target: Target, survey: Survey) -> Callable[[], tuple[Tensor, float]]:
        def make() -> tuple[Tensor, float]:
            dense = survey.probe.to_dense()
            return turned(dense, target.kind), survey.probe_error

        return make

    probes = {target.name: probe(target, survey) for target, survey in zip(chosen, surveys)}
    if method == "probe":
        with clock.stage("sensitivity", len(probes)) as advance:
            return measure_sensitivity(model, first_tokens(batches, PROBE_TOKENS, 256), probes, advance)
    kept = first_tokens(batches, FISHER_TOKENS, 256)
    with clock.stage("sensitivity", len(kept)) as advance:
        return fisher_sensitivity(model, kept, probes, {target.name: target.tied for target in chosen}, advance)
