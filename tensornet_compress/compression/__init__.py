"""Whole models: survey, allocation, realisation, replacement."""

from tensornet_compress.compression.apply import apply_plan
from tensornet_compress.compression.options import Allocator, Method, Sensitivity
from tensornet_compress.compression.run import PLAN_ATTRIBUTE, compress
from tensornet_compress.compression.sizes import model_nbytes
from tensornet_compress.compression.survey import ModelSurvey, survey_model

__all__ = [
    "PLAN_ATTRIBUTE",
    "Allocator",
    "Method",
    "ModelSurvey",
    "Sensitivity",
    "apply_plan",
    "compress",
    "model_nbytes",
    "survey_model",
]
