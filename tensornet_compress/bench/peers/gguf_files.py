"""Peers that make whole GGUF files: llama.cpp's own mixes with an importance matrix, and the quantisers of the package gguf."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tensornet_compress.bench.file_case import FILE_METHODS, FileCase, WholeFile, decoded_file
from tensornet_compress.bench.peer_packages import SIDE, Unavailable
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.weight_case import SLACK
from tensornet_compress.calibrate import collect_statistics
from tensornet_compress.inputs.models import EMBEDDED_MODELS, package_folder, resolve_model
from tensornet_compress.nn import find_targets

CONTEXT = 1024
# Of files of equal size the later one is taken. ``pure`` leaves no tensor at more bits, embeddings included.
MIXES: tuple[tuple[str, bool], ...] = (
    ("Q2_K", False), ("Q3_K_M", False), ("Q4_0", False), ("Q4_K_M", False), ("Q5_K_M", False), ("Q6_K", False),
    ("Q8_0", False), ("IQ2_M", False), ("IQ3_M", False), ("IQ4_XS", False), ("IQ4_NL", False), ("Q4_0", True), ("Q5_0", True),
    ("IQ2_XXS", True), ("IQ3_S", True), ("IQ4_NL", True),
)  # fmt: skip
PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def plain(case: FileCase, bits: float) -> WholeFile:
    """Every matrix, embeddings included, in the richest block format that fits, by the package gguf; vectors in fp32."""
    gguf = _gguf()
    parameters = dict(case.model.named_parameters())
    sizes = {}
    for name in PLAIN:
        block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        whole = {key: p.ndim == 2 and p.shape[1] % block == 0 for key, p in parameters.items()}
        sizes[name] = sum(p.numel() * nbytes // block if whole[key] else 4 * p.numel() for key, p in parameters.items())
    chosen = _largest([(nbytes, name) for name, nbytes in sizes.items()], case, bits)
    kind = gguf.GGMLQuantizationType[chosen]
    weights = {}
    for key, parameter in parameters.items():
        if parameter.ndim == 2 and parameter.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            coded = gguf.quants.quantize(parameter.detach().float().numpy(), kind)
            weights[key] = torch.from_numpy(np.array(gguf.quants.dequantize(coded, kind)))
    return decoded_file(case, weights, sizes[chosen], f"gguf {chosen}")


def llama_cpp(case: FileCase, bits: float) -> WholeFile:
    """The largest file that fits, of the mixes in ``MIXES``; read and run by llama.cpp."""
    package = SIDE.module("llama-cpp-python")
    package.llama.set_verbose(False)
    made = case.memo.get("llama.cpp") or case.memo.setdefault("llama.cpp", _all_mixes(package, case))
    file, name = _largest([(nbytes, (file, name)) for nbytes, file, name in made], case, bits)
    LlamaCpp(file).llama.close()
    began = perf_counter()
    program = LlamaCpp(file)
    seconds = perf_counter() - began
    nbytes = _tensor_nbytes(file)
    settings = {"type": name, "fits": [f"{kind}: {size:,}" for size, _, kind in sorted(made)]}
    return WholeFile(program, nbytes, file.stat().st_size, nbytes, seconds, program.decode, f"llama.cpp {name}", settings)


class LlamaCpp(nn.Module):
    """A GGUF file in llama.cpp that answers like a model of transformers. Raises ``Unavailable`` without llama-cpp-python.

    ``plain``: weights stay as the file has them, which is slower than to pack them again for the processor at hand. (Those that
    are packed for the tiles of AMX end the process on some virtual machines.)
    """

    def __init__(self, file: Path, plain: bool = False):
        super().__init__()
        package = SIDE.module("llama-cpp-python")
        package.llama.set_verbose(False)
        sizes = {"n_ctx": CONTEXT, "n_batch": CONTEXT, "n_threads": torch.get_num_threads()}
        api, defaults = package.llama_cpp, package.llama_cpp.llama_model_default_params

        def given() -> Any:
            parameters = defaults()
            parameters.use_extra_bufts = not plain
            return parameters

        # The package hands no such parameter on.
        api.llama_model_default_params = given
        try:
            self.llama = package.Llama(str(file), **sizes, logits_all=True, verbose=False)
        finally:
            api.llama_model_default_params = defaults
        self.device = nn.Parameter(torch.zeros(0), requires_grad=False)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        rows = []
        for ids in input_ids.tolist():
            self.llama.reset()
            self.llama.eval(ids)
            rows.append(torch.from_numpy(self.llama.scores[: len(ids)].copy()))
        return SimpleNamespace(logits=torch.stack(rows))

    def decode(self, prompt: Tensor, tokens: int) -> None:
        """Greedy continuation."""
        self.llama.reset()
        ids = prompt[0].tolist()
        for _ in range(tokens):
            self.llama.eval(ids)
            ids = [int(self.llama.scores[self.llama.n_tokens - 1].argmax())]


def _all_mixes(package: Any, case: FileCase) -> list[tuple[int, Path, str]]:
    """Bytes of tensors, file and name of every mix that llama.cpp makes of the model."""
    api, source = package.llama_cpp, _source(case)
    matrix = _importance(api, source, case)
    made, refused = [], []
    for kind, pure in MIXES:
        name = f"{kind} pure" if pure else kind
        file = case.place().with_suffix(".gguf")
        parameters = api.llama_model_quantize_default_params()
        parameters.ftype, parameters.pure = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}"), pure
        parameters.nthread, parameters.allow_requantize = torch.get_num_threads(), True
        parameters.imatrix = matrix
        if api.llama_model_quantize(os.fsencode(source), os.fsencode(file), ctypes.byref(parameters)):
            refused.append(name)
        else:
            made.append((_tensor_nbytes(file), file, name))
    if not made:
        raise Unavailable(f"llama.cpp refused all of {', '.join(refused)}")
    return made


def _importance(api: Any, source: Path, case: FileCase) -> Any:
    """Mean squares of every matrix's inputs over the calibration windows, as llama.cpp takes them."""
    gguf = _gguf()
    fields = gguf.GGUFReader(source).fields
    family = fields["general.architecture"].contents()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, fields[f"{family}.block_count"].contents())
    targets = [target.name for target in find_targets(case.model)[0]]
    statistics = collect_statistics(case.model, case.batches, targets, ["input"])
    squares = {f"{names.get_name(name)}.weight": of.input.mean.diagonal().float().numpy() for name, of in statistics.items()}
    entries = (api.llama_model_imatrix_data * (len(squares) + 1))()  # the last one, all zeros, ends the list
    for entry, (name, values) in zip(entries, squares.items()):
        numbers = (ctypes.c_float * len(values))(*values.tolist())
        entry.name, entry.data, entry.size = name.encode(), ctypes.cast(numbers, ctypes.POINTER(ctypes.c_float)), len(values)
    return entries


