"""Iterative singular value thresholding against closed forms, and its behaviour on problems of known curvature."""

import copy

import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.decompose import matrix_spectrum
from tensornet_compress.errors import BudgetError, CheckpointError, TensorNetError
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.nn import TNLinear
from tensornet_compress.train import Problem, Schedule, curvature, isvt, proximal_step
from tensornet_compress.train.proximal import Cost, meet_budget
from tests.generators import correlated_moment, random_tensor
from tests.models import batches, tiny_convnet, tiny_llama
from tests.train.problems import Linear, correlated_inputs, least_squares, logistic

BITS = 8.0


def spd(size, seed):
    return correlated_moment(size, seed) + 0.05 * torch.eye(size, dtype=torch.float64)


def metric_of(kind):
    rows = spd(10, 1) if kind == "kronecker" else None
    return KroneckerMetric(rows, None if kind == "euclidean" else spd(14, 2))


@pytest.mark.parametrize("kind", ["euclidean", "input", "kronecker"])
def test_one_unit_step_from_a_stationary_point_is_truncation_in_the_metric(kind):
    """With both factors this is KFAC-SVD; with inputs only SVD-LLM, ``U U' W`` with U the top eigenvectors of ``W C W'``."""
    weight, metric = random_tensor((10, 14)), metric_of(kind)
    costs = {"w": Cost(unit=24, dense=110)}
    choice, result = proximal_step({"w": weight}, {"w": torch.zeros_like(weight)}, {"w": metric}, costs, 4 * 24, 1.0)
    assert choice.ranks == {"w": 4}
    left, right = matrix_spectrum(weight, metric).cores(4)
    torch.testing.assert_close(result["w"], left @ right, rtol=1e-10, atol=1e-10)
    if kind == "input":
        top = torch.linalg.eigh(weight @ metric.columns @ weight.T)[1][:, -4:]
        torch.testing.assert_close(result["w"], top @ (top.T @ weight), rtol=1e-10, atol=1e-10)
    if kind == "kronecker":
        whiten_rows, whiten_columns = torch.linalg.cholesky(metric.rows).T, torch.linalg.cholesky(metric.columns)
        u, s, vh = torch.linalg.svd(whiten_rows @ weight @ whiten_columns)
        kept = (u[:, :4] * s[:4]) @ vh[:4]
        expected = torch.linalg.solve(whiten_rows, torch.linalg.solve(whiten_columns.T, kept.T).T)
        torch.testing.assert_close(result["w"], expected, rtol=1e-10, atol=1e-10)


def test_a_step_keeps_exactly_the_values_above_the_threshold():
    weight, gradient, metric = random_tensor((10, 14)), random_tensor((10, 14), 1), metric_of("kronecker")
    step, costs = 0.3, {"w": Cost(unit=24, dense=1000)}
    choice, result = proximal_step({"w": weight}, {"w": gradient}, {"w": metric}, costs, 5 * 24, step)
    whiten_rows, whiten_columns = torch.linalg.cholesky(metric.rows).T, torch.linalg.cholesky(metric.columns)
    moved = weight - step * torch.linalg.solve(metric.rows, torch.linalg.solve(metric.columns, gradient.T).T)
    values = torch.linalg.svdvals(whiten_rows @ moved @ whiten_columns)
    limit = (2 * step * choice.multiplier * 24) ** 0.5
    assert int((values > limit * (1 + 1e-9)).sum()) == choice.ranks["w"] == 5
    kept = torch.linalg.svdvals(whiten_rows @ result["w"] @ whiten_columns)
    torch.testing.assert_close(kept[:5], values[:5], rtol=1e-9, atol=1e-9)
    assert float(kept[5:].max()) < 1e-9


def test_soft_thresholds_take_the_same_amount_off_every_value():
    weight, costs = random_tensor((10, 14)), {"w": Cost(unit=24, dense=1000)}
    zero = {"w": torch.zeros_like(weight)}
    choice, result = proximal_step({"w": weight}, zero, {"w": KroneckerMetric()}, costs, 4 * 24, 0.5, "soft")
    before, after = torch.linalg.svdvals(weight), torch.linalg.svdvals(result["w"])
    taken = 0.5 * choice.multiplier * 24
    torch.testing.assert_close(after, (before - taken).clamp_min(0), rtol=1e-9, atol=1e-9)
    assert int((after > 1e-9).sum()) == choice.ranks["w"] <= 4


