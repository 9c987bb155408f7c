"""The forms that a tensor may take, each with exact bytes and a predicted error."""

from tensornet_compress.options.forms import layer_options, native_layout, pareto
from tensornet_compress.options.layer import FAMILIES, Family, LayerStatistics, Option

__all__ = ["FAMILIES", "Family", "LayerStatistics", "Option", "layer_options", "native_layout", "pareto"]
