"""Every method that the package brings: importing this fills the registries."""

from tensornet_compress.bench import file_case, ours  # noqa: F401
from tensornet_compress.bench.peers import (  # noqa: F401
    error_bounded,
    gguf_files,
    gptq,
    integers,
    kvtc,
    low_rank,
    native_networks,
    rounded_caches,
    sequence_caches,
    stock_caches,
    tensor_formats,
    ttnopt,
)