def test_one_multiplier_for_all_layers_is_the_best_split_of_the_bytes():
    """Against every split of the budget between two layers of different unit costs."""
    spectra = {
        name: matrix_spectrum(random_tensor((8, 8), seed) * seed, KroneckerMetric()) for name, seed in (("a", 1), ("b", 3))
    }
    costs = {"a": Cost(5, 10**6), "b": Cost(7, 10**6)}
    for allowed in (25, 40, 61):
        choice = meet_budget(spectra, costs, allowed, 1.0)
        assert choice.nbytes <= allowed
        damage = sum(spectra[name].error(choice.ranks[name]) for name in spectra)
        splits = [(i, j) for i in range(1, 9) for j in range(1, 9) if 5 * i + 7 * j <= choice.nbytes]
        best = min(spectra["a"].error(i) + spectra["b"].error(j) for i, j in splits)
        assert damage == pytest.approx(best, rel=1e-9)


def least_squares_problem():
    model, x = Linear(10, 14), correlated_inputs(400, 14)
    y = model(x).detach() + correlated_inputs(400, 10, 9)
    return model, [(x, y)], x.T @ x / len(x)


def test_curvature_in_the_exact_metric_is_one():
    model, data, moment = least_squares_problem()
    problem = Problem(model, ["map"], data, least_squares)
    assert curvature(problem, {"map": KroneckerMetric(columns=moment)}, iterations=4) == pytest.approx(1.0, rel=1e-4)
    euclidean = curvature(problem, {"map": KroneckerMetric()}, iterations=60)
    assert euclidean == pytest.approx(float(torch.linalg.eigvalsh(moment)[-1]), rel=1e-3)


def assert_monotone(report):
    assert not any(step.rose for step in report.steps)
    losses = [step.loss for step in report.steps]
    assert report.best == min(losses)
    assert not report.too_large


@pytest.mark.parametrize("threshold", ["hard", "soft"])
@pytest.mark.parametrize("metric", ["euclidean", "input"])
def test_least_squares_falls_and_ranks_settle(metric, threshold):
    model, data, moment = least_squares_problem()
    metrics = {"map": KroneckerMetric(columns=moment if metric == "input" else None)}
    report = isvt(
        model,
        data,
        tnc.Budget(bits_per_weight=20.0),
        metric=metrics,
        schedule=Schedule(steps=40),
        threshold=threshold,
        loss=least_squares,
        fmt="fp32",
    )
    assert_monotone(report)
    assert report.settled >= 10
    assert report.nbytes <= report.allowed
    assert isinstance(model.map, TNLinear)
    assert float(least_squares(model, data[0]).detach()) == pytest.approx(report.best, rel=1e-5)


def test_reduced_rank_regression_is_found():
    """On least squares in its own metric the minimiser at a rank is known (Eckart-Young of the fitted map)."""
    model, data, moment = least_squares_problem()
    x, y = data[0]
    fitted = torch.linalg.solve(moment, x.T @ y / len(x)).T
    metric = KroneckerMetric(columns=moment)
    report = isvt(
        model,
        data,
        tnc.Budget(bits_per_weight=20.0),
        metric={"map": metric},
        step=0.9,
        loss=least_squares,
        fmt="fp32",
        schedule=Schedule(steps=40),
    )
    rank = report.ranks["map"]
    best = 0.5 * ((y - x @ fitted.T).square().sum(1).mean() + matrix_spectrum(fitted, metric).error(rank))
    assert report.best == pytest.approx(float(best), rel=1e-6)


def test_logistic_regression_falls():
    model, x = Linear(6, 14), correlated_inputs(300, 14)
    labels = (x @ random_tensor((14, 6), 4)).argmax(1)
    report = isvt(
        model,
        [(x, labels)],
        tnc.Budget(bits_per_weight=20.0),
        metric="input",
        loss=logistic,
        fmt="fp32",
        metric_loss=lambda m, b: logistic(m, b) * len(b[0]),
        schedule=Schedule(steps=25),
    )
    assert_monotone(report)
    assert report.best < report.steps[0].loss