def _source(case: FileCase) -> Path:
    """The GGUF file that the model was read from: a bundled one, or one beside the weights in its folder."""
    bundled = case.name == "smollm2-135m"
    folder = package_folder(EMBEDDED_MODELS[case.name]) if bundled else Path(resolve_model(case.name))
    found = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if len(found) != 1:
        raise Unavailable(f"it starts from one GGUF file of the model, {len(found)} are in {str(folder)!r}")
    return found[0]


def _tensor_nbytes(file: Path) -> int:
    return sum(int(tensor.n_bytes) for tensor in _gguf().GGUFReader(file).tensors)


def _largest(files: list[tuple[int, Any]], case: FileCase, bits: float) -> Any:
    """What belongs to the largest number of bytes within the slack. Raises ``Unavailable`` where none is."""
    allowed = SLACK * bits * case.weights / 8
    fitting = [(nbytes, place) for place, (nbytes, _) in enumerate(files) if nbytes <= allowed]
    if not fitting:
        least = min(nbytes for nbytes, _ in files)
        raise Unavailable(f"its smallest file takes {8 * least / case.weights:.3f} bits per weight, asked for {bits:g}")
    return files[max(fitting)[1]][1]


def _gguf() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise Unavailable(f"the package gguf is not installed ({error})") from error
    return gguf


FILE_METHODS.add(Method("llama.cpp", llama_cpp, "K-quants and IQ-quants with an importance matrix, run by llama.cpp"))
FILE_METHODS.add(Method("gguf", plain, "Q4_0 to Q8_0 of every matrix by the package gguf, decoded"))
