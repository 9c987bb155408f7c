"""One model: budget, allocation, realisation, plan and report."""

from tensornet_compress.compressing.apply import apply_plan
from tensornet_compress.compressing.budget import Budget
from tensornet_compress.compressing.knapsack import choose_options, uniform_options
from tensornet_compress.compressing.layer_jobs import LayerJob, Realised, Survey, WeightSource, realise_layer, survey_layer
from tensornet_compress.compressing.run import compress
from tensornet_compress.compressing.sizes import model_nbytes
from tensornet_compress.compressing.survey import ModelSurvey, survey_model
from tensornet_compress.compressing.words import Allocator, Method, Sensitivity

__all__ = [
    "Allocator",
    "Budget",
    "LayerJob",
    "Method",
    "ModelSurvey",
    "Realised",
    "Sensitivity",
    "Survey",
    "WeightSource",
    "apply_plan",
    "choose_options",
    "compress",
    "model_nbytes",
    "realise_layer",
    "survey_layer",
    "survey_model",
    "uniform_options",
]
