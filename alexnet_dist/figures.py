"""Pictures of a run: conv1's kernels by column (paper, Fig. 3) and the training curves."""

from pathlib import Path

import torch
from torchvision.io import write_png

from alexnet_dist import checkpoint as checkpoints
from alexnet_dist.errors import CheckpointError
from alexnet_dist.telemetry import kernel_picture, read_metrics


def draw(folder: Path) -> list[Path]:
    """Draw every picture of a run folder into its `figures/`; their paths."""
    newest, _ = checkpoints.newest_good(folder / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{folder}: no checkpoint yet, so nothing to draw")
    out = folder / "figures"
    out.mkdir(exist_ok=True)
    conv1 = newest.parameters().rows("conv1.weight", slice(None))
    picture = torch.from_numpy(kernel_picture(conv1, newest.config.model.columns))
    write_png(picture.movedim(-1, 0).contiguous(), str(out / "kernels.png"))
    _curves(folder, out / "curves.png")
    return [out / "kernels.png", out / "curves.png"]


def _curves(folder: Path, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = read_metrics(folder)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, style in (("train", "-"), ("eval", "o-")):
        chosen = [point for point in points if point["kind"] == kind]
        epochs = [point["epoch"] for point in chosen]
        left.plot(epochs, [point["loss"] for point in chosen], style, label=kind)
        for name in ("top1", "top5"):
            errors = [100 * (1 - point[name]) for point in chosen]
            right.plot(epochs, errors, style, label=f"{kind}, {name.replace('top', 'top-')}")
    left.set(xlabel="epoch", ylabel="loss, nats", title=folder.name)
    right.set(xlabel="epoch", ylabel="error, %", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
