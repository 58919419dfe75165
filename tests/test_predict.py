"""Predictions for image files agree with the evaluation, whatever the files are."""

import csv
import errno
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, alexnet_dist, assert_close, in_a_fork
from made import encoded, image_folder, photograph
from PIL import ExifTags, Image

from alexnet_dist import AlexNet, load_checkpoint, load_config
from alexnet_dist.cli.main import main
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.errors import ConfigError, DatasetError
from alexnet_dist.evaluation import predict
from alexnet_dist.evaluation.evaluate import evaluate_checkpoints
from alexnet_dist.evaluation.features import activations, features_and_logits
from alexnet_dist.evaluation.load import Trained
from alexnet_dist.network.layers import ACTIVATIONS
from alexnet_dist.network.shapes import map_sides
from alexnet_dist.training.loop import train

ROOT = Path(__file__).parent.parent
OWN = ["model.classes=3", "data.eval_split=val", "layout.kind=one", "train.precision=fp32",
       "train.epochs=1", "train.batch=6"]  # fmt: skip


def odd_images(folder: Path) -> None:
    """Validation images of all kinds that `prepare` converts, in the place of the made ones."""
    image_folder(folder, 4, 2)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    plain = photograph(1, 120, 90)
    alpha = plain.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    deep = Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 257)
    odd = {
        "ant/000.jpg": encoded(plain, exif=turned),
        "ant/001.jpg": encoded(plain.convert("CMYK")),
        "ant/002.bmp": encoded(plain, "BMP"),
        "bee/000.tif": encoded(plain, "TIFF"),
        "bee/001.png": encoded(alpha, "PNG"),
        "bee/002.png": encoded(deep, "PNG"),
        "cat/000.webp": encoded(plain, "WEBP"),
        "cat/001.gif": encoded(plain, "GIF"),
        "cat/002.jpg": encoded(photograph(2, 700, 60)),
    }
    for path in (folder / "val").rglob("*.JPEG"):
        path.unlink()
    for name, content in odd.items():
        (folder / "val" / name).write_bytes(content)


def trained(root: Path, keep: bool) -> Trained:
    """A network trained on images of three classes, packed at their own size or at 256 × 256."""
    odd_images(root / "images")
    prepare("folder", root / "images", root / "data", Options(keep=keep, workers=1))
    config = load_config([*TINY, *OWN, f"data.path={root / 'data'}", f"output_dir={root}"])
    assert train(config).exit == 0
    return load_checkpoint(config.folder)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("own"), keep=False)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("kept"), keep=True)


def images_of(trained: Trained) -> Path:
    return Path(trained.config.data.path).parent / "images" / "val"


@pytest.mark.parametrize(("packed_at", "views"), [("own", 1), ("own", 10), ("kept", 1)])
def test_a_file_is_answered_as_its_packed_sample_is_evaluated(
    request: pytest.FixtureRequest, packed_at: str, views: int
) -> None:
    own: Trained = request.getfixturevalue(packed_at)
    found = evaluate_checkpoints([own.config.folder], [f"evaluate.views={views}"])
    said = own.predict(images_of(own), views)
    assert [p.path.name for p in said[:3]] == ["000.jpg", "001.jpg", "002.bmp"]
    assert not any(p.refused for p in said)
    assert_close(torch.stack([p.probabilities for p in said]), found.probabilities, 1e-6)
    best = said[0].top()
    assert [name for name, _ in best] != []
    assert len(best) == 3, "as many as there are"
    assert sum(share for _, share in best) == pytest.approx(1)
    assert best[0][1] == found.probabilities[0].max()


@pytest.mark.parametrize(
    "image", [torch.zeros(4, 9, 9).byte(), torch.zeros(3, 9, 9), torch.zeros(3, 0, 9).byte()]
)
def test_a_tensor_that_is_no_image_is_refused(own: Trained, image: torch.Tensor) -> None:
    with pytest.raises(DatasetError, match=r"must be \(1 or 3, height, width\), uint8"):
        own.probabilities(image)


