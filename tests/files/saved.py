"""What the tests of saved folders share."""

from pathlib import Path

import tensornet_compress as tnc
from tensornet_compress.files import TENSORS
from tests.models import batches


def compressed(model, **options):
    options = {"calibration": batches(2), "workers": 1, "method": "dense", "budget": tnc.Budget(bits_per_weight=6.0)} | options
    return tnc.compress(model, options.pop("budget"), **options)


def tensor_file(folder):
    return (Path(folder) / TENSORS).read_bytes()
