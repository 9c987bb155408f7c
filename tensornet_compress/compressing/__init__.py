"""One model: budget, survey, allocation, making, plan and report."""

from tensornet_compress.compressing.allocate import choose_options, uniform_options
from tensornet_compress.compressing.apply import apply_plan
from tensornet_compress.compressing.budget import Budget
from tensornet_compress.compressing.jobs import Job, Layer, Made, Method, Offer, Surveyed, WeightSource, make_job, survey_job
from tensornet_compress.compressing.run import Allocator, compress
from tensornet_compress.compressing.sizes import model_nbytes
from tensornet_compress.compressing.survey import ModelSurvey, survey_model

__all__ = [
    "Allocator",
    "Budget",
    "Job",
    "Layer",
    "Made",
    "Method",
    "ModelSurvey",
    "Offer",
    "Surveyed",
    "WeightSource",
    "apply_plan",
    "choose_options",
    "compress",
    "make_job",
    "model_nbytes",
    "survey_job",
    "survey_model",
    "uniform_options",
]
