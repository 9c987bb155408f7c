"""The words that choose how a model is compressed."""

from typing import Literal

Method = Literal["auto", "coded", "dense", "svd", "residual", "tt", "ttm", "tree", "searched"]
Allocator = Literal["sensitivity", "energy", "uniform"]
Sensitivity = Literal["fisher", "probe"]