def test_predictions_are_of_one_view_or_ten(own: Trained) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.views=5"):
        own.predict(images_of(own), views=5)  # type: ignore[arg-type]


def test_features_have_the_networks_own_activation(
    own: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ACTIVATIONS, "relu", F.gelu)  # of which torch has no other form
    assert (own.features(images_of(own), "fc7") < 0).any()


def test_features_are_what_layers_make(own: Trained) -> None:
    files = sorted(images_of(own).rglob("*.*"))
    one = own.predict(files, views=1)
    logits = own.features(files, "fc8")
    assert_close(logits.softmax(1), torch.stack([p.probabilities for p in one]), 1e-6)

    weight, bias = (own.model.get_parameter(f"conv1.{kind}") for kind in ("weight", "bias"))
    canvases = [
        torch.from_numpy(predict.canvas_of(file, (False, False), side=72)) for file in files
    ]
    windows = torch.cat([own.windows(canvas.movedim(-1, 0)) for canvas in canvases])
    expected = F.relu(F.conv2d(windows, weight, bias, 4)).detach()
    assert_close(own.features(files, "conv1"), expected, 1e-5)
    maps = own.features(files[0], "conv5")
    assert maps.shape == (1, 8, *[map_sides(own.config.model)[-1][0]] * 2)

    from alexnet_dist.engines.ddp import TorchEngine
    from alexnet_dist.parallel.topology import connect

    topology = connect(own.config)
    engine = TorchEngine(own.config, topology)
    engine.load(own.checkpoint.parameters(), None)
    theirs, _ = features_and_logits(engine, own.config, own.dataset, "val", range(9))
    at_test = 1 - own.config.model.dropout  # fc8 sees units scaled at test
    assert_close(own.features(images_of(own), "fc7") * at_test, theirs, 1e-5)

    with pytest.raises(ConfigError, match=r"layer 'fc9': this network has only conv1, .*fc8"):
        own.features(files, "fc9")
    with pytest.raises(DatasetError, match=r"missing\.jpg: there is no such file: leave it out"):
        own.features([files[0], "missing.jpg"])
    with pytest.raises(ConfigError, match="name at least one image"):
        own.features([])


def test_processes_read_the_same(own: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [*sorted(images_of(own).rglob("*.*")), Path("missing.jpg")]
    alone = list(own.predictions(files))
    monkeypatch.setattr(predict, "WORTH_A_PROCESS", 3)
    monkeypatch.setattr(predict, "_AHEAD", 1)
    both = list(own.predictions(files, workers=2))
    assert (
        [p.refused for p in both]
        == [p.refused for p in alone]
        == [""] * 9 + ["there is no such file"]
    )
    for one, two in zip(alone[:-1], both[:-1], strict=True):
        assert torch.equal(one.probabilities, two.probabilities)


def test_a_program_that_lacks_the_guard_for_its_processes_is_told(
    own: Trained, tmp_path: Path
) -> None:
    unguarded = tmp_path / "unguarded.py"
    unguarded.write_text(
        "from alexnet_dist import load_checkpoint\n"
        "from alexnet_dist.evaluation import predict\n"
        "predict.WORTH_A_PROCESS = 3\n"
        f"own = load_checkpoint({str(own.config.folder)!r})\n"
        f"print(*own.predictions({str(images_of(own))!r}, workers=2))\n"
    )
    ended = in_a_fork(runpy.run_path, str(unguarded), None, "__main__")
    assert ended.returncode == 1
    assert "MachineError: a process that reads images failed" in ended.stderr
    assert 'must do so under if __name__ == "__main__":' in ended.stderr.splitlines()[-1]


@pytest.fixture
def holiday(own: Trained, tmp_path: Path) -> Path:
    """A folder as users have: good images, one in a folder below, bad ones, other files, a
    link."""
    folder = tmp_path / "holiday"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "b.png").write_bytes(encoded(photograph(3), "PNG"))
    (folder / "a, then.jpg").write_bytes(encoded(photograph(4)))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "half.jpg").write_bytes(encoded(photograph(5))[:900])
    (folder / "text.PNG").write_text("not an image")
    (folder / "notes.txt").write_text("of the holiday")
    (folder / ".hidden.jpg").write_text("not looked at")
    (folder / "again").symlink_to("below")
    return folder


