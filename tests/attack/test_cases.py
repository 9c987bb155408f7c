"""Faults that an attack found once, each with the right behaviour."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tensornet_compress as tnc
import tensornet_compress.kv as kv
from tensornet_compress.bench import peer_packages
from tensornet_compress.calibrate import check_calibration
from tensornet_compress.coding.permutations import packed_permutation_nbytes
from tensornet_compress.compressing.cluster import cluster
from tensornet_compress.compressing.workers import run_jobs
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files import MANIFEST, TENSORS
from tensornet_compress.files.index import weight_files
from tensornet_compress.files.scratch import ScratchFolder
from tensornet_compress.files.whole import locked, recovered, whole_file, whole_folder
from tensornet_compress.inputs import load_causal_lm, model_kind
from tensornet_compress.kv.profile.profile import ProfileSpec
from tensornet_compress.report import read_result, write_result
from tensornet_compress.report.page import render
from tests.attack.damage import NASTY
from tests.attack.jobs import dies, dies_once
from tests.attack.victims import compressed_llama
from tests.files.saved import without_hashes
from tests.kv.tiny_models import tiny, tiny_profile
from tests.models import batches, random_text, tiny_llama, tiny_tokenizer
from tests.report.synthetic import everything

COMMAND = [sys.executable, "-m", "tensornet_compress.cli"]


def saved(place: Path, seed: int = 0) -> Path:
    model, report = compressed_llama(seed, "dense")
    return tnc.save(model, place, tiny_tokenizer(), report, overwrite=True)


# ------------------------------------------------------------------------------------------------ what is read is what is meant


def test_a_stray_file_beside_the_weights_is_not_read(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    wanted = weight_files(tmp_path / "model")
    wrong = {name: torch.zeros_like(tensor) for name, tensor in load_file(tmp_path / "model" / TENSORS).items()}
    save_file(wrong, tmp_path / "model" / "z.safetensors")
    assert weight_files(tmp_path / "model") == wanted
    folders = []
    for source in (tmp_path / "model", None):
        model = tiny_llama()
        tnc.compress(model, tnc.Budget(bits_per_weight=6.0), batches(2), method="dense", workers=1, source=source)
        folders.append(tnc.save(model, tmp_path / f"from {source is None}"))
    assert (folders[0] / TENSORS).read_bytes() == (folders[1] / TENSORS).read_bytes()


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    found = weight_files(tmp_path)
    assert len(set(found.values())) > 1
    assert found.keys() >= {name for name, _ in model.named_parameters()} - {"lm_head.weight"}


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "a.bin", "gone.safetensors"])
def test_an_index_points_at_whole_files_of_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=name.split(".")[-2].strip("/")):
        weight_files(tmp_path)


def test_flipped_bits_and_zeroed_ends_are_refused_and_may_be_allowed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    whole = (folder / TENSORS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in range(header, len(whole), (len(whole) - header) // 40):
        data = bytearray(whole)
        data[at] ^= 16
        (folder / TENSORS).write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged"):
            tnc.load(folder)
    end = int(0.83 * len(whole))
    (folder / TENSORS).write_bytes(whole[:end] + bytes(len(whole) - end))
    with pytest.raises(CheckpointError, match="damaged"):
        tnc.load(folder)
    assert isinstance(tnc.load(folder, verify=False), nn.Module)


def test_folders_of_older_releases_load(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    wanted = tnc.load(folder).state_dict()
    again = tnc.load(without_hashes(folder)).state_dict()
    assert wanted.keys() == again.keys()
    assert all(torch.equal(wanted[name], again[name]) for name in wanted)


def test_a_profile_of_two_halves_is_refused(tmp_path: Path) -> None:
    tiny_profile("llama-gqa").save(tmp_path / "a")
    other = kv.calibrate(tiny("llama-gqa"), [torch.randint(1, 97, (2, 128)) for _ in range(5)], group_size=2, joined=8,
                         metric="euclidean")  # fmt: skip
    other.save(tmp_path / "b")
    (tmp_path / "a" / "profile.safetensors").write_bytes((tmp_path / "b" / "profile.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="damaged"):
        kv.Profile.load(tmp_path / "a")


def test_nan_is_neither_written_nor_read(tmp_path: Path) -> None:
    network = tnc.to_network(torch.randn(8, 8), max_error=0.1)
    network.stored["core0"][0] = float("nan")
    with pytest.raises(TensorNetError, match="NaN"):
        tnc.save_network(network, tmp_path / "n.safetensors")
    folder = without_hashes(saved(tmp_path / "out"))
    tensors = load_file(folder / TENSORS)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / TENSORS)
    with pytest.raises(CheckpointError, match=r"model.norm.weight.*NaN"):
        tnc.load(folder)


@pytest.mark.parametrize("batch", [torch.full((2, 8), 10**6), torch.full((2, 8), -1), torch.ones(2, 8, dtype=torch.bool),
                                   torch.ones(0, 8, dtype=torch.int64), torch.ones(2, 0, dtype=torch.int64)])  # fmt: skip
def test_batches_are_ids_of_the_vocabulary(batch: torch.Tensor) -> None:
    with pytest.raises(TensorNetError, match=r"vocabulary|input_ids"):
        tnc.compress(tiny_llama(), tnc.Budget(bits_per_weight=6.0), [batch], workers=1)
    with pytest.raises(TensorNetError, match=r"vocabulary|input_ids"):
        kv.calibrate(tiny("llama-gqa"), [batch])


def test_a_broken_model_is_refused_before_the_work() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(TensorNetError, match=r"model\.norm\.weight"):
        check_calibration(model, batches(1))


# ---------------------------------------------------------------------------------------------- what is written is whole or not


def test_files_and_folders_are_synced_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Any]] = []
    sync, replace, rename = os.fsync, os.replace, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: (seen.append(("sync", os.readlink(f"/proc/self/fd/{handle}"))), sync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(("move", str(a))), replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append(("move", str(a))), rename(a, b)))
    saved(tmp_path / "out")
    moved = [at for at, (kind, _) in enumerate(seen) if kind == "move"]
    temporary, last = seen[moved[-1]][1], moved[-1]
    synced = {name for kind, name in seen[:last] if kind == "sync"}
    assert {f"{temporary}/{path.name}" for path in (tmp_path / "out").iterdir()} | {temporary} <= synced
    assert ("sync", str(tmp_path)) in seen[last:]


def test_a_folder_is_there_for_every_reader_while_it_is_replaced(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    tiny_profile("llama-gqa").save(folder / "kv_profile")
    (folder / "notes.txt").write_text("mine")
    wanted = [tnc.load(saved(tmp_path / f"v{seed}", seed)).state_dict()["model.norm.weight"] for seed in (0, 1)]
    assert not torch.equal(*(tnc.load(tmp_path / f"v{seed}").lm_head.weight for seed in (0, 1)))
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                assert any(torch.equal(tnc.load(folder).state_dict()["model.norm.weight"], one) for one in wanted)
            except Exception as error:
                wrong.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(8):
        saved(folder, turn % 2)
    stop.set()
    reader.join()
    assert not wrong
    assert (folder / "notes.txt").read_text() == "mine"
    assert kv.Profile.load(folder / "kv_profile").fingerprint() == tiny_profile("llama-gqa").fingerprint()


def test_without_exchange_a_killed_swap_is_undone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    os.rename(folder, tmp_path / ".out.tnc-old")
    assert isinstance(tnc.load(folder), nn.Module)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert recovered(tmp_path / "nothing") == tmp_path / "nothing"


def test_the_second_writer_is_refused_with_the_first_ones_process(tmp_path: Path) -> None:
    code = "import sys, time\nfrom tensornet_compress.files.whole import locked\n"
    code += "with locked(sys.argv[1]):\n print(1, flush=True)\n time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.readline()
    with pytest.raises(TensorNetError, match=f"process {first.pid}"):
        saved(tmp_path / "out")
    with pytest.raises(TensorNetError, match=f"process {first.pid}"), whole_file(tmp_path / "out"):
        pass
    first.kill()
    first.wait()
    saved(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_thread_may_not_write_what_another_one_writes(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path / "a"):
                pass
        except TensorNetError as error:
            refused.append(str(error))

    with locked(tmp_path / "a"), locked(tmp_path / "a"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread" in refused[0]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = saved(tmp_path / "out")
        write_result(everything(), tmp_path / "r.json")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (*folder.iterdir(), tmp_path / "r.json")} == {0o640}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_a_full_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("tensornet_compress.files.whole.save_file", full)
    with pytest.raises(TensorNetError, match="No space left"):
        saved(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(TensorNetError, match="the disk has 0 left"):
        saved(tmp_path / "out")


def test_a_folder_of_scratch_is_swept_when_its_owner_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import os\nfrom tensornet_compress.files.scratch import ScratchFolder\nkept = ScratchFolder()\nos.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with ScratchFolder() as mine, ScratchFolder() as other:
        assert sorted(map(str, tmp_path.iterdir())) == sorted([mine, other])
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------------- processes


@pytest.mark.filterwarnings("ignore:A worker stopped")
def test_a_killed_workers_job_runs_again(tmp_path: Path) -> None:
    with cluster("processes"):
        assert run_jobs(dies_once, [(str(tmp_path / "mark"), n) for n in range(6)], workers=2) == [n * n for n in range(6)]
    assert (tmp_path / "mark").exists()


@pytest.mark.filterwarnings("ignore:A worker stopped")
def test_workers_that_always_die_are_given_up() -> None:
    with cluster("processes"), pytest.raises(TensorNetError, match="killed 3 times"):
        run_jobs(dies, [1, 2], workers=2)


def children(process: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[1]) == process and "loky" in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
            except (OSError, IndexError):
                continue
    return found


def running(process: int) -> bool:
    """A process that has ended stays in the table until its parent asks for its code, which some containers never do."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(("how", "sign", "code", "line"), [
    ("processes", signal.SIGKILL, -9, ""), ("processes", signal.SIGTERM, 143, "stopped by SIGTERM"),
    ("processes", signal.SIGINT, 130, "interrupted"), ("threads", signal.SIGTERM, 143, "stopped by SIGTERM"),
    ("threads", signal.SIGINT, 130, "interrupted")])  # fmt: skip
