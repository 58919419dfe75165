"""The kernels compile for GPUs that are not here; those for the paper's maps spill no registers."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alexnet_dist.network.kernels import (
    lanes,
    maps,
    pooled,
    pooled_backward,
    scores,
    units,
    update,
    windows,
)

MODULES = (lanes, maps, pooled, pooled_backward, scores, units, update, windows)
NUMBERS = {"alpha": "fp32", "k": "fp32", "seed": "i64", "threshold": "i64"}
WIDE = {"bf16": "fp32", "fp16": "fp32", "fp32": "fp32", "fp64": "fp64"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept for later runs, as what torch compiles: a kernel that has not changed compiles as it
    did."""
    monkeypatch.setenv("TRITON_CACHE_DIR", f"{os.environ['TORCHINDUCTOR_CACHE_DIR']}/of_tests")


def compiled(
    name: str,
    constants: dict[str, Any],
    pointers: dict[str, str],
    arch: int,
    warps: int,
    **options: int,
) -> Any:
    """Triton's kernel for this architecture; pointers are aligned to 16 bytes, as torch's are."""
    kernel = next(vars(module)[name] for module in MODULES if name in vars(module))
    names = kernel.arg_names
    pointers = {k: kind for k, kind in pointers.items() if k in names and k not in constants}
    kinds = {
        argument: "constexpr"
        if argument in constants
        else f"*{pointers[argument]}"
        if argument in pointers
        else NUMBERS.get(argument, "i32")
        for argument in names
    }
    places = {(names.index(key),): value for key, value in constants.items()}
    aligned = {(names.index(key),): [["tt.divisibility", 16]] for key in pointers}
    source = ASTSource(kernel, kinds, places, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps} | options
    )


LRN = {"activation": "relu", "size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}
CONV1 = {"h": 55, "w": 55, "pooled_h": 27, "pooled_w": 27, "window": 3, "stride": 2}


def of_maps(narrow: str, channels: int = 48) -> dict[str, int]:
    chunk = {"bf16": 8, "fp16": 8, "fp32": 4, "fp64": 2}[narrow]
    return {"chunk": chunk, "chunks": channels // chunk, "lanes": 32}


def kernels(narrow: str) -> list[tuple[str, dict[str, Any], dict[str, str], int]]:
    """Every kernel with values of this type: name, constants, pointers, warps."""
    wide = WIDE[narrow]
    values = dict.fromkeys(("x", "y", "grads", "out"), narrow) | {
        "bias": wide, "parts": wide, "places": "u8",
    }  # fmt: skip
    layer = LRN | of_maps(narrow)
    drawn = {"slots": "i64", "step": "i64"}
    images = dict.fromkeys(("light", "mean", "divide_by"), wide) | {
        "patches": "u8", "flips": "u8", "places": "i64", "inside": "i64", "corners": "i64",
        "out": narrow,
    }  # fmt: skip
    weights = {"weight": wide, "velocity": wide, "grad": narrow, "rates": wide, "skip": "fp32"}
    copy = {"narrow": None} if narrow == wide else {}
    fours = {"activation": "tanh", "scale": 2.0, "fours": 64}
    return [
        ("pooled_kernel", layer | CONV1 | {"rows": 3, "columns": 1, "ahead": 3}, values, 1),
        ("pooled_backward_kernel", layer | CONV1 | {"each": 4, "early": 1}, values, 1),
        ("maps_kernel", layer | {"each": 4, "beta": 0.6, "bias": None}, values, 1),
        ("maps_backward_kernel", layer | {"each": 4, "steps": 4}, values, 1),
        ("sum_rows_kernel", {"each": 5, "tall": 512, "wide": 4}, {"parts": wide, "out": wide}, 16),
        ("units_kernel", fours, values | drawn, 2),
        ("units_backward_kernel", fours | {"has_bias": True, "rows": 8}, values | drawn, 2),
        ("ranks_kernel", {"block": 1024},
         {"logits": narrow, "labels": "i64", "losses": wide, "ranks": "i64", "log_sums": wide}, 4),
        ("counts_kernel", {"n": 300, "rows": 128},
         {"losses": wide, "ranks": "i64", "loss": wide, "counts": "fp64"}, 4),
        ("scores_backward_kernel", {"block": 1024},
         {"grad": wide, "logits": narrow, "labels": "i64", "log_sums": wide, "out": narrow}, 4),
        ("skip_flag_kernel", {}, {"stats": "fp64", "scale": "fp64", "skip": "fp32"}, 1),
        ("masks_kernel", {"fours": 64}, drawn | {"stay": "u8"}, 2),
        ("sgd_kernel", {"block": 1024} | copy,
         weights | ({} if copy else {"narrow": narrow}), 8),
        ("fold_kernel", {"h": 227, "w": 227, "stride": 4, "padding": 0, "down": 57, "along": 57,
                         "block": 64, "columns": 16}, {"x": narrow, "out": narrow}, 8),
        ("windows_kernel", {"crop": 227, "block": 256}, images, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "narrow"),
    [(75, "fp16"), (75, "fp32"), (80, "bf16"), (89, "bf16"), (90, "fp64"), (90, "bf16"),
     (100, "bf16")],
)  # fmt: skip
def test_kernels_compile_for_gpus_that_are_not_here(arch: int, narrow: str) -> None:
    for name, constants, pointers, warps in kernels(narrow):
        found = compiled(name, constants, pointers, arch, warps)
        assert f"sm_{arch}" in found.asm["ptx"], name
        assert found.asm["cubin"], name


@pytest.mark.parametrize(("channels", "side"), [(48, 55), (128, 27)], ids=["conv1", "conv2"])
def test_the_papers_maps_stay_in_registers(channels: int, side: int, tmp_path: Path) -> None:
    """Whole 16-byte reads and writes, nothing in shared or local memory, no barrier."""
    pooled_side = (side - 3) // 2 + 1
    shape = CONV1 | {"h": side, "w": side, "pooled_h": pooled_side, "pooled_w": pooled_side}
    layer = LRN | of_maps("bf16", channels) | shape
    block = {"rows": pooled._ROWS, "columns": pooled._COLUMNS, "ahead": pooled._AHEAD}
    each = {"each": 10, "early": pooled_backward._EARLY}  # conv1, in batches of 128
    values = dict.fromkeys(("x", "y", "grads", "out"), "bf16") | {
        "bias": "fp32", "parts": "fp32", "places": "u8",
    }  # fmt: skip
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for module, constants in ((pooled, block), (pooled_backward, each)):
        name, most = f"{module.__name__.rpartition('.')[2]}_kernel", module.REGISTERS
        found = compiled(name, layer | constants, values, 90, 1, maxnreg=most)
        memory = set(re.findall(r"\b(?:ld|st)\.[\w.]+", found.asm["ptx"]))
        # Two words are the eight bytes of places.
        single = {at for at in memory if not re.search(r"param|global\.v[24]\.", at)}
        assert not single, name
        assert "bar.sync" not in found.asm["ptx"], name
        cubin = tmp_path / "cubin"
        cubin.write_bytes(found.asm["cubin"])
        said = subprocess.run(
            [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        used = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said))
        assert used.items() >= {"STACK": "0", "SHARED": "0", "LOCAL": "0"}.items(), said
        assert int(used["REG"]) <= most, said
