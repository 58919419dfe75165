"""Read ImageNet's meta.mat in a process of its own: scipy's reader crashes on damaged files."""

import io
import json
import resource
import subprocess
import sys
from typing import NamedTuple

import numpy as np

from alexnet_dist.files import MOST_MEMORY, within_memory

_MOST_S = 10  # CPU seconds allowed to read meta.mat


class Synset(NamedTuple):
    """One of the 1,000 classes.

    Attributes:
        number: its number in the validation images' ground truth.
    """

    number: int
    wnid: str
    words: str


def read_synsets(content: bytes) -> list[Synset]:
    """Return the classes in meta.mat; raise ValueError where it is damaged in any way."""
    command = [sys.executable, "-m", "alexnet_dist.data.prepare.devkit"]
    try:
        child = subprocess.run(
            command, input=content, check=False, capture_output=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        raise ValueError("meta.mat: reading it took too long") from None
    if child.returncode:
        said = (child.stderr.decode(errors="replace").splitlines() or [""])[-1]
        raise ValueError(f"meta.mat: its reader ended with code {child.returncode} {said}")
    return [Synset(int(n), str(wnid), str(words)) for n, wnid, words in json.loads(child.stdout)]


def _leaves(content: bytes) -> list[Synset]:
    """Return the classes without subclasses, within bounds of time and memory."""
    from scipy.io import loadmat

    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + _MOST_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft, soft))
    with within_memory(MOST_MEMORY):  # a file of a few bytes can ask for more than there is
        synsets = np.atleast_1d(loadmat(io.BytesIO(content), squeeze_me=True)["synsets"])
        return [
            Synset(int(one["ILSVRC2012_ID"]), str(one["WNID"]), str(one["words"]))
            for one in synsets
            if int(one["num_children"]) == 0
        ]


if __name__ == "__main__":
    print(json.dumps(_leaves(sys.stdin.buffer.read())))
