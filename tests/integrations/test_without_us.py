"""A process in which this package cannot be imported, and then can."""

import subprocess
import sys

import pytest
import torch

import tensornet_compress as tnc
from tests.documents import ROOT
from tests.integrations.test_export import IDS, saved

PROBE = """
import sys
import torch
from transformers import AutoModelForCausalLM
ours, exported, ids, answers = sys.argv[1:]
sys.modules["tensornet_compress"] = None
torch.save(AutoModelForCausalLM.from_pretrained(exported)(torch.load(ids)).logits.detach(), answers)
try:
    AutoModelForCausalLM.from_pretrained(ours)
except Exception as error:
    print(error)
del sys.modules["tensornet_compress"]
import tensornet_compress
print(type(AutoModelForCausalLM.from_pretrained(ours).model.layers[0].mlp.up_proj).__name__)
"""


def test_exports_load_our_folders_are_refused_and_importing_the_package_late_is_enough(tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, wanted = saved(tmp_path, ["int4g32"])
    assert tnc.export(folder, tmp_path / "out").error == 0
    torch.save(IDS, tmp_path / "ids")
    arguments = [str(path) for path in (folder, tmp_path / "out", tmp_path / "ids", tmp_path / "answers")]
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, cwd=ROOT, check=True)
    assert torch.allclose(torch.load(tmp_path / "answers"), wanted, rtol=1e-5, atol=1e-5)
    refusal, kind = done.stdout.strip().splitlines()
    assert "pip install 'tensornet-compress[hf]'" in refusal
    assert kind == "TNLinear"
