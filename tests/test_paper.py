"""The presets of configs/paper: layers, shapes, parameters and FLOPs against published tables or
arithmetic; and what their variants require of the network."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import made
import numpy as np
import pytest
import torch
from conftest import TINY, assert_close
from torch.nn import functional as F

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint.warm_start import InitialWeights, resolved
from alexnet_dist.config.load import configs_folder, load_config
from alexnet_dist.config.schema import Config, fingerprint
from alexnet_dist.data.dataset import open_dataset
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.errors import CheckpointError, ConfigError, DatasetError
from alexnet_dist.network.model import AlexNet
from alexnet_dist.network.shapes import final_side
from alexnet_dist.planning.dry_run import multiply_adds
from alexnet_dist.training.loop import train

PAPER = [34_944, 307_456, 885_120, 663_936, 442_624, 37_752_832, 16_781_312, 4_097_000]
REVIEW = [34_944, 614_656, 885_120, 1_327_488, 884_992, 37_752_832, 16_781_312, 40_970]
SIX = [*PAPER[:5], 256 * 128 * 9 + 256, *PAPER[5:]]
FALL_2011 = [*SIX[:-1], 4097 * 21_841]
HALF = [48 * 363 + 48, 128 * 1200 + 128, 192 * 1152 + 192, 192 * 1728 + 192, 256 * 1728 + 256,
        *PAPER[5:]]  # fmt: skip
APART = [34_944, 320 * 48 * 25 + 320, 384 * 160 * 9 + 384, 663_936, 442_624, 4096 * 4608 + 4096,
         4096 * 2048 + 4096, 4_097_000]  # fmt: skip
WEIRD = [64 * 363 + 64, 192 * 1600 + 192, 384 * 1728 + 384, 256 * 3456 + 256, 256 * 2304 + 256,
         *PAPER[5:]]  # fmt: skip
FOUR = [32 * 75 + 32, 32 * 800 + 32, 64 * 800 + 64, 64 * 16 * 10 + 10]
MAPS = [(96, 55), (256, 27), (384, 13), (384, 13), (256, 13)]
SIX_MAPS = [*MAPS, (256, 6)]
FOUR_MAPS = [(32, 32), (32, 16), (64, 8)]
# Maps of each convolution, parameters of each layer.
TABLE: dict[str, tuple[Sequence[tuple[int, int]], Sequence[int]]] = {
    "alexnet-2012": (MAPS, PAPER),
    "alexnet-2010": (MAPS, PAPER),
    "ensemble-5": (MAPS, PAPER),
    "alexnet-star-pretrain": (SIX_MAPS, FALL_2011),
    "alexnet-star-finetune": (SIX_MAPS, SIX),
    "ensemble-7-star": (SIX_MAPS, SIX),
    "one-column": ([(48, 55), (128, 27), (192, 13), (192, 13), (256, 13)], HALF),
    "no-lrn": (MAPS, PAPER),
    "no-overlap": (MAPS, PAPER),
    "no-exchange": ([(96, 55), (320, 27), (384, 13), (384, 13), (256, 13)], APART),
    "no-lighting": (MAPS, PAPER),
    "released-code": (MAPS, PAPER),
    "caffenet": (MAPS, PAPER),
    "caffe-alexnet": (MAPS, PAPER),
    "torchvision-2014": ([(64, 55), (192, 27), (384, 13), (256, 13), (256, 13)], WEIRD),
    "large-batch": (MAPS, PAPER),
    "fig1-relu": (FOUR_MAPS, FOUR),
    "fig1-tanh": (FOUR_MAPS, FOUR),
    "fig1-sigmoid": (FOUR_MAPS, FOUR),
    "review-cifar10": (MAPS, REVIEW),
    "review-cifar10-as-written": (MAPS, REVIEW),
}
TOTALS = {"alexnet-2012": 60_965_224, "torchvision-2014": 61_100_840, "review-cifar10": 58_322_314}


def test_every_preset_is_in_the_table() -> None:
    assert {path.stem for path in (configs_folder() / "paper").glob("*.yaml")} == TABLE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_has_the_published_layers(name: str) -> None:
    maps, parameters = TABLE[name]
    config = load_config([f"paper/{name}"])
    seen: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        model = AlexNet(config.model, init_weights=False).eval()
        for layer in model.layers():
            layer.register_forward_hook(
                lambda m, i, o: seen.update(
                    {m.name: (sum(made.shape[1] for made in o), *o[0].shape[2:])}
                )
            )
        side = config.model.crop
        logits = model(torch.empty(2, 3, side, side))
        macs = {layer.name: count for layer, count in multiply_adds(model).items()}
    assert tuple(logits.shape) == (2, config.model.classes)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in model.layers()]
    assert counts == list(parameters)
    assert sum(counts) == TOTALS.get(name, sum(parameters))
    shapes = [(channels, side, side) for channels, side in maps]
    assert [seen[n] for n in config.model.conv_names] == shapes
    # A weight is used once at each place of its map.
    places = [s * s for _, s in maps] + [1] * len(config.model.fc_names)
    weights = [layer.weight.numel() for layer in model.layers()]
    assert list(macs.values()) == [a * b for a, b in zip(places, weights, strict=True)]
    assert config.name.startswith(name)


def test_the_released_codes_layers_are_its_layer_files() -> None:
    """conv1 → cmrnorm → pool → ReLU; conv2 → ReLU → cmrnorm → rnorm → pool, scales ÷ n and ÷ n²."""
    config = load_config(["paper/released-code", *RELEASED]).model
    model = AlexNet(config, dtype=torch.float64).eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64) * 30
    p = dict(model.named_parameters())

    def cross(maps: torch.Tensor) -> torch.Tensor:
        halves = maps.chunk(2, dim=1)
        return torch.cat([F.local_response_norm(h, 5, 3.0, 0.75, 2.0) for h in halves], dim=1)

    def square(maps: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(maps)
        side = maps.shape[-1]
        for i in range(side):
            for j in range(side):
                near = maps[..., max(0, i - 2) : i + 3, max(0, j - 2) : j + 3]
                total = (near**2).sum((2, 3)) * 2.0 / 25
                out[..., i, j] = maps[..., i, j] / (1 + total) ** 0.75
        return out

    first = F.conv2d(F.pad(x, (0, 3, 0, 3)), p["conv1.weight"], p["conv1.bias"], 4)
    assert first.shape[-1] == math.ceil((64 - 11) / 4) + 1
    first = F.relu(F.max_pool2d(cross(first), 3, 2, ceil_mode=True))
    second = F.relu(F.conv2d(first, p["conv2.weight"], p["conv2.bias"], 1, 2, groups=2))
    second = F.max_pool2d(square(cross(second)), 3, 2, ceil_mode=True)
    seen: list[torch.Tensor] = []
    model.conv3.register_forward_pre_hook(lambda m, i: seen.append(torch.cat(i[0], 1)))
    model(x)
    assert_close(seen[0].detach(), second.detach(), 1e-12)


RELEASED = [
    "model.crop=64", "model.conv=[8,12,16,16,8]", "model.fc=[12,8]", "model.classes=5",
    "model.lrn.alpha=3.0", "model.spatial_norm.alpha=2.0", "model.init_std=0.1",
]  # fmt: skip


def test_rounding_up_covers_all_pixels() -> None:
    config = load_config(["paper/fig1-relu"]).model
    assert final_side(config) == 4
    assert final_side(load_config(["paper/fig1-relu", "model.round_up=false"]).model) == 3
    sparse = load_config(["model.pool=[1,2]", "model.round_up=true", "model.fc=[8,8]"]).model
    model = AlexNet(sparse, init_weights=False).eval()  # a window cannot begin beyond the edge
    assert model(torch.zeros(1, 3, sparse.crop, sparse.crop)).shape == (1, sparse.classes)
    x = torch.zeros(1, 3, 32, 32)
    logits = AlexNet(config).eval()(x)
    x[..., -1, -1] = 100
    assert not torch.equal(AlexNet(config).eval()(x), logits)


def test_new_layers_of_a_run_in_fp64_are_drawn_in_float64(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    one = ["layout.kind=one", "train.precision=fp64", "train.epochs=0.2"]
    train(tiny(*one, "name=first"))
    warm = tiny(*one, f"train.init_from={tmp_path / 'runs' / 'first'}", "train.init_new=[fc8]")
    fresh = AlexNet(warm.model, warm.seed, dtype=torch.float64).get_parameter("fc8.weight")
    assert torch.equal(InitialWeights(warm, ()).rows("fc8.weight", slice(None)), fresh)


def test_lighting_ends_where_the_released_codes_did() -> None:
    from alexnet_dist.data.dataset import Statistics
    from alexnet_dist.data.sampler import TrainSampler

    eye = np.eye(3)
    statistics = Statistics(np.zeros((9, 9, 3), np.float32), np.zeros(3), np.ones(3), eye)
    config = load_config([*TINY, "data.lighting_epochs=2"])
    sampler = TrainSampler(config, 8, statistics)  # an epoch is a step
    lit = [bool(sampler.samples(step, range(8)).lighting.any()) for step in range(4)]
    assert lit == [True, True, False, False]


def test_fine_tuning_begins_from_the_named_weights_and_a_new_last_layer(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    one = ["layout.kind=one", "train.precision=fp32", "train.epochs=0.5"]
    train(tiny(*one, "name=first"))
    first = tmp_path / "runs" / "first"
    warm = [*one, f"train.init_from={first}", "train.init_new=[fc8]", "schedule.rate=0"]
    config = tiny(*warm, "name=second", "seed=5", "optimizer.weight_decay=0")
    outcome = train(config)
    assert outcome.exit == 0
    before, after = (checkpoints.at(path) for path in (first, config.folder))
    begun = AlexNet(config.model, seed=5)
    for name in before.parameters().keys():  # noqa: SIM118
        found = after.parameters().rows(name, slice(None))
        there = before.parameters().rows(name, slice(None))
        fresh = begun.get_parameter(name).detach()
        assert torch.equal(found, fresh if name.startswith("fc8") else there), name
    digest = before.manifest["files"]["model.safetensors"]["sha256"]
    assert after.config.train.init_sha256 == digest
    assert train(config).exit == 0  # continues: nothing left to do

    moved = tiny(*warm, "name=second", "seed=5", "optimizer.weight_decay=0",
                 f"train.init_sha256={'f' * 64}")  # fmt: skip
    with pytest.raises(ConfigError, match=r"train\.init_sha256='f+': .*first has "):
        train(moved)
    with pytest.raises(
        ConfigError, match=r"init_sha256: '\w{64}' there, 'any' here \(train.init_from="
    ):
        checkpoints.check_same_run(after, config, after.manifest["dataset"])
    with pytest.raises(CheckpointError, match=r"train\.init_from='nowhere': nowhere is neither"):
        resolved(tiny("train.init_from=nowhere"))
    for name, above in (("first", "."), ("second", tmp_path / "runs")):  # not what they began from
        with pytest.raises(CheckpointError, match=r"train\.init_from=.* is neither a run folder"):
            resolved(tiny(*one, f"name={name}", f"train.init_from={above}"))
    other = tiny(*warm, "model.fc=[36,20]")
    with pytest.raises(ConfigError, match=r"fc7\.weight is \[28, 36\] there, but \[20, 36\] here"):
        InitialWeights(other, ())
    more = tiny(*one, f"train.init_from={first}", "train.init_new=[fc8]", "model.classes=12")
    assert InitialWeights(more, ()).rows("fc8.weight", slice(0, 2)).shape == (2, 28)
    with pytest.raises(ConfigError, match=r"fc8\.weight is \[10, 28\] there, but \[12, 28\] here"):
        InitialWeights(tiny(*one, f"train.init_from={first}", "model.classes=12"), ())
    shallow = ["model.fc=[36]", "model.exchange=[conv3,fc6,fc7]", "model.dropout_before=[fc7]"]
    with pytest.raises(ConfigError, match=r"fc8\.bias is \[10\] there, but not here: change"):
        InitialWeights(tiny(*one, *shallow, f"train.init_from={first}", "train.init_new=[fc7]"), ())
    with pytest.raises(ConfigError, match=r"train\.init_sha256='f+': .*first has ") as refused:
        InitialWeights(moved, ())  # as where they changed before a run begins anew
    assert not refused.value.on_every_rank, "a rank whose disk has other weights says so itself"
    shutil.rmtree(first)
    assert train(config).exit == 0, "it has weights of its own"
    with pytest.raises(CheckpointError, match="first is neither"):
        train(tiny(*warm, "name=third"))


def test_a_run_that_its_initial_weights_do_not_fit_leaves_no_folder(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    first = tiny("layout.kind=one", "train.epochs=0.2", "name=first")
    train(first)
    other = tiny("layout.kind=one", f"train.init_from={first.folder}", "model.fc=[36,20]")
    with pytest.raises(ConfigError, match=r"fc7\.weight is \[28, 36\] there, but \[20, 36\] here"):
        train(other)
    assert not other.folder.exists()


def test_where_the_weights_lie_does_not_define_a_run(tiny: Callable[..., Config]) -> None:
    here = fingerprint(tiny("train.init_from=a", "train.init_sha256=x"))
    assert here == fingerprint(tiny("train.init_from=b", "train.init_sha256=x"))
    assert here != fingerprint(tiny("train.init_from=a", "train.init_sha256=y"))
    config = tiny()
    assert resolved(config) == config


def test_cifar10s_test_images_are_split_as_the_review_does(tmp_path: Path) -> None:
    from sklearn.model_selection import train_test_split

    made.cifar10(tmp_path / "cifar", per_batch=10, test=100)
    prepare("cifar10", tmp_path / "cifar", tmp_path / "out", Options(workers=1, validation=0.2))
    splits = open_dataset(tmp_path / "out").splits
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 50, "test": 80, "val": 20,
    }  # fmt: skip
    prepare("cifar10", tmp_path / "cifar", tmp_path / "whole", Options(workers=1))
    whole = open_dataset(tmp_path / "whole").splits["test"]
    labels = whole.index["label"]
    test, val = train_test_split(range(100), test_size=0.2, random_state=0, stratify=labels)
    for name, places in (("test", test), ("val", val)):
        split = splits[name]
        assert np.bincount(split.index["label"]).tolist() == [len(places) // 10] * 10
        assert [bytes(split.read(i)) for i in range(len(places))] == [
            bytes(whole.read(i)) for i in places
        ]
    for kind, share in (("imagenet", 0.2), ("cifar10", 1.5)):
        with pytest.raises(
            ConfigError, match=rf"--validation {share}: must be a share between 0 and 1, "
        ):
            prepare(kind, tmp_path / "cifar", tmp_path / "no", Options(validation=share))
    with pytest.raises(DatasetError, match=r"--validation 0\.001"):
        prepare("cifar10", tmp_path / "cifar", tmp_path / "no", Options(validation=0.001))
