"""Make the embedded models ready: ``python -m tensornet_compress.inputs``."""

from tensornet_compress.inputs.models import EMBEDDED_MODELS, resolve_model

for model_name in EMBEDDED_MODELS:
    print(f"{model_name}: {resolve_model(model_name)}")