@pytest.mark.parametrize("metric", ["kronecker", "row-fisher", "euclidean"])
def test_a_small_transformer_falls_below_one_shot_truncation(metric):
    model, data = tiny_llama(), batches(3)
    one_shot = isvt(
        copy.deepcopy(model),
        data,
        tnc.Budget(bits_per_weight=10.0),
        metric=metric,
        schedule=Schedule(kind="one-shot"),
        step=1.0,
    )
    report = isvt(model, data, tnc.Budget(bits_per_weight=10.0), metric=metric, schedule=Schedule(steps=12))
    assert_monotone(report)
    assert report.nbytes <= report.allowed
    assert report.best < one_shot.best


def test_a_step_beyond_the_curvature_is_detected_and_reported():
    model, data, moment = least_squares_problem()
    dense = copy.deepcopy(model)
    common = {
        "metric": {"map": KroneckerMetric()},
        "loss": least_squares,
        "fmt": "fp32",
        "schedule": Schedule(steps=60),
        "backtrack": False,
    }
    largest = float(torch.linalg.eigvalsh(moment)[-1])
    report = isvt(model, data, tnc.Budget(bits_per_weight=20.0), step=2.5 / largest, **common)
    assert report.too_large
    assert "too large" in report.advice
    assert len(report.steps) < 60
    good = isvt(copy.deepcopy(dense), data, tnc.Budget(bits_per_weight=20.0), step=0.9 / largest, **common)
    assert_monotone(good)
    assert good.best < report.best


def test_backtracking_repairs_a_step_that_is_too_large():
    model, data, moment = least_squares_problem()
    largest = float(torch.linalg.eigvalsh(moment)[-1])
    report = isvt(
        model, data, tnc.Budget(bits_per_weight=20.0), metric="euclidean", step=2.5 / largest, loss=least_squares, fmt="fp32"
    )
    assert_monotone(report)
    assert report.steps[-1].step < 2.5 / largest
    assert sum(step.backtracks for step in report.steps) > 0


@pytest.mark.parametrize("kind", ["linear", "cubic", "multiplier"])
def test_schedules_end_at_the_budget(kind):
    model, data = tiny_llama(layers=1), batches(2)
    schedule = Schedule(kind=kind, steps=8, corrections=1)
    report = isvt(model, data, tnc.Budget(bits_per_weight=8.0), schedule=schedule)
    sizes = [step.nbytes for step in report.steps]
    assert sizes[0] > sizes[-1]
    assert sizes[-1] <= report.allowed
    assert report.nbytes <= report.allowed


def test_a_stopped_iteration_goes_on_where_it_was(tmp_path):
    data, budget = batches(2), tnc.Budget(bits_per_weight=9.0)
    whole = tiny_llama(layers=1)
    expected = isvt(whole, data, budget, schedule=Schedule(steps=6), step=0.3)

    class Stop(Exception):  # noqa: N818
        pass

    class Interrupting:
        def stage(self, title, total):
            return self

        def __enter__(self):
            self.left = 3
            return self.tick

        def __exit__(self, *error):
            return False

        def tick(self):
            self.left -= 1
            if not self.left:
                raise Stop

    file, model = tmp_path / "state.safetensors", tiny_llama(layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Stop):
        isvt(model, data, budget, schedule=Schedule(steps=6), step=0.3, state=file, progress=Interrupting())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    resumed = isvt(model, data, budget, schedule=Schedule(steps=6), step=0.3, state=file)
    assert resumed == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values()))
    with pytest.raises(CheckpointError, match="other settings"):
        isvt(tiny_llama(layers=1), data, budget, schedule=Schedule(steps=7), step=0.3, state=file)
    file.write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="no whole state"):
        isvt(tiny_llama(layers=1), data, budget, schedule=Schedule(steps=6), step=0.3, state=file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmt": "fp32"}, "other settings"),
        ({"metric": "euclidean"}, "other settings"),
        ({"model": tiny_llama(layers=1, seed=5)}, "other settings"),
        ({"batches": batches(2, seed=9)}, "other settings"),
        ({"damage": True}, "damaged"),
    ],
)
def test_a_state_only_fits_what_it_was_made_with(tmp_path, change, message):
    file, schedule, budget = tmp_path / "state.safetensors", Schedule(steps=2), tnc.Budget(bits_per_weight=9.0)
    isvt(tiny_llama(layers=1), batches(2), budget, metric="input", schedule=schedule, step=0.3, state=str(file))
    change = dict(change)
    if change.pop("damage", False):
        content = bytearray(file.read_bytes())
        content[-50:] = bytes(50)
        file.write_bytes(content)
    arguments = {"model": tiny_llama(layers=1), "batches": batches(2), "metric": "input"} | change
    model, data = arguments.pop("model"), arguments.pop("batches")
    with pytest.raises(CheckpointError, match=message):
        isvt(model, data, budget, schedule=schedule, step=0.3, state=file, **arguments)


