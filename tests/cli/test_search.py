"""The ``search`` command on every kind of file, and on files it must refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import tensornet_compress as tnc
from tensornet_compress.cli.main import app
from tensornet_compress.cli.search import read_tensor


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    np.save(tmp_path / "eye.npy", np.eye(16, dtype=np.float32))
    save_file({"a": torch.eye(16), "b": torch.ones(4, 4)}, tmp_path / "some.safetensors")
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(tmp_path / "eye.png")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY nonsense")
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02pickle")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 9999), }"
    (tmp_path / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY\x01\x00\x04\x00(((\n")
    whole = (tmp_path / "eye.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[:40] + b"\x00\x01\x02\x03\x04" + whole[45:])
    return tmp_path


@pytest.mark.parametrize("name", ["eye.npy", "some.safetensors:a", "eye.png"])
def test_an_identity_is_found_in_any_file(folder, name):
    options = ["--max-error", "1e-6", "--json", str(folder / "r.json"), "--plot", str(folder / "picture.png")]
    options += ["--html", str(folder / "page.html")]
    done = CliRunner().invoke(app, ["search", str(folder / name), *options])
    assert done.exit_code == 0, done.output
    result = json.loads((folder / "r.json").read_text())
    assert result["nbytes"] <= 64 * 4
    assert result["pareto"]
    assert (folder / "picture.png").stat().st_size > 1000
    assert "The networks, drawn" in (folder / "page.html").read_text()


@pytest.mark.parametrize("bound", [("--max-abs", "1e-3"), ("--psnr", "60")])
def test_what_was_found_is_written_and_read_as_an_array(folder, bound):
    options = [*bound, "--out", str(folder / "eye.tnz"), "--no-null", "--time-budget", "2"]
    done = CliRunner().invoke(app, ["search", str(folder / "eye.npy"), *options])
    assert done.exit_code == 0, done.output
    assert f"{(folder / 'eye.tnz').stat().st_size:,} bytes written" in done.output
    assert np.abs(tnc.open_tensor(folder / "eye.tnz")[2:5] - np.eye(16)[2:5]).max() <= 2e-3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.npy", "no file at"),
        ("bad.npy", "bad.npy"),
        ("objects.npy", "pickled data is never opened"),
        ("weights.pt", "pickled files are never opened"),
        ("some.safetensors", "one of a, b"),
        ("some.safetensors:c", "no tensor 'c'"),
        ("huge.npy", "cannot read"),
        ("torn.npy", "cannot read"),
        ("torn.png", "cannot read"),
    ],
)
def test_other_files_end_with_one_clear_line(folder, name, message):
    done = CliRunner().invoke(app, ["search", str(folder / name), "--max-error", "0.1"])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert done.output.count("\n") == 1


def test_integers_and_foreign_byte_orders_are_read(tmp_path):
    np.save(tmp_path / "int.npy", np.eye(16, dtype=np.int16))
    np.save(tmp_path / "big.npy", np.eye(16).astype(">f4"))
    for name in ("int.npy", "big.npy"):
        done = CliRunner().invoke(app, ["search", str(tmp_path / name), "--max-error", "1e-6", "--no-null"])
        assert done.exit_code == 0, done.output


def test_a_picture_of_an_unknown_kind_or_a_folder_for_json_is_refused(folder):
    np.save(folder / "text.npy", np.array(["a", "b"]))
    cases = [
        (["eye.npy", "--plot", str(folder / "p.xyz")], "must end in"),
        (["eye.npy", "--json", str(folder)], "is a folder"),
        (["eye.npy", "--html", str(folder)], "is a folder"),
        (["eye.npy", "--html", str(folder / "p.txt")], "must end in .html"),
        (["text.npy"], "give real numbers"),
    ]
    for (name, *options), message in cases:
        done = CliRunner().invoke(app, ["search", str(folder / name), "--max-error", "0.1", "--no-null", *options])
        assert done.exit_code == 2
        assert message in " ".join(done.output.split())
    assert not list(folder.glob(".*"))


def test_deep_and_transparent_images_keep_their_numbers(tmp_path):
    from PIL import Image

    deep = (np.add.outer(np.arange(24), np.arange(32)) * 1000).astype("u2")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_allclose(read_tensor(str(tmp_path / "deep.png")).numpy(), deep / 65535, rtol=1e-6)
    clear = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    np.testing.assert_allclose(read_tensor(str(tmp_path / "clear.png")).numpy(), clear / 255, rtol=1e-6)
    coloured = Image.fromarray(clear[..., 0] // 128).convert("P")
    coloured.putpalette([255, 0, 0, 0, 255, 0])
    coloured.save(tmp_path / "palette.png", transparency=1)
    alpha = read_tensor(str(tmp_path / "palette.png"))[..., 3]
    np.testing.assert_array_equal(alpha.numpy(), clear[..., 0] < 128)


def test_names_with_colons_and_gains_without_bounds(tmp_path):
    place = tmp_path / "a:b"
    place.mkdir()
    generator = torch.Generator().manual_seed(0)
    product = torch.kron(torch.randn(15, 15, generator=generator), torch.randn(14, 14, generator=generator))
    product += 1e-3 * product.std() * torch.randn(210, 210, generator=generator)
    save_file({"w:x": product}, place / "some.safetensors")
    assert torch.equal(read_tensor(f"{place}/some.safetensors:w:x"), product)
    options = ["--max-bytes", "600", "--topology", "cut", "--no-null", "--json", str(tmp_path / "r.json")]
    done = CliRunner().invoke(app, ["search", f"{place}/some.safetensors:w:x", *options])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert result["gain"] is None
    assert result["nbytes"] <= 600
