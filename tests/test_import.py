"""Importing the package is lean and changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROBE = """
import json, sys
import torch
before = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().sum().item(), torch.is_grad_enabled()
import tensornet_compress as tnc
first = sorted(set(sys.modules) & {"transformers", "matplotlib", "tensorly", "networkx", "scipy", "rich", "typer"})
for name in tnc.__all__:
    getattr(tnc, name)
after = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().sum().item(), torch.is_grad_enabled()
import tensorly
print(json.dumps({
    "first": first,
    "all": sorted(set(sys.modules) & {"transformers", "matplotlib", "rich", "typer", "quimb", "gguf", "accelerate"}),
    "same": before == after,
    "backend": tensorly.get_backend(),
}))
"""


def test_importing_loads_no_optional_package_and_changes_no_state():
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"first": [], "all": [], "same": True, "backend": "numpy"}


def test_unknown_names_are_attribute_errors():
    import tensornet_compress as tnc

    assert not hasattr(tnc, "no_such_name")
    assert all(hasattr(tnc, name) for name in tnc.__all__)