def test_nothing_is_left_running_or_lying_about(how: str, sign: signal.Signals, code: int, line: str, tmp_path: Path) -> None:
    tiny_llama(layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(random_text(4000))
    (tmp_path / "scratch").mkdir()
    options = [
        "--bits-per-weight",
        "5",
        *(["--cluster", "processes"] if how == "processes" else []),
        "--calibration",
        str(tmp_path / "text"),
        "--length",
        "16",
        "--by-block",
    ]
    command = [*COMMAND, "weights", str(tmp_path / "model"), str(tmp_path / "out"), "--samples", "8", *options]
    env = os.environ | {"TMPDIR": str(tmp_path / "scratch")}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--workers", "2"], env=env, stderr=log, stdout=subprocess.DEVNULL)
        # Threads have begun when calibration has ended.
        work = tmp_path / ".out.tnc-work"
        while process.poll() is None and not (
            list(work.glob("survey-*")) if how == "threads" else len(children(process.pid)) > 1
        ):
            time.sleep(0.05)
        workers = children(process.pid)
        process.send_signal(sign)
        assert process.wait(30) == code
    assert len(workers) >= 2 if how == "processes" else not workers
    told = (tmp_path / "log").read_text().rstrip()
    assert not line or told.endswith(f"{line}; what was done is kept, and the same run, started again, goes on from it")
    until = time.monotonic() + 30
    while time.monotonic() < until and any(map(running, workers)):
        time.sleep(0.1)
    assert not [worker for worker in workers if running(worker)]
    again = subprocess.run([*command, "--workers", "1"], env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "model", "out", "scratch", "text"]
    assert not [path for path in (tmp_path / "scratch").iterdir() if "tensornet" in path.name]


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    saved(tmp_path / "out")
    command = f"{' '.join(COMMAND)} inspect {tmp_path / 'out'} --all | true; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (141, "")


def test_what_nobody_expected_is_one_line_and_a_traceback_only_when_asked(tmp_path: Path) -> None:
    code = "import tensornet_compress.cli.main as m, sys\ndef broken(*a, **k): raise KeyError('inside')\n"
    code += "import tensornet_compress.evaluate.ledger as l\nl.folder_ledger = broken\nm.run()"
    for options in ([], ["--debug"]):
        ran = subprocess.run(
            [sys.executable, "-c", code, *options, "inspect", str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 1
        assert ("Traceback" in ran.stderr) == bool(options)
        assert options or ran.stderr.splitlines() == [
            "error: unexpected KeyError: 'inside'; see where with `tensornet-compress --debug ...`"
        ]


# --------------------------------------------------------------------------------------------------------- nothing foreign runs


def test_code_of_a_model_does_not_run_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    for load in (model_kind, load_causal_lm):
        with pytest.raises(TensorNetError, match="--trust-remote-code"):
            load(tmp_path / "model")
    command = [*COMMAND, "generate", str(tmp_path / "model"), "--prompt", "the tree"]
    ran = subprocess.run(command, input="yes\n" * 9, capture_output=True, text=True, check=False)
    assert (ran.returncode, (tmp_path / "ran").exists()) == (2, False)


def test_peers_come_from_our_own_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = peer_packages.SidePackage("planted_peer", ("planted==1",))
    monkeypatch.setitem(peer_packages.SIDE_PACKAGES, "planted", package)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORNET_COMPRESS_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "cache" / "peers" / f"planted-py{sys.version_info.major}.{sys.version_info.minor}"
    side = peer_packages.SideEnvironment(install=False)
    for folder in (tmp_path / ".peers", own):
        (folder / "planted_peer").mkdir(parents=True)
        (folder / "planted_peer" / "__init__.py").write_text("where = __file__")
        with pytest.raises(peer_packages.Unavailable, match="not installed"):
            side.module("planted")
    (own / ".complete").write_text("planted==1")
    own.chmod(0o777)
    with pytest.raises(peer_packages.Unavailable, match="not installed"):
        side.module("planted")
    own.chmod(0o755)
    assert side.module("planted").where == str(own / "planted_peer" / "__init__.py")
    monkeypatch.setenv("TENSORNET_COMPRESS_CACHE", "cache")
    with pytest.raises(TensorNetError, match="absolute"):
        peer_packages.cache_folder()


# -------------------------------------------------------------------------------------------------------- time and memory first


def quickly(work: Callable[[], object], seconds: float = 3.0) -> None:
    began = time.monotonic()
    with pytest.raises((TensorNetError, ValueError)):
        work()
    assert time.monotonic() - began < seconds


def spec(**changed: Any) -> dict[str, Any]:
    return tnc.NetworkSpec.dense((4, 4)).model_dump() | changed


def forged(described: dict[str, Any], place: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, place, {"tensornet_compress.network": json.dumps(described)})
    return place


def two_cores(rows: int, columns: int, radices: Any = None, orders: Any = ()) -> dict[str, Any]:
    """A spec of rank 1 as plain data."""
    tensorization = {"shape": [rows, columns], "radices": radices or [[rows], [columns]]}
    layout = {"tensorization": tensorization, "mode_order": [0, 1], "fibre_orders": orders}
    topology, formats = {"legs": [[0], [1]], "edges": [[0, 1]]}, [{"kind": "float", "dtype": "bf16"}] * 2
    term = {"layout": layout, "topology": topology, "ranks": [1], "formats": formats}
    return {"shape": [rows, columns], "dtype": "float32", "terms": [term]}


def test_large_things_are_refused_by_arithmetic(tmp_path: Path) -> None:
    assert packed_permutation_nbytes(10**7) == pytest.approx(10**7 * (np.log2(10**7) - np.log2(np.e)) / 8, rel=1e-6)
    cores = {"network.core0": torch.ones(2**15, 1).bfloat16(), "network.core1": torch.ones(1, 2**15).bfloat16()}
    quickly(lambda: tnc.load_network(forged(two_cores(2**15, 2**15), tmp_path / "dense", cores)))
    quickly(lambda: tnc.NetworkSpec.from_json(json.dumps(two_cores(4, 4, [[2**16], [2**16]]))))
    order = {"axis": 0, "permutation": [], "absorbed": False}
    quickly(lambda: tnc.load_network(forged(two_cores(10**7, 4, orders=[order]), tmp_path / "order", cores)))
    for legs, edges in (
        ([[0], *[[] for _ in range(20_000)]], [[i, i + 1] for i in range(20_000)]),
        ([[i] for i in range(30_000)], [[i, i + 1] for i in range(29_999)]),
    ):
        quickly(lambda legs=legs, edges=edges: tnc.Topology.model_validate({"legs": legs, "edges": edges}))


def test_a_star_is_planned_in_a_moment() -> None:
    star = tnc.Topology(legs=((), *((p,) for p in range(25))), edges=tuple((0, p + 1) for p in range(25)))
    began = time.monotonic()
    network = tnc.to_network(torch.ones((2,) * 10), tnc.Topology(legs=star.legs[:11], edges=star.edges[:10]), ranks=1)
    assert torch.allclose(network.to_dense(), torch.ones((2,) * 10))
    from tensornet_compress.tensor.contraction import plan_contraction

    sizes = {f"p{p}": 1 for p in range(25)} | {f"b{p}": 1 for p in range(25)}
    plan_contraction(star.all_labels, tuple(f"p{p}" for p in range(25)), sizes)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("changed", [{"num_hidden_layers": 10**6}, {"head_dim": 2**31}, {"vocab_size": 10**12}])
def test_a_configuration_cannot_ask_for_more_than_its_file(changed: dict[str, int], tmp_path: Path) -> None:
    folder = without_hashes(saved(tmp_path / "out"))
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(config))
    quickly(lambda: tnc.load(folder))


@pytest.mark.parametrize("name", [MANIFEST, TENSORS, "config.json"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    quickly(lambda: tnc.load(folder))


def test_numbers_at_the_edge_of_floating_point_make_a_page(tmp_path: Path) -> None:
    first = everything().rows[0]
    for value in (1e-320, 1e308):
        wild = first.model_copy(update={"values": dict.fromkeys(first.values, value)})
        assert "<html" in render(everything().model_copy(update={"rows": (wild, *everything().rows[1:])}))
    with pytest.raises(ValueError, match="finite"):
        type(first).model_validate(first.model_dump() | {"values": {"kl": float("inf")}})
    text = write_result(everything(), tmp_path / "r.json").read_text()
    (tmp_path / "r.json").write_text(text.replace("3.5", "4.5", 1))
    with pytest.raises(TensorNetError, match="damaged"):
        read_result(tmp_path / "r.json")


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(
    "changed",
    [{"groups": [[0, 1], [0, 1]]}, {"groups": [[0, -1]]}, {"groups": []}, {"width": 0}, {"width": 2**40}, {"ranks": [10**9]},
     {"joined": [-1]}, {"root_rank": 3}, {"root_rank": -1}, {"groups": [[0, 1, 2, 10**9]]}],
)  # fmt: skip
def test_a_profile_that_cannot_be_is_refused_before_its_tensors(side: str, changed: dict[str, Any]) -> None:
    data = tiny_profile("llama-gqa").spec.model_dump(mode="json")
    quickly(lambda: ProfileSpec.from_json(json.dumps(data | {side: data[side] | changed})), 1.0)


def test_frequencies_are_counts(tmp_path: Path) -> None:
    tiny_profile("llama-gqa").save(tmp_path)
    tensors = load_file(tmp_path / "profile.safetensors")
    tensors["frequency"][0] = 0
    tensors["frequency"][0, :2] = torch.tensor([-1, 4097], dtype=torch.int16)
    save_file(tensors, tmp_path / "profile.safetensors")
    data = {k: v for k, v in json.loads((tmp_path / "profile.json").read_text()).items() if k not in ("checksum", "hashes")}
    (tmp_path / "profile.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="damaged"):
        kv.Profile.load(tmp_path)


@pytest.mark.parametrize("changed", [{"sealed": [10**7] * 3}, {"blocks": [], "first": []}, {"sealed": [-64] * 3}, {"block": 0},
                                     {"window": -1}, {"sinks": 2**40}, {"sealed": []}, {"other": {"0": None}}])  # fmt: skip
def test_a_cache_that_cannot_be_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    from safetensors import safe_open

    cache = kv.CompressedCache(tiny("llama-gqa"), bits=3.0, mode="storage", block=64)
    with torch.no_grad():
        tiny("llama-gqa")(torch.ones(1, 180, dtype=torch.int64), past_key_values=cache)
    cache.save(tmp_path / "c")
    with safe_open(tmp_path / "c", "pt") as file:
        record = json.loads(file.metadata()["tensornet_compress_kv"])
    save_file(load_file(tmp_path / "c"), tmp_path / "c", {"tensornet_compress_kv": json.dumps(record | changed)})
    quickly(lambda: kv.CompressedCache.load(tmp_path / "c", tiny("llama-gqa")))


@pytest.mark.parametrize("value", NASTY, ids=repr)
def test_a_spec_of_anything_is_a_spec_or_refused(value: Any) -> None:
    for name in spec():
        try:
            tnc.NetworkSpec.from_json(json.dumps(spec(**{name: value})))
        except TensorNetError:
            continue


def test_profiles_do_not_depend_on_threads() -> None:
    ids = [torch.randint(1, 97, (2, 128), generator=torch.Generator().manual_seed(n)) for n in range(5)]
    made, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(kv.calibrate(tiny("llama-gqa"), ids, sensitivity_windows=2, draws=1).fingerprint())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]


def test_a_folder_of_another_name_is_exchanged_with_what_else_it_held(tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "file").write_text("mine")
    (tmp_path / "a" / "ours").write_text("old")
    (tmp_path / "a" / "link").symlink_to("deep")
    (tmp_path / "b").symlink_to("a")
    with whole_folder(tmp_path / "b", {"ours"}) as made:
        (made / "new").write_text("new")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["deep", "link", "new"]
    assert (tmp_path / "b").is_symlink()
    assert (tmp_path / "a" / "link" / "file").read_text() == "mine"
