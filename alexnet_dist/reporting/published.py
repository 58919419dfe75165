"""Published results of AlexNets, each with the preset in configs/paper that repeats it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A published result, errors in %; None if not given.

    Attributes:
        preset: the config in configs/paper that repeats it; "" if there is nothing to train.
    """

    what: str
    preset: str
    data: str
    top1: float | None
    top5: float | None


_VAL, _2010 = "ILSVRC-2012 validation", "ILSVRC-2010 test"
PUBLISHED = (
    Published("sparse coding (paper, table 1)", "", _2010, 47.1, 28.2),
    Published("SIFT + FVs (table 1)", "", _2010, 45.7, 25.7),
    Published("CNN (table 1)", "alexnet-2010", _2010, 37.5, 17.0),
    Published("CNN, centre's window alone", "alexnet-2010", _2010, 39.0, 18.3),
    Published("SIFT + FVs (table 2; test)", "", "ILSVRC-2012 test", None, 26.2),
    Published("1 CNN (table 2)", "alexnet-2012", _VAL, 40.7, 18.2),
    Published("5 CNNs averaged (table 2)", "ensemble-5", _VAL, 38.1, 16.4),
    Published("1 CNN*, pre-trained (table 2)", "alexnet-star-finetune", _VAL, 39.0, 16.6),
    Published("7 CNNs* averaged (table 2)", "ensemble-7-star", _VAL, 36.7, 15.4),
    Published("CNN, sixth convolution", "alexnet-star-pretrain", "ImageNet Fall 2009", 67.4, 40.9),
    Published("one column (experiment 145-half)", "one-column", _2010, 39.168, 18.229),
    Published("two columns (experiment 145)", "released-code", _VAL, 40.664, 18.210),
    Published("no normalisation (experiment 148)", "no-lrn", _VAL, 42.034, 19.362),
    Published("no overlap (experiment 147)", "no-overlap", _VAL, 41.058, 18.510),
    Published("no exchange (experiment 150)", "no-exchange", _VAL, 41.828, 19.330),
    Published("no lighting (§4.1: more than 1 point worse)", "no-lighting", _VAL, None, None),
    Published("Caffe's CaffeNet, centre", "caffenet", _VAL, 42.6, 19.6),
    Published("Caffe's AlexNet, centre", "caffe-alexnet", _VAL, 42.9, 19.8),
    Published("torchvision's, of 2014, centre", "torchvision-2014", _VAL, 43.478, 20.934),
    Published("LARS, batch 8,192", "large-batch", _VAL, 41.8, None),
    Published("Fig. 1: 25 % training error, ReLU", "fig1-relu", "CIFAR-10", None, None),
    Published("Fig. 1: the same with tanh, about 6 × later", "fig1-tanh", "CIFAR-10", None, None),
    Published("(not in the paper: with the logistic)", "fig1-sigmoid", "CIFAR-10", None, None),
)


def preset_of(group: str) -> str:
    """Return the preset of PUBLISHED that a group's name ends in; "" if there is none."""
    known = {row.preset for row in PUBLISHED} - {""}
    return max((p for p in known if group == p or group.endswith(f"-{p}")), key=len, default="")