def test_a_bad_image_is_named_and_the_others_go_on(own: Trained, holiday: Path) -> None:
    run, out = str(own.config.folder), holiday.parent / "out.csv"
    result = alexnet_dist(
        "predict", run, "holiday", "no.jpg", "--out", "out.csv", cwd=holiday.parent
    )
    assert result.returncode == 1
    assert result.stdout == ""
    told = result.stderr.splitlines()
    assert "alexnet-dist: holiday/empty.jpg: the file is empty" in told
    assert "alexnet-dist: no.jpg: there is no such file" in told
    assert re.search(r"holiday/half.jpg: the JPEG is cut short", result.stderr)
    assert re.search(r"holiday/text.PNG: not one of JPEG, PNG", result.stderr)
    assert told[-1] == (
        "2 of 6 images classified, written to out.csv; 4 could not be read (named above); "
        "other files, or links to folders, skipped: 2"
    )
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["image"] for row in rows] == [
        *(f"holiday/{name}" for name in ("a, then.jpg", "empty.jpg", "half.jpg", "text.PNG")),
        "holiday/below/b.png", "no.jpg",
    ]  # fmt: skip
    assert [row["refused"] != "" for row in rows] == [False, True, True, True, False, True]
    assert own.predict("n" * 300)[0].refused == "cannot be read: File name too long"
    (best, share), *_ = own.predict(holiday / "a, then.jpg")[0].top()
    assert rows[0]["class_1"] == best
    assert float(rows[0]["probability_1"]) == pytest.approx(share, rel=1e-4)
    assert "class_3" in rows[0]
    assert "class_4" not in rows[0]
    assert sorted(p.name for p in holiday.parent.iterdir()) == ["holiday", "out.csv"]


