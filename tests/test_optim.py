"""The paper's update against its printed formula, and the learning-rate schedules."""

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from conftest import assert_close

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.engines.optimizer import Optimizer, Schedule
from alexnet_dist.errors import NotFinite
from alexnet_dist.evaluation.results import Score
from alexnet_dist.training.state import Progress

RATES = [0.1, 0.1, 0.01, 0.0, 0.0, 0.05, 0.2]


def run(  # type: ignore[no-untyped-def]
    overrides: list[str], rates: list[float], skip_at: int | None = None,
    fixed_scale: float | None = None,
):  # fmt: skip
    """Weights and biases along some steps on a loss of cos w a weight, and the optimiser."""
    generator = torch.Generator().manual_seed(0)
    named = [
        (name, torch.nn.Parameter(torch.randn(5, dtype=torch.float64, generator=generator)))
        for name in ("conv1.weight", "conv1.bias", "conv2.weight")
    ]
    config = load_config(overrides).optimizer
    optimizer = Optimizer(config, named, fixed_scale=fixed_scale)
    path = [[p.detach().clone() for _, p in named]]
    for step, rate in enumerate(rates):
        loss = sum(p.cos().sum() for _, p in named)
        (loss * optimizer.loss_scale(rate)).backward()
        optimizer.step(rate, torch.tensor(float(step == skip_at)))
        path.append([p.detach().clone() for _, p in named])
    return path, optimizer


@pytest.mark.parametrize(("bias_rate", "bias_decay"), [(1.0, True), (2.0, False)])
def test_velocity_is_the_papers_update(bias_rate: float, bias_decay: bool) -> None:
    """v ← 0.9·v − 0.0005·ε·w − ε·g; w ← w + v, at changing rates and at 0."""
    overrides = [
        f"optimizer.bias_rate={bias_rate}",
        f"optimizer.bias_decay={str(bias_decay).lower()}",
    ]
    path, _ = run(overrides, RATES)
    for place, (factor, decay) in enumerate([(1.0, 5e-4), (bias_rate, 5e-4 * bias_decay)]):
        w, v = path[0][place], torch.zeros(5, dtype=torch.float64)
        for step, rate in enumerate(RATES):
            epsilon = rate * factor
            v = 0.9 * v - decay * epsilon * w - epsilon * -w.sin()
            w = w + v
            assert_close(path[step + 1][place], w, 1e-15)
    assert path[4][0].ne(path[3][0]).all(), "at a rate of 0 the velocity goes on"


def test_torchs_form_is_torchs_sgd() -> None:
    path, _ = run(["optimizer.momentum_form=torch"], RATES)
    w = torch.nn.Parameter(path[0][0].clone())
    reference = torch.optim.SGD([w], lr=1, momentum=0.9, weight_decay=5e-4)
    for step, rate in enumerate(RATES):
        reference.zero_grad()
        w.cos().sum().backward()
        reference.param_groups[0]["lr"] = rate
        reference.step()
        assert_close(path[step + 1][0], w.detach(), 1e-15)


def test_both_forms_agree_at_a_constant_rate() -> None:
    ours, theirs = (
        run([f"optimizer.momentum_form={form}"], [0.1] * 9)[0] for form in ("velocity", "torch")
    )
    assert_close(ours[-1][0], theirs[-1][0], 1e-14)


def test_adam_is_torchs_adam() -> None:
    path, optimizer = run(["optimizer.kind=adam", "optimizer.weight_decay=0"], RATES)
    w = torch.nn.Parameter(path[0][0].clone())
    reference = torch.optim.Adam([w], lr=1)
    for step, rate in enumerate(RATES):
        reference.zero_grad()
        w.cos().sum().backward()
        reference.param_groups[0]["lr"] = rate
        reference.step()
        assert_close(path[step + 1][0], w.detach(), 1e-14)
    kinds = {name.partition("/")[0] for name in optimizer.tensors()}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}