@pytest.mark.parametrize("backtrack", [False, True])
def test_corrections_do_not_count_as_a_rising_objective(backtrack):
    model, data, moment = least_squares_problem()
    report = isvt(
        model,
        data,
        tnc.Budget(bits_per_weight=20.0),
        metric="euclidean",
        step=0.45 / float(torch.linalg.eigvalsh(moment)[-1]),
        loss=least_squares,
        fmt="fp32",
        backtrack=backtrack,
        schedule=Schedule(steps=8, corrections=1),
    )
    assert len(report.steps) == 8
    assert not any(step.rose for step in report.steps)
    assert report.best < report.steps[0].loss


def test_the_modules_that_were_replaced_keep_their_dense_weights():
    model = tiny_llama(layers=1)
    module = model.model.layers[0].mlp.up_proj
    before = module.weight.detach().clone()
    isvt(model, batches(2), tnc.Budget(bits_per_weight=8.0), metric="input", schedule=Schedule(steps=2), step=0.3)
    assert isinstance(model.model.layers[0].mlp.up_proj, TNLinear)
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("metric", ["kronecker", "euclidean"])
def test_the_plan_truncates_the_dense_model_to_the_same_ranks(metric):
    model, data, budget = tiny_llama(layers=1), batches(2), tnc.Budget(bits_per_weight=8.0)
    isvt(model, data, budget, metric=metric, schedule=Schedule(kind="one-shot"), step=1e-9)
    again = tnc.apply_plan(tiny_llama(layers=1), model.tensornet_plan, None if metric == "euclidean" else data, workers=1)
    ids = data[0]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("metric", ["kronecker", "row-fisher"])
def test_layers_whose_gradient_is_zero_are_thresholded_by_their_inputs(metric):
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    report = isvt(model, batches(2), tnc.Budget(bits_per_weight=9.0), metric=metric, schedule=Schedule(steps=2), step=1e-3)
    assert report.nbytes <= report.allowed
    assert torch.isfinite(model(batches(1)[0]).logits).all()


def test_convolutions_are_thresholded_as_matrices():
    model, images = tiny_convnet(), torch.randn(16, 3, 9, 9)
    report = isvt(
        model,
        [(images, torch.arange(16) % 5)],
        tnc.Budget(bits_per_weight=14.0),
        metric="euclidean",
        loss=logistic,
        ignore=["depthwise"],
        schedule=Schedule(steps=4),
    )
    assert report.nbytes <= report.allowed
    assert torch.isfinite(model(images)).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "elementwise"}, TensorNetError, "no closed-form"),
        ({"metric": "hessian"}, TensorNetError, "hessian"),
        ({"step": -1.0}, TensorNetError, "positive"),
        ({"fmt": "int4g64"}, TensorNetError, "int4g64"),
        ({"threshold": "firm"}, TensorNetError, "firm"),
        ({"budget": tnc.Budget(bits_per_weight=0.05)}, BudgetError, "rank one"),
        ({"metric": {}}, TensorNetError, "no metric"),
    ],
)
def test_bad_requests_are_refused_and_leave_the_model_alone(options, error, message):
    model = tiny_llama(layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = {"budget": tnc.Budget(bits_per_weight=8.0), "metric": "euclidean"} | options
    with pytest.raises(error, match=message):
        isvt(model, batches(1), **arguments)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
