"""One model: budget, allocation, realisation, plan and report."""

from tensornet_compress.compress.apply import apply_plan
from tensornet_compress.compress.budget import Budget
from tensornet_compress.compress.knapsack import choose_options, uniform_options
from tensornet_compress.compress.layer_jobs import LayerJob, Realised, Survey, WeightSource, realise_layer, survey_layer
from tensornet_compress.compress.run import compress
from tensornet_compress.compress.sizes import model_nbytes
from tensornet_compress.compress.survey import ModelSurvey, survey_model
from tensornet_compress.compress.words import Allocator, Method, Sensitivity

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
