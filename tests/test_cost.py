"""The cost model: arithmetic worked by hand, its recommendations, and measurements held out."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, alexnet_dist

from alexnet_dist.cli import main
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.errors import ConfigError
from alexnet_dist.parallel import device
from alexnet_dist.planning import dry_run, fitting, machines, scaling
from alexnet_dist.planning.cost_model import Collective, decoding, predict, transfer_s
from alexnet_dist.planning.dry_run import plan, plan_on
from alexnet_dist.planning.fitting import Measured, fit, read_bench
from alexnet_dist.planning.forecast import assumed, forecast, here, recommended, schedule
from alexnet_dist.planning.machines import MACHINES, Cluster, Machine, known
from alexnet_dist.planning.measured import Step, correction, read_steps
from alexnet_dist.planning.plan import Passes, Plan, Prediction, Rank
from alexnet_dist.planning.text import _hours, plot

# 1 GFLOP/s reached, 1 GB/s of memory, links of 100 MB/s and nodes of 80: round seconds.
ROUND = Machine(
    "round", {"fp32": 2e9}, 0.5, 1e9, 0.25, 1e8, 0.001, 8e7, 0.01, "made up", 40.0, 1.0, 1e12,
)  # fmt: skip


def rank(**own: Any) -> Rank:
    """What a layout of a plan made by hand asks: nothing, but what is named."""
    return Rank(**{"batch_per_replica": 4, "parameters": 2_000_000, "memory": {"peak": 0},
                   "bytes": {}, "calls": {}} | own)  # fmt: skip


def counted(ranks: int, **layouts: Rank) -> Plan:
    """A plan made by hand: 8 images of 0.5 GFLOP, and two layers of a million parameters."""
    return Plan(
        recipe={
            "train.precision": "fp32",
            "data.pipeline": "dali",
            "data.canvas": 256,
            "model.exchange": ["fc2"],
        },
        layout="one",
        ranks=ranks,
        batch=8,
        parameters={"conv1": 1_000_000, "fc2": 1_000_000},
        forward_flops_per_image={"conv1": 100_000_000, "fc2": 100_000_000},
        training_flops_per_image=500_000_000,  # conv1: forward, weights; fc2 also inputs
        map_values_per_image={"all": 1_000_000, "normalised": 0},
        layouts={"one": rank()} | layouts,
    )


def test_a_step_on_one_device_is_the_sum_of_its_parts() -> None:
    found = predict(counted(1), "one", Cluster(ROUND, 1))
    assert found.parts_s == pytest.approx({
        "arithmetic": 4.0,  # 8 × 0.5 GFLOP at 1 GFLOP/s
        "maps": 11 * 8 * 4e6 / 1e9,
        "parameters": 2e6 * 36 / 1e9,
        "fixed": 0.25,
        "exchange": 0.0,
        "all-reduce": 0.0,
        "decode": 8 / 40,
    })  # fmt: skip
    assert found.step_s == pytest.approx(4.0 + 0.352 + 0.072 + 0.25)
    assert found.bottleneck == "arithmetic"


def test_decoding_limits_where_it_takes_longer_than_all_the_rest() -> None:
    slow = dataclasses.replace(ROUND, decode=1.0)
    found = predict(counted(1), "one", Cluster(slow, 1))
    assert (found.step_s, found.bottleneck) == (8.0, "decode")
    assert found.training_images_per_s == pytest.approx(8 / 4.674)


def test_a_step_of_kernels_is_arithmetic_passes_and_what_starts_them() -> None:
    """40,000 kernels, of which a graph starts each in 1.5 µs, and Python in 25."""
    gpu = dataclasses.replace(ROUND, peak={"fp32": 32e9}, fused=True)
    passes = Passes(160_000_000, 80_000_000, 40_000)

    def parts(execution: str) -> dict[str, float]:
        one = rank(execution=execution, passes=passes)
        return dict(predict(counted(1, one=one), "one", Cluster(gpu, 1)).parts_s)

    computing = {
        "arithmetic": 8 * 0.2e9 / 16e9 + 8 * 0.3e9 / 16e9,  # half of the peak; conv1, fc2
        "maps": 0.16 / 0.8,  # four fifths of a GB/s
        "parameters": 0.08 / 0.8,
    }
    nothing = {"exchange": 0.0, "all-reduce": 0.0, "decode": 8 / 40}
    assert parts("graph") == pytest.approx(computing | {"fixed": 0.22} | nothing)
    # Python starts kernels beside the GPU: what counts is the longer of the two.
    held_up = 1.0 - sum(computing.values())
    assert parts("fused") == pytest.approx(computing | {"fixed": held_up} | nothing)


def test_few_samples_pass_over_weights_for_longer_than_they_compute() -> None:
    one = rank(execution="graph", passes=Passes(0, 0, 0))
    gpu = dataclasses.replace(ROUND, peak={"fp32": 32e12}, memory=1e8, fused=True)
    found = predict(counted(1, one=one), "one", Cluster(gpu, 1)).parts_s["arithmetic"]
    assert found == pytest.approx(8 * 0.2e9 / 16e12 + 3 * 4 * 1_000_000 / 0.8e8)


def test_who_decodes_is_by_pipeline_card_and_size() -> None:
    config = ["paper/alexnet-2012", "model.classes=1000", "layout.kind=one"]

    def of(card: str, pipeline: str, canvas: int = 256) -> tuple[str, float]:
        planned = counted(1)
        recipe = {**planned.recipe, "data.canvas": canvas}
        at = Cluster.of(card)
        found = decoding(dataclasses.replace(planned, recipe=recipe), at, pipeline)
        assert found.pipeline == pipeline
        return found.how, found.images_per_s

    # As measured, by DALI alone and by threads, of images of 224 pixels.
    assert of("h200", "dali", 224) == ("the GPU's hardware decoder", pytest.approx(49_000))
    assert of("h200", "dali", 448)[1] == pytest.approx(49_000 / 4)
    by_cuda = dataclasses.replace(MACHINES["h200"], decode=0.0)
    planned = dataclasses.replace(counted(1), recipe={**counted(1).recipe, "data.canvas": 224})
    assert decoding(planned, Cluster(by_cuda, 1)).images_per_s == pytest.approx(19_000)
    for cores, rate in ((1, 2400), (4, 4750 * (224 / 256) ** 2), (14, 4000 * (224 / 256) ** 2)):
        at = Cluster(dataclasses.replace(MACHINES["h200"], cores=cores), 1)
        assert decoding(counted(1), at, "torch").images_per_s == pytest.approx(rate)
    assert of("a10", "dali")[0] == "the GPU's CUDA cores"
    assert of("k20", "dali")[0].endswith("share Python's lock")
    assert of("h100", "resident") == ("each image is decoded once, at the start", float("inf"))
    for canvas, rate in ((128, 2400), (256, 2400), (512, 600)):
        assert of("cpu", "torch", canvas) == ("on all cores", rate)
    # DALI on an H100 gives more than threads do.
    assert of("h100", "dali")[1] > 10 * of("h100", "torch")[1]
    few, many = 10_000, 1_281_167
    assert assumed(load_config(config), MACHINES["h100"], few, 2e9)[0] == "resident"
    kind, why = assumed(load_config(config), MACHINES["h100"], many, 2e9)
    assert (kind, why) == (
        "dali", "auto: decoded images would take 251.89 GB per rank, of 78.00 GB free",
    )  # fmt: skip
    assert assumed(load_config(config), MACHINES["cpu"], few, 2e9)[0] == "torch"
    own = load_config([*config, "data.pipeline=torch"])
    assert assumed(own, MACHINES["h100"], few, 2e9) == ("torch", "set")


@pytest.mark.parametrize(
    ("name", "group", "stride", "nodes", "seconds"),
    [
        ("all-reduce", 4, 1, 1, 1.0 + 3 * 4 * 0.001),  # in a node: up and down a tree of 4
        ("all-gather", 4, 1, 1, 1.0 + 3 * 3 * 0.001),
        ("all-reduce", 8, 1, 2, 1e8 / 8e7 + 3 * 6 * 0.01),  # a ring uses all the node's links
        ("all-to-all", 8, 1, 2, 1e8 / 2e7 + 3 * 7 * 0.01),  # each device its own quarter
        ("all-reduce", 4, 2, 2, 1e8 / 4e7 + 3 * 4 * 0.01),  # every other rank: half the links
        ("all-reduce", 1, 1, 2, 0.0),
    ],
)
def test_a_collective_takes_bytes_over_bandwidth_and_hops(
    name: str, group: int, stride: int, nodes: int, seconds: float
) -> None:
    taken = transfer_s(Collective(name, 1e8, 3, group, stride), Cluster(ROUND, 4, nodes))
    assert taken == pytest.approx(seconds)


def test_sums_of_gradients_hide_behind_the_rest_of_the_backward() -> None:
    """fc2's backward takes 0.4 of the step's arithmetic and maps, conv1's 0.2: fc2's sum hides
    there, conv1's does not."""
    replicas = rank(calls={"all-reduce": 16}, bytes={"all-reduce": 8_000_000, "total": 8_000_000})
    free = dataclasses.replace(ROUND, latency_s=0.0)
    found = predict(counted(2, replicas=replicas), "replicas", Cluster(free, 2))
    assert found.parts_s["all-reduce"] == pytest.approx(4e6 / 1e8)
    slow = dataclasses.replace(free, link=4e6)  # a second a layer: 0.2 × 2.176 s of fc2's hide
    found = predict(counted(2, replicas=replicas), "replicas", Cluster(slow, 2))
    assert found.parts_s["all-reduce"] == pytest.approx(2.0 - 0.2 * (2 + 0.176))
    on_cores = dataclasses.replace(slow, overlap=False)  # the cores send: nothing hides
    found = predict(counted(2, replicas=replicas), "replicas", Cluster(on_cores, 2))
    assert found.parts_s["all-reduce"] == pytest.approx(2.0)


