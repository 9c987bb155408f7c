"""Allocation of a model's bytes across its layers."""

from tensornet_compress.budget.budget import Budget
from tensornet_compress.budget.fisher import fisher_sensitivity
from tensornet_compress.budget.knapsack import choose_options, uniform_options
from tensornet_compress.budget.layer import FAMILIES, Family, LayerStatistics, Option
from tensornet_compress.budget.marginal import OperatingPoint
from tensornet_compress.budget.options import layer_options, native_layout, pareto
from tensornet_compress.budget.sensitivity import first_tokens, measure_sensitivity, output_divergence
from tensornet_compress.budget.survey import LayerJob, Realised, Survey, WeightSource, realise_layer, survey_layer

__all__ = [
    "FAMILIES",
    "Budget",
    "Family",
    "LayerJob",
    "LayerStatistics",
    "OperatingPoint",
    "Option",
    "Realised",
    "Survey",
    "WeightSource",
    "choose_options",
    "first_tokens",
    "fisher_sensitivity",
    "layer_options",
    "measure_sensitivity",
    "native_layout",
    "output_divergence",
    "pareto",
    "realise_layer",
    "survey_layer",
    "uniform_options",
]
