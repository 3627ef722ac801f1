"""What a model is trained for: loss, metrics and predictions, one file a task."""

from zoo.tasks.adversarial import Adversarial
from zoo.tasks.anomaly_detection import AnomalyDetection
from zoo.tasks.classification import Classification
from zoo.tasks.diffusion import Denoising
from zoo.tasks.distillation import Distillation
from zoo.tasks.forecasting import DecomposedForecasting, Forecasting
from zoo.tasks.image_restoration import ImageRestoration
from zoo.tasks.imputation import Imputation
from zoo.tasks.in_context import InContext
from zoo.tasks.language_modelling import LanguageModelling
from zoo.tasks.layer_distillation import LayerDistillation
from zoo.tasks.masked_language_modelling import MaskedLanguageModelling
from zoo.tasks.metrics import Mean
from zoo.tasks.motion_completion import MotionCompletion
from zoo.tasks.object_placement import ObjectPlacement
from zoo.tasks.refinement import Refinement
from zoo.tasks.regression import Regression
from zoo.tasks.reinforcement import Reinforcement
from zoo.tasks.return_conditioning import ReturnConditioned
from zoo.tasks.sparsification import Sparsified
from zoo.tasks.step_distillation import GuidanceDistillation, StepDistillation
from zoo.tasks.task import Aux, Networks, OneNetwork, Phase, Task
from zoo.tasks.video_prediction import VideoPrediction

__all__ = [
    "Adversarial",
    "AnomalyDetection",
    "Aux",
    "Classification",
    "DecomposedForecasting",
    "Denoising",
    "Distillation",
    "Forecasting",
    "GuidanceDistillation",
    "ImageRestoration",
    "Imputation",
    "InContext",
    "LanguageModelling",
    "LayerDistillation",
    "MaskedLanguageModelling",
    "Mean",
    "MotionCompletion",
    "Networks",
    "ObjectPlacement",
    "OneNetwork",
    "Phase",
    "Refinement",
    "Regression",
    "Reinforcement",
    "ReturnConditioned",
    "Sparsified",
    "StepDistillation",
    "Task",
    "VideoPrediction",
]