def test_gradients_that_columns_exchange_hide_behind_those_of_weights() -> None:
    """fc2's take 0.2 of the step's arithmetic, which two columns share; maps are not hidden."""
    bytes_of = {"all-gather": 1_000_000, "all-to-all": 1_000_000, "total": 2_000_000}
    columns = rank(calls={"all-gather": 1, "all-to-all": 1}, bytes=bytes_of)
    for link, exposed in ((1e7, 0.1), (1e6, 1.0 + 1.0 - 0.4)):
        machine = dataclasses.replace(ROUND, latency_s=0.0, link=link, fused=True)
        found = predict(counted(2, columns=columns), "columns", Cluster(machine, 2))
        assert found.parts_s["exchange"] == pytest.approx(exposed)
    older = dataclasses.replace(machine, fused=False)
    found = predict(counted(2, columns=columns), "columns", Cluster(older, 2))
    assert found.parts_s["exchange"] == pytest.approx(2.0)


def tiny(*overrides: str) -> Config:
    return load_config([*TINY, "train.batch=48", "model.classes=6", *overrides])


def test_a_fit_finds_the_machine_that_took_the_seconds() -> None:
    there = dataclasses.replace(
        MACHINES["cpu"], peak={"fp32": 3e9}, memory=2e9, serial=0.2, link=5e7, latency_s=2e-3,
        step_s=0.01,
    )  # fmt: skip
    measured = []
    for overrides in (["train.batch=24"], ["train.batch=48"], ["model.fc=[360,280]"]):
        planned = plan(tiny("train.precision=fp32", *overrides), 2)
        for kind in ("one", "columns", "replicas", "sharded_fc"):
            found = predict(planned, kind, Cluster(there, 2))
            seconds = planned.batch / found.training_images_per_s
            measured.append(Measured(planned, kind, 2, seconds))
    found = fit(measured)
    for one in measured:
        again = predict(one.planned, one.kind, Cluster(found, 2))
        assert one.planned.batch / again.training_images_per_s == pytest.approx(
            one.seconds, rel=1e-3
        )
    assert found.link == pytest.approx(there.link, rel=0.01)
    assert found.step_s == pytest.approx(there.step_s, rel=0.01)
    with pytest.raises(ConfigError, match="4 measured steps are too few to fit"):
        fit(measured[:4])
    narrow = dataclasses.replace(planned, recipe={**planned.recipe, "train.precision": "bf16"})
    with pytest.raises(ConfigError, match="steps in fp32 and bf16 cannot be fitted together"):
        fit([*measured, dataclasses.replace(measured[0], planned=narrow)])