def test_an_image_that_cannot_be_read_is_not_drawn(own: Trained, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (prediction,) = own.predict(tmp_path)
    with pytest.raises(DatasetError, match=r"empty\.jpg: the file is empty"):
        own.draw(prediction, tmp_path / "seen.png")


def test_a_folder_that_cannot_be_read_is_not_left_out_in_silence(
    holiday: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def closed(path: Any) -> Any:
        if f"{path}".endswith("below"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DatasetError, match=r"below cannot be read \(Permission denied; owner"):
        predict.images_in([holiday])


def test_json_and_text_say_the_same(
    own: Trained, holiday: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, image = str(own.config.folder), str(holiday / "a, then.jpg")
    assert main(["predict", run, image, "--json", "--views", "10", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["views"]) == (own.checkpoint.step, 10)
    (only,) = found["images"]
    best = own.predict(image, views=10)[0].top(2)
    assert [(a["class"], pytest.approx(a["probability"])) for a in only["answers"]] == best
    assert main(["predict", run, image, "--views", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [image, f"{best[0][1]:8.1%}  {best[0][0]}"]
    assert len(lines) == 4


def test_what_is_there_stays_until_all_is_answered(
    own: Trained, holiday: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = holiday / "kept.json"
    out.write_text("{}")

    def fails(*_: object) -> None:
        raise ConfigError("a fault in the midst")

    monkeypatch.setattr(predict, "windows_of", fails)
    run, image = str(own.config.folder), str(holiday / "below")
    assert main(["predict", run, image, "--out", str(out)]) == 2
    assert out.read_text() == "{}"
    assert not list(holiday.glob(".*writing*"))


def test_misuse_is_told_before_any_work(
    own: Trained, holiday: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (holiday / "nothing").mkdir()
    for arguments, said in (
        (
            [str(holiday), "--picture", "x.png"],
            "--picture x.png: draws a single image, but 5 were named",
        ),
        (
            [str(holiday / "nothing")],
            "nothing: no images in it: name image files, or another folder",
        ),
    ):
        assert main(["predict", str(own.config.folder), *arguments]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["predict", str(own.config.folder), "a.jpg", "--out", "a.jpg"])
    assert "a table to write, NAME.csv or NAME.json" in capsys.readouterr().err


def test_the_picture_is_a_slide(own: Trained, tmp_path: Path) -> None:
    """Of a name that would be mathematics, of two columns."""
    file = tmp_path / "a $x$ of a rather long name, indeed.jpg"
    file.write_bytes(encoded(photograph(6, 400, 300)))
    out = tmp_path / "seen.png"
    assert main(["predict", str(own.config.folder), str(file), "--picture", str(out)]) == 0
    picture = Image.open(out)
    assert picture.size == (1920, 1080)
    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    blue = (pixels[:, 2] - pixels[:, 0] > 100).mean()
    orange = (pixels[:, 0] - pixels[:, 2] > 100).mean()
    assert blue > 0.02
    assert orange > 0.02
    assert [p.name for p in tmp_path.iterdir() if "writing" in p.name] == []


def test_a_network_is_printed_as_it_is() -> None:
    config = load_config("paper/alexnet-2012").model
    lines = repr(AlexNet(config, init_weights=False)).splitlines()
    assert lines[0] == "AlexNet of 2 columns, 1000 classes, 60,965,224 parameters"
    assert re.split(r"  +", lines[2]) == [
        "conv1", "3 × 227 × 227", "48 × 55 × 55", "relu, LRN, pool 3/2", "(96, 3, 11, 11)", "34,944"
    ]  # fmt: skip
    assert re.split(r"  +", lines[4])[1] == "128 × 13 × 13 of each column"
    assert re.split(r"  +", lines[7])[:2] == ["fc6", "128 × 6 × 6 of each column"]
    assert len(lines) == 10
    half = AlexNet(config, columns_here=[1], init_weights=False)
    assert repr(half).startswith("AlexNet of 2 columns, 1 of them here, 1000 classes, 30,482,612")


@pytest.mark.parametrize("preset", ["paper/released-code", "paper/caffenet", "paper/fig1-relu"])
def test_the_printed_maps_are_those_that_are_made(preset: str) -> None:
    config = load_config(preset)
    model = AlexNet(config.model, init_weights=False).eval()
    windows = torch.zeros(1, 3, config.model.crop, config.model.crop)
    config_fp32 = load_config([preset, "train.precision=fp32"])
    made = activations(model, config_fp32, windows, config.model.conv_names)
    sides = [made[name][0].shape[-1] for name in config.model.conv_names]
    assert sides == [side for side, _ in map_sides(config.model)]


def test_the_documents_example_runs(
    own: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    example, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/predict.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(own.config.folder)
    (tmp_path / "boot.png").write_bytes(encoded(photograph(0), "PNG"))
    exec(example)
    said = capsys.readouterr().out
    assert said.startswith("AlexNet of 2 columns, 3 classes")
    assert re.search(r"^boot.png \[\('(ant|bee|cat)', 0\.\d+\), ", said, re.M)
    assert said.endswith("torch.Size([1, 28])\n")


def test_the_documents_program_answers_as_predict(own: Trained, tmp_path: Path) -> None:
    """What the page shows, by onnxruntime, Pillow and NumPy alone."""
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    _, example = re.findall(r"```python\n(.*?)```", (ROOT / "docs/predict.md").read_text(), re.S)
    assert not re.search(r"torch|alexnet_dist", example)
    (tmp_path / "it.py").write_text(example)
    network, image = tmp_path / "own.onnx", tmp_path / "new.jpg"
    image.write_bytes(encoded(photograph(8, 500, 375)))
    assert main(["export", str(own.config.folder), str(network), "--format", "onnx"]) == 0
    command = [sys.executable, "it.py", str(network), str(image)]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (ours,) = own.predict(image)
    rows = [line.strip().split("%  ") for line in said.splitlines()]
    assert [name for _, name in rows] == [name for name, _ in ours.top()]
    for (share, _), (_, expected) in zip(rows, ours.top(), strict=True):
        assert float(share) == pytest.approx(100 * expected, abs=0.3)