def test_a_kind_that_someone_adds_is_given_the_rate_itself() -> None:
    """`momentum_form` is not its own: the rate is not inside it, nor in the loss."""
    for rate in (0.1, 0.0):
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = Optimizer(
            load_config(["optimizer.kind=adam"]).optimizer, [("a.weight", weight)]
        )
        optimizer.config = replace(optimizer.config, kind="added")  # type: ignore[arg-type]
        assert optimizer.loss_scale(rate) == 1
        optimizer.prepare(rate, torch.tensor(0.0))
        (group, _) = optimizer.optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (rate, 5e-4)


@pytest.mark.parametrize("form", ["velocity", "torch"])
def test_lars_is_the_printed_formula(form: str) -> None:
    """λ = trust · ‖w‖ ÷ (‖g‖ + decay · ‖w‖), of each layer's weights; biases are as with SGD."""
    own = ["optimizer.trust=0.05", "optimizer.weight_decay=0.3", "optimizer.bias_rate=2"]
    path, _ = run([*own, "optimizer.kind=lars", f"optimizer.momentum_form={form}"], RATES)
    for place, (factor, is_weight) in enumerate([(1, True), (2, False), (1, True)]):
        w, v = path[0][place], torch.zeros(5, dtype=torch.float64)
        for step, rate in enumerate(RATES):
            g = -w.sin()
            trust = 0.05 * w.norm() / (g.norm() + 0.3 * w.norm()) if is_weight else 1.0
            change = trust * (g + 0.3 * w)
            # The rate is inside the velocity, or outside.
            v = 0.9 * v + (rate if form == "velocity" else 1) * change
            w = w - factor * (1 if form == "velocity" else rate) * v
            assert_close(path[step + 1][place], w, 1e-14)


@pytest.mark.parametrize("form", ["velocity", "torch"])
@pytest.mark.parametrize("kind", ["sgd", "adam", "lars"])
def test_a_fixed_scale_of_the_gradients_changes_no_update(kind: str, form: str) -> None:
    """At whatever rate, and 0: the loss is scaled by it alone."""
    how = [f"optimizer.kind={kind}", f"optimizer.momentum_form={form}"]
    path, _ = run(how, RATES)
    scaled, optimizer = run(how, RATES, fixed_scale=1024)
    assert optimizer.loss_scale(1e-9) == 1024
    for ours, theirs in zip(scaled, path, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, 1e-7)  # the factor is a float32, as torch wants it


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("skip_at", [0, 3])
def test_a_skipped_step_changes_nothing(kind: str, skip_at: int) -> None:
    rates = [0.05] * 5
    skipped, one = run([f"optimizer.kind={kind}"], rates, skip_at)
    without, other = run([f"optimizer.kind={kind}"], rates[1:])
    assert torch.equal(skipped[skip_at][0], skipped[skip_at + 1][0])
    assert torch.equal(skipped[-1][0], without[-1][0])
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name])


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_state_goes_out_and_in(kind: str) -> None:
    _, optimizer = run([f"optimizer.kind={kind}"], RATES)
    tensors = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    fresh = Optimizer(optimizer.config, optimizer.parameters.items())
    places = {name: tensor.data_ptr() for name, tensor in fresh.tensors().items()}
    fresh.load(tensors)
    # A captured step reads them there.
    assert {name: tensor.data_ptr() for name, tensor in fresh.tensors().items()} == places
    assert fresh.tensors().keys() == tensors.keys()
    assert all(torch.equal(fresh.tensors()[name], tensors[name]) for name in tensors)


def schedule(tiny: Callable[..., Config], *overrides: str) -> Schedule:
    """Of 10 steps an epoch, 4 epochs, at a rate of 1."""
    config = tiny("train.batch=8", "train.epochs=4", "schedule.rate=1", *overrides)
    return Schedule.of(config, samples=80)


def test_a_kind_that_is_only_in_the_schema_does_not_train_as_sgd() -> None:
    config = replace(load_config([]).optimizer, kind="adagrad")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="adagrad"):
        Optimizer(config, [("conv1.weight", torch.nn.Parameter(torch.ones(1)))])


