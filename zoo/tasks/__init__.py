"""What a model is trained for: loss, metrics and predictions, one file a task."""

from zoo.tasks.anomaly_detection import AnomalyDetection
from zoo.tasks.classification import Classification
from zoo.tasks.forecasting import DecomposedForecasting, Forecasting
from zoo.tasks.imputation import Imputation
from zoo.tasks.language_modelling import LanguageModelling
from zoo.tasks.masked_language_modelling import MaskedLanguageModelling
from zoo.tasks.metrics import Mean
from zoo.tasks.regression import Regression
from zoo.tasks.series_classification import SeriesClassification

__all__ = [
    "AnomalyDetection",
    "Classification",
    "DecomposedForecasting",
    "Forecasting",
    "Imputation",
    "LanguageModelling",
    "MaskedLanguageModelling",
    "Mean",
    "Regression",
    "SeriesClassification",
]
