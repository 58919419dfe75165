"""The wheel is complete, and runs from any folder once installed in a new environment."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from conftest import TINY
from made import write_idx

from alexnet_dist.files import read_run

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*PIP, *build], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a new venv with the wheel in it; other packages are those of the tests' own Python."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    new = folder / "bin/python"
    subprocess.run([*PIP, "--python", new, "install", "--no-deps", "--no-index", wheel], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder that a .pth names has its own .pth files passed over: no editable install is seen.
    ours = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "packages_of_the_tests.pth").write_text("\n".join(ours))
    # What Numba has compiled of the same sources here, which it knows by their times and sizes.
    for source in ROOT.glob("alexnet_dist/**/*.py"):
        installed = site / source.relative_to(ROOT)
        shutil.copystat(source, installed)
        for loop in source.parent.glob(f"__pycache__/{source.stem}.*.nb[ci]"):
            shutil.copy(loop, installed.parent / "__pycache__")
    return new


def test_the_wheel_holds_modules_configs_and_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (information,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = message_from_bytes(archive.read(f"{information}/METADATA"))
        licence = archive.read(f"{information}/licenses/LICENSE")
    shipped = {
        *(path.relative_to(ROOT) for path in ROOT.glob("alexnet_dist/**/*.py")),
        *(path.relative_to(ROOT) for path in ROOT.glob("launch/*.py")),
        *(
            "alexnet_dist" / path.relative_to(ROOT)
            for path in ROOT.glob("configs/**/*")
            if path.is_file() and path.suffix not in (".py", ".sh", ".pyc")  # programs for a clone
        ),
        Path("alexnet_dist/py.typed"),
        Path("alexnet_dist/planning/measured.jsonl"),
    }
    assert Path("alexnet_dist/configs/paper/alexnet-2012.yaml") in shipped
    assert {str(path) for path in shipped} == {n for n in names if not n.startswith(information)}
    assert metadata["License-Expression"] == "MIT"
    assert licence == (ROOT / "LICENSE").read_bytes()
    images = "configs/fashion-mnist-sample/LICENSE"  # theirs, not ours
    assert metadata.get_all("License-File") == ["LICENSE", images]


def test_the_installed_wheel_trains_the_demo_from_any_folder(python: Path, tmp_path: Path) -> None:
    write_idx(tmp_path / "idx", 60, 23)
    (tmp_path / "empty").mkdir()
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def says(program: str, *arguments: str) -> str:
        run = subprocess.run(
            [python.with_name(program), *arguments], cwd=tmp_path / "empty", env=outside,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout
        return run.stdout

    where = "import alexnet_dist, launch.submit as s; print(alexnet_dist.__file__, s.__file__)"
    for file in says("python", "-c", where).split():
        assert Path(file).is_relative_to(python.parent.parent), file
    assert "prepare" in says("alexnet-dist", "--help")
    says("alexnet-dist", "prepare", "fashion_mnist", str(tmp_path / "idx"), "data/demo")
    quick = [*TINY, "train.epochs=1", "model.lrn.layers=[]"]  # LRN's loops would be compiled anew
    assert "next: " in says("alexnet-dist", "train", "demo", *quick)
    run = tmp_path / "empty/runs/demo"
    assert read_run(run)["state"] == "finished"
    for name in ("kernels.png", "curves.png"):
        assert (run / "figures" / name).read_bytes().startswith(b"\x89PNG")
