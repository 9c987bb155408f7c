"""What the tests of saved folders share."""

import json
from pathlib import Path

import tensornet_compress as tnc
from tensornet_compress.files import MANIFEST, TENSORS
from tests.models import batches


def compressed(model, **options):
    options = {"calibration": batches(2), "workers": 1, "method": "dense", "budget": tnc.Budget(bits_per_weight=6.0)} | options
    return tnc.compress(model, options.pop("budget"), **options)


def tensor_file(folder):
    return (Path(folder) / TENSORS).read_bytes()


def without_hashes(folder):
    """A folder as releases before hashes wrote it."""
    data = json.loads((folder / MANIFEST).read_text())
    kept = {name: value for name, value in data.items() if name not in ("checksum", "hashes", "files")}
    (folder / MANIFEST).write_text(json.dumps(kept))
    return folder