MEASURED = Path(__file__).with_name("measured_layouts.json")  # of bench layouts, two cores each
# By CPU: the machine that was fitted to it; steps of which only 0.81 to 0.85 were predicted.
KNOWN = {
    "Intel(R) Xeon(R) Processor": ("cpu", {(32, 115, "zero1"), (32, 115, "zero2")}),
    "AMD EPYC": ("cpu-avx512", {(64, 227, "zero1")}),
    "AMD EPYC without AVX-512": ("cpu-avx2", {(64, 227, "zero1"), (64, 227, "zero2")}),
}


PLANNED = functools.cache(plan)


@pytest.fixture(scope="module", params=KNOWN)
def cpu(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def measured(cpu: str, tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    found, path = [], tmp_path_factory.mktemp("bench") / "layouts.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "plan", PLANNED)  # of several CPUs, the same steps were measured
        for one in json.loads(MEASURED.read_text()):
            if one["machine"]["cpu"] == cpu:
                path.write_text(json.dumps(one))
                found += read_bench(path)
    return found


def place(one: Measured) -> tuple[int, int, str]:
    return one.planned.batch, one.planned.recipe["model.crop"], one.kind


def error(one: Measured, machine: Machine) -> float:
    found = predict(one.planned, one.kind, Cluster(machine, one.cores))
    return float(one.planned.batch / found.training_images_per_s / one.seconds - 1)


def test_the_machine_that_ships_is_the_one_measured(cpu: str, measured: list[Measured]) -> None:
    found, shipped = fit(measured), MACHINES[KNOWN[cpu][0]]
    for field in ("memory", "step_s", "link", "latency_s", "zero_s", "serial"):
        assert getattr(shipped, field) == pytest.approx(getattr(found, field), rel=0.02, abs=1e-4)
    assert shipped.peak["bf16"] == pytest.approx(found.peak["bf16"], rel=0.02)


def test_a_batch_held_out_of_the_fit_is_predicted(cpu: str, measured: list[Measured]) -> None:
    missed = KNOWN[cpu][1]
    for batch, crop in {place(one)[:2] for one in measured}:
        others = fit([one for one in measured if place(one)[:2] != (batch, crop)])
        for one in measured:
            if place(one)[:2] == (batch, crop) and place(one) not in missed:
                assert abs(error(one, others)) < 0.15, place(one)


@pytest.mark.parametrize("kind", ["one", "columns", "replicas", "sharded_fc", "zero1", "zero2"])
def test_a_layout_and_a_batch_both_held_out_are_predicted(
    measured: list[Measured], kind: str
) -> None:
    batch, crop = 128, 227
    others = fit([o for o in measured if o.kind != kind and place(o)[:2] != (batch, crop)])
    (one,) = (o for o in measured if place(o) == (batch, crop, kind))
    assert abs(error(one, others)) < 0.15


def test_what_is_recommended_is_the_fastest_that_fits_and_the_simplest_of_equals() -> None:
    def one(speed: float, too_large: str = "") -> Prediction:
        return Prediction(1, speed, speed, 1.0, {}, "", "", too_large=too_large)

    assert recommended({"one": one(5.0)}) == "one"
    assert recommended({"one": one(10.0), "zero1": one(10.2)}) == "one"
    assert recommended({"one": one(10.0), "sharded_fc": one(11.0)}) == "sharded_fc"
    assert recommended({"columns": one(10.0), "replicas": one(20.0, too_large="9")}) == "columns"
    assert recommended({"one": one(5.0, too_large="9 GB of 3")}) is None


@pytest.mark.parametrize(
    ("gpus", "batch", "sensible"),
    [
        ("h100", 128, {"one"}),
        ("gtx580:2", 128, {"columns", "replicas", "sharded_fc"}),
        ("v100:8x64", 65536, {"replicas", "columns_x_replicas"}),  # gathering samples does not pay
    ],
)
def test_recommendations_for_the_papers_network(gpus: str, batch: int, sensible: set[str]) -> None:
    precision = {"gtx": "fp32", "v10": "fp16"}.get(gpus[:3], "bf16")
    config = load_config([f"train.batch={batch}", f"train.precision={precision}"])
    at = Cluster.of(gpus)
    planned = plan_on(config, at.total, at.machine)
    assert forecast(planned, config, at).recommended in sensible


_V100 = "paper/torchvision-2014", "train.precision=fp16"
# What docs/scaling.md compares: config, cluster, and published images/s or times one device.
PUBLISHED = [
    (["train.precision=fp32"], "gtx580:2", "columns", "speed", 227, 0.10),
    ([*_V100, "train.batch=512"], "v100", "one", "speed", 9319, 0.05),
    ([*_V100, "train.batch=4096"], "v100:8", "replicas", "speed", 70869, 0.10),
    (["paper/torchvision-2014", "train.batch=4096"], "a100:8", "replicas", "speed", 129266, 0.10),
    (["paper/torchvision-2014", "train.batch=1024", "train.precision=fp32"], "k20:4x2",
     "sharded_fc", "times", 6.25, 0.20),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "gpus", "kind", "what", "published", "bound"), PUBLISHED)
def test_published_speeds_are_met(
    recipe: list[str], gpus: str, kind: str, what: str, published: float, bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dry_run, "KINDS", ("one",))  # and the recipe's own, of all that are
    at = Cluster.of(gpus)
    by_operators = [*recipe, f"layout.kind={kind}", "train.execution=eager"]
    planned = plan(load_config(by_operators), at.total)
    found = predict(planned, kind, at).training_images_per_s
    if what == "times":
        found /= predict(planned, "one", at).training_images_per_s
    assert found == pytest.approx(published, rel=bound)


def test_tf32_is_between_float32_and_bf16() -> None:
    speeds = []
    for precision in ("fp32", "tf32", "bf16"):
        config = load_config([f"train.precision={precision}", "layout.kind=one"])
        planned = plan(config, 1, gpu=True)
        speeds.append(predict(planned, "one", Cluster.of("a100")).training_images_per_s)
    assert speeds == sorted(speeds)
    assert len({*speeds}) == 3


def test_a_curve_keeps_the_batch_of_a_device_and_says_what_holds_it_up(tmp_path: Path) -> None:
    at = Cluster.of("h100:2x2")
    rows = scaling.curve(tiny("train.precision=bf16"), at, most=4)
    assert {row["ranks"] for row in rows} == {1, 2, 4}
    assert rows[0]["efficiency"] == 1
    assert {row["layout"] for row in rows if row["ranks"] == 4} == {
        "replicas", "columns_x_replicas", "sharded_fc", "zero1", "zero2",
    }  # fmt: skip
    for row in rows:
        assert 0 < row["efficiency"] < 1.2  # a rank of one column launches half of the kernels
        assert row["images_per_s"] == pytest.approx(
            row["efficiency"] * row["ranks"] * rows[0]["images_per_s"]
        )
    assert scaling.lines(rows)[-1].startswith("| 4 |")
    scaling.draw(rows, at, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_a_forecast_as_json() -> None:
    result = alexnet_dist("plan", *TINY, "train.batch=96", "layout.kind=replicas", "--gpus",
                          "h100:8x4", "--json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["machine"]["devices"] * found["machine"]["nodes"] == found["ranks"] == 32
    assert found["recommended"] in found["predicted"]
    replicas = found["predicted"]["replicas"]
    assert replicas.keys() == {
        "ranks", "images_per_s", "training_images_per_s", "step_s", "parts_s", "bottleneck",
        "basis", "hours", "too_large",
    }  # fmt: skip
    hours = found["epochs"] * found["images_per_epoch"] / replicas["images_per_s"] / 3600
    assert replicas["hours"] == pytest.approx(hours)
    pixels = (found["recipe"]["data.canvas"] / 224) ** 2
    assert found["decode"]["gpus"] == pytest.approx(
        found["decode"]["images_per_s"] / 49_000 * pixels
    )
    assert found["decode"]["pipeline"] in ("dali", "resident")
    assert len(found["schedule"]) == 60
    assert found["measured"] is None
    assert "problem" in found["layouts"]["sharded_fc"]
    assert "sharded_fc" not in found["predicted"]


def test_as_many_gpus_decode_as_there_are_ranks() -> None:
    config = tiny("layout.kind=replicas", "data.pipeline=dali")

    def decoded(ranks: int, gpus: str) -> float | None:
        at = Cluster.of(gpus)
        return forecast(plan_on(config, ranks, at.machine), config, at).decode.decoded_images_per_s

    assert decoded(2, "h100:8") == decoded(2, "h100:2")


def test_what_does_not_fit_leaves_others_their_memory() -> None:
    config = tiny("layout.kind=replicas", "layout.ranks=0", "train.batch=8")
    at = Cluster.of("h100:8")
    planned = plan_on(config, 8, at.machine)
    large = dataclasses.replace(planned.of("one"), memory={"peak": 10**12})
    planned = dataclasses.replace(planned, layouts={**planned.layouts, "one": large})
    found = forecast(planned, config, at)
    assert (found.predicted["one"].too_large != "", found.decode.pipeline) == (True, "resident")


def test_a_run_is_set_beside_what_was_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All in one process, which plans each layout once."""
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    config = tiny("layout.kind=one", f"output_dir={tmp_path / 'runs'}", "train.precision=bf16")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    own = here(tiny("layout.device=cpu"), None)
    assert own is not None
    cpus = [kind for kind in MACHINES if kind.startswith("cpu")]
    cpu = next(kind for kind in cpus if MACHINES[kind] == own.machine)
    other = next(kind for kind in cpus if kind != cpu)
    on = {"device": device.machine()["cpu"], "ranks": 1, "cores": 2}
    before = {"device": "NVIDIA H100 80GB HBM3", "ranks": 8, "cores": 96}
    rows = [
        (before, 7000.0),
        (before, 8000.0),
        *((on, s) for s in (1.0, 90.0, 100.0, 110.0)),
    ]  # the first on a machine is warm-up
    points = [{"kind": "speed", "step": n, "images_per_s": s, "data_wait": 0.25, "on": where}
              for n, (where, s) in enumerate(rows)]  # fmt: skip

    def planned(*options: str, as_json: bool = True) -> Any:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
        code = main.main(["plan", str(folder), *options, *(["--json"] if as_json else [])])
        said = capsys.readouterr()
        assert code == 0, said.err
        return json.loads(said.out) if as_json else said.out

    found = planned("--gpus", f"{cpu}:2", "--ranks", "1")
    assert (found["measured"]["images_per_s"], found["measured"]["points"]) == (100, 3)
    assert found["measured"]["predicted_to_measured"] == pytest.approx(
        found["predicted"]["one"]["images_per_s"] / 100
    )
    said = planned("--gpus", f"{cpu}:2", "--ranks", "1", as_json=False)
    for word in ("recommended: one", f"on 1 rank, {on['device']}, 2 cores: 100 images/s", "rate",
                 "waiting for data 25% (median of 3 points); predicted: ", " times that",
                 "decoding"):  # fmt: skip
        assert word in said

    # Only like is compared with like: other GPUs, CPUs, cores, another network, older metrics.
    for unlike in (f"{cpu}:16", f"{other}:2"):
        found = planned("--gpus", unlike, "--ranks", "1")
        assert found["measured"]["images_per_s"] == 100
        assert "predicted_to_measured" not in found["measured"]
    said = planned("train.epochs=1", "--gpus", "h100", "--ranks", "1", as_json=False)
    assert " for 1 epoch of " in said
    assert "not compared: only what is of the same devices and ranks is" in said
    assert planned("model.fc=[20,28]", "--gpus", f"{cpu}:2", "--ranks", "1")["measured"] is None
    points = [{k: v for k, v in point.items() if k != "on"} for point in points]
    said = planned("--gpus", f"{cpu}:2", "--ranks", "1", as_json=False)
    assert "on a machine that it did not note: 100 images/s" in said
    assert "times that" not in said
    said = planned("layout.kind=columns", "--gpus", "h100:8", as_json=False)
    assert "(your layout, columns, is only in the first table)" in said


def test_no_time_is_said_to_be_nothing() -> None:
    said = [_hours(seconds / 3600) for seconds in (1.43, 90, 7200, 400_000)]
    assert said == ["1.4 s", "1.5 min", "2.0 h", "4.6 days"]


def test_a_schedule_is_drawn() -> None:
    config = tiny("schedule.kind=steps", "schedule.at_epochs=[30,60]", "schedule.rate=0.01")
    points = schedule(config, 4800)
    assert points[0] == (0.0, 0.01)
    assert points[-1] == (pytest.approx(89.99), pytest.approx(1e-4))
    drawn = plot(points)
    assert drawn[1].count("*") == 20
    assert sum(line.count("*") for line in drawn) == len(points)


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ({"avx2"}, "cpu-avx2"), ({"avx2", "avx512f"}, "cpu-avx512"), ({"bf16"}, "cpu-avx512"),
        ({"avx512f", "amx_bf16"}, "cpu"),
    ],
)  # fmt: skip
def test_a_hosts_cores_are_known_by_their_instructions(
    flags: set[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alexnet_dist.planning.forecast.cpu_flags", lambda: flags)
    found = here(tiny("layout.device=cpu"), None)
    assert found == Cluster(MACHINES[kind], device.cores())


@pytest.mark.parametrize("text", ["p100:8", "h100:0", "h100:8x", "h100:-1", "", "0xh100", "8x"])
def test_a_cluster_that_is_none_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--gpus {text}: must be KIND, .*as in h100:8x4"):
        Cluster.of(text)


@pytest.mark.parametrize(
    ("text", "kind", "devices", "nodes"),
    [
        ("H200", "h200", 1, 1), ("8xH100", "h100", 8, 1), ("b200:8x4", "b200", 8, 4),
        ("A100:2", "a100", 2, 1), ("L40s", "l40s", 1, 1), ("4xa10", "a10", 4, 1),
        ("T4", "t4", 1, 1), ("RTX 4090", "rtx4090", 1, 1), ("2x4090", "rtx4090", 2, 1),
        ("rtx-4090:2", "rtx4090", 2, 1), ("CPU:2", "cpu", 2, 1),
        ("cpu-avx512:2", "cpu-avx512", 2, 1), ("cpu-avx2", "cpu-avx2", 1, 1),
    ],
)  # fmt: skip
def test_a_cluster_is_written_as_people_do(text: str, kind: str, devices: int, nodes: int) -> None:
    assert Cluster.of(text) == Cluster(MACHINES[kind], devices, nodes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA A10", "a10"), ("Tesla T4", "t4"),
        ("NVIDIA L40S", "l40s"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA A1000", None),
        ("NVIDIA GH200 480GB", None), ("Tesla V100-SXM2-16GB", "v100"),
        ("Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz", None),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_its_name(name: str, kind: str | None) -> None:
    assert known(name) == (MACHINES[kind] if kind else None)
    assert kind is None or MACHINES[kind].source


# --- steps that were measured on a GPU


def test_a_step_before_the_kernels_is_what_an_h200_took() -> None:
    """Two precisions, by kernels of then for LRN (24 passes), as docs/performance.md has them."""
    before = [step for step in read_steps() if step.execution == "before"]
    assert [step.precision for step in before] == ["bf16", "fp32"]
    for step in before:
        machine = known(step.card)
        assert machine is MACHINES["h200"]
        machine = dataclasses.replace(machine, lrn_passes=24.0)
        own = [f"train.batch={step.batch}", f"train.precision={step.precision}"]
        config = load_config([*PAPERS, *own, "train.execution=eager"])
        found = predict(plan_on(config, 1, machine), "one", Cluster(machine, 1))
        assert 1e3 * step.batch / found.training_images_per_s == pytest.approx(step.ms, rel=0.15)


PAPERS = ["paper/alexnet-2012", "model.classes=1000", "layout.kind=one"]


@functools.cache
def of_paper(batch: int) -> Plan:
    return plan_on(load_config([*PAPERS, f"train.batch={batch}"]), 1, MACHINES["h200"])


def test_what_was_measured_corrects_what_is_computed() -> None:
    at, planned = Cluster.of("h200"), of_paper(128)
    alone = 1e3 * predict(planned, "one", at).step_s
    plain = predict(planned, "one", at, "resident")
    assert plain.basis == "not run"
    assert alone >= 1e3 * plain.step_s
    steps = (
        Step("NVIDIA H200", 128, "bf16", "graph", 1.1e3 * plain.step_s, "abc", "here"),
        Step("NVIDIA H200", 512, "bf16", "graph", 1e6, "abc", "of another commit"),
        Step("NVIDIA H200", 512, "bf16", "graph",
             1.3e3 * predict(of_paper(512), "one", at, "resident").step_s, "abc", "here"),
        Step("NVIDIA H200", 128, "fp32", "graph", 1e6, "abc", "another precision"),
        Step("NVIDIA H200", 128, "bf16", "eager", 1e6, "abc", "another way"),
    )  # fmt: skip
    factor, basis = correction(planned, "one", at.machine, steps)
    assert (factor, basis) == (pytest.approx(1.1), "measured")
    assert predict(planned, "one", at, "resident", factor).step_s == pytest.approx(
        1e-3 * steps[0].ms
    )
    between = correction(of_paper(256), "one", at.machine, steps)
    assert between == (pytest.approx((1.1 * 1.3) ** 0.5), "by steps measured of batch 128, 512")
    assert correction(of_paper(1024), "one", at.machine, steps)[0] == pytest.approx(1.3)
    other = dataclasses.replace(planned, recipe={**planned.recipe, "model.crop": 224})
    assert correction(other, "one", at.machine, steps)[1] == "by steps measured of batch 128, 512"
    elsewhere = correction(planned, "one", MACHINES["b200"], steps)
    assert elsewhere == (pytest.approx(1.3), "not run; by a step on NVIDIA H200")
    assert correction(planned, "one", MACHINES["v100"], steps) == (1.0, "")
    assert correction(planned, "one", at.machine, ()) == (1.0, "")


def test_a_batch_held_out_is_predicted_of_each_card() -> None:
    """Steps of fused kernels that `make gpu` measured: each by the others of its card."""
    steps = [step for step in read_steps() if step.execution != "before"]
    checked = 0
    for step in steps:
        machine = known(step.card)
        assert machine is not None, f"{step.card}: name it in planning/machines.py"
        others = tuple(
            s
            for s in steps
            if s.card == step.card
            and s.batch != step.batch
            and (s.precision, s.execution) == (step.precision, step.execution)
        )
        if not others:
            continue
        own = [f"train.batch={step.batch}", f"train.precision={step.precision}",
               f"train.execution={step.execution}"]  # fmt: skip
        planned = plan_on(load_config([*PAPERS, *own]), 1, machine)
        factor, _ = correction(planned, "one", machine, others)
        found = predict(planned, "one", Cluster(machine, 1), "resident", factor)
        assert 1e3 * found.step_s == pytest.approx(step.ms, rel=0.15), step
        checked += 1
    if not checked:
        pytest.skip("no two batches of one card are in planning/measured.jsonl: `make gpu` where "
                    "there is one, then `make docs`")  # fmt: skip


def test_what_cannot_be_foretold_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("layout.kind=replicas", "train.precision=bf16")
    planned = plan(config, 2)
    with pytest.raises(
        ConfigError, match="bf16: no speed is known for K20, only for fp32: set one of"
    ):
        forecast(planned, config, Cluster.of("k20:2"))
    with pytest.raises(ConfigError, match="2 ranks do not fit on 1 × H100"):
        forecast(planned, config, Cluster.of("h100"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="device=cuda: this machine has no GPU to predict for"):
        here(tiny("layout.device=cuda"), None)
    with pytest.raises(ConfigError, match=r"--fit .*: is not what `bench layouts --json` prints"):
        read_bench(Path(__file__))
    with pytest.raises(ConfigError, match=r"--machine .*: is not a machine that plan --fit wrote"):
        machines.read_machine(Path(__file__))


def test_a_machine_is_read_as_it_was_written(tmp_path: Path) -> None:
    machines.write_machine(MACHINES["k20"], tmp_path / "k20.json")
    assert machines.read_machine(tmp_path / "k20.json") == MACHINES["k20"]
    with pytest.raises(ConfigError, match=r"--machine /.*/k20\.json: cannot be written: No such f"):
        machines.write_machine(MACHINES["k20"], tmp_path / "nowhere" / "k20.json")


@pytest.mark.parametrize(
    "odd", [{"peak": "lots"}, {"peak": {"bf16": "1"}}, {"link": "1e9"}, {"memory": -1},
            {"step_s": float("nan")}, {"fused": 1}, {"name": None}, {"link": 0},
            {"peak": {"bf16": 0}}]
)  # fmt: skip
def test_a_machine_with_a_figure_that_cannot_be_is_refused(
    odd: dict[str, Any], tmp_path: Path
) -> None:
    ((name, value),) = odd.items()
    text = json.dumps(dataclasses.asdict(MACHINES["k20"]) | odd)
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ConfigError, match=f"is not a machine .*: {name} is {value!r}"):
        machines.read_machine(tmp_path / "odd.json")
