"""The forms that a tensor may take, each with exact bytes and a predicted error."""

from tensornet_compress.options.forms import layer_options, pareto
from tensornet_compress.options.layer import LayerStatistics, Option
from tensornet_compress.options.offered import FAMILIES, Family, native_layout

__all__ = ["FAMILIES", "Family", "LayerStatistics", "Option", "layer_options", "native_layout", "pareto"]