def test_steps_fall_at_their_epochs(tiny: Callable[..., Config]) -> None:
    s = schedule(tiny, "schedule.kind=steps", "schedule.at_epochs=[1,2.5]")
    assert s.last_step == 40
    rates = [s.rate(step) for step in (0, 9, 10, 24, 25, 39)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_polynomial_falls_to_zero_after_a_linear_warm_up(tiny: Callable[..., Config]) -> None:
    s = schedule(tiny, "schedule.kind=polynomial", "schedule.power=2", "schedule.warmup_epochs=1")
    assert s.rate(0) == pytest.approx(0.1)
    assert s.rate(4) == pytest.approx(0.5 * 0.9**2)
    assert s.rate(20) == pytest.approx(0.25)
    assert s.rate(39) == pytest.approx((1 / 40) ** 2)
    s = schedule(tiny, "schedule.kind=steps", "schedule.warmup_epochs=0.25")  # 2.5 steps
    assert [s.rate(step) for step in range(4)] == pytest.approx([0.4, 0.8, 1, 1])


def test_plateau_falls_when_errors_stop_improving_three_times(tiny: Callable[..., Config]) -> None:
    s = schedule(tiny, "schedule.kind=plateau", "schedule.patience=2")
    rates = []
    for error in (0.9, 0.8, 0.8, 0.85, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7):
        s.observe(error)
        rates.append(s.rate(0))
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001])
    again = schedule(tiny, "schedule.kind=plateau", "schedule.patience=2")
    again.load(s.state())
    assert again == s


@pytest.mark.parametrize(
    ("epochs", "every", "evaluated"),
    [
        ("2", "1", [50, 100]),
        ("1.02", "1", [51]),  # not after 50 and 51
        ("1.2", "1", [50, 60]),
        ("0.5", "1", [25]),
        ("1.1", "0.5", [25, 50, 55]),
        ("3.02", "0.3", [15, 30, 45, 60, 75, 90, 105, 120, 135, 151]),
    ],
)
def test_no_network_is_evaluated_twice_at_the_end(
    epochs: str, every: str, evaluated: list[int], tiny: Callable[..., Config]
) -> None:
    config = tiny(f"train.epochs={epochs}", f"evaluate.every_epochs={every}")
    schedule, progress = Schedule.of(config, samples=400), Progress()
    found = []
    for progress.step in range(1, schedule.last_step + 1):
        if progress.evaluation_due(config, schedule):
            progress.evaluated_step = progress.step
            found.append(progress.step)
    assert found == evaluated


@pytest.mark.parametrize("first", ["1", "2.02", "2.5"])
def test_a_plateau_run_that_is_lengthened_falls_as_one_that_was_as_long_at_once(
    first: str, tiny: Callable[..., Config]
) -> None:
    """50.5 steps an epoch, at whose ends it is evaluated: after 51, 101, 152, …"""

    def rates(*lengths: str) -> list[float]:
        progress, found = Progress(), list[float]()
        state = Schedule.of(tiny(), samples=404).state()
        for epochs in lengths:
            config = tiny("schedule.kind=plateau", "schedule.patience=1", f"train.epochs={epochs}")
            schedule = Schedule.of(config, samples=404)
            schedule.load(state)
            while not progress.finished(config, schedule):
                found.append(schedule.rate(progress.step))
                progress.step += 1
                if progress.evaluation_due(config, schedule):
                    progress.observe(Score(100, 10, 50, 2.0), config, schedule)
            state = schedule.state()
        return found

    assert len(set(rates("8"))) == 4
    assert rates(first, "8") == rates("8")


def test_of_equal_errors_the_best_has_the_lowest_loss(tiny: Callable[..., Config]) -> None:
    progress, best, config = Progress(interval=[1.5] * 5, damaged=2, skipped=1), [], tiny()
    schedule = Schedule.of(config, samples=400)
    for correct, loss in ((20, 2.1), (20, 2.3), (20, 1.9), (19, 0.5), (21, 2.0)):
        progress.step += 1
        progress.observe(Score(81, correct, 60, loss), config, schedule)
        best.append(progress.best_step)
    assert best == [1, 1, 3, 3, 5]
    again = Progress.of(asdict(progress))
    assert (again.best_step, again.best_loss) == (5, 2.0)
    with pytest.raises(NotFinite, match="the evaluation after step 5 gave a loss of nan"):
        progress.observe(Score(81, 30, 60, float("nan")), config, schedule)
    assert progress == again
