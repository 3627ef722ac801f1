"""What is measured or drawn over whole data sets, with a cadence: one file an evaluator."""

from zoo.evaluators.activation_maps import ActivationMaps
from zoo.evaluators.anomalies import AnomalyScores
from zoo.evaluators.energies import EnergySteps
from zoo.evaluators.evaluator import Evaluator
from zoo.evaluators.features import ClassifierFeatures
from zoo.evaluators.forecasts import ForecastPlots
from zoo.evaluators.intervals import ConformalIntervals
from zoo.evaluators.learning_curves import LearningCurves
from zoo.evaluators.modes import ModesFound, SampledPoints
from zoo.evaluators.molecules import AttentionOnMolecules
from zoo.evaluators.operations import Operations
from zoo.evaluators.pictures import ForecastClips, RestoredImages, SampledClips, SampledImages
from zoo.evaluators.placements import PlacedObjects
from zoo.evaluators.played import PlayedEpisodes
from zoo.evaluators.returns import AskedReturns
from zoo.evaluators.stories import PlayedStory
from zoo.evaluators.texts import ByteTexts
from zoo.evaluators.transitions import FilledGaps

__all__ = [
    "ActivationMaps",
    "AnomalyScores",
    "AskedReturns",
    "AttentionOnMolecules",
    "ByteTexts",
    "ClassifierFeatures",
    "ConformalIntervals",
    "EnergySteps",
    "Evaluator",
    "FilledGaps",
    "ForecastClips",
    "ForecastPlots",
    "LearningCurves",
    "ModesFound",
    "Operations",
    "PlacedObjects",
    "PlayedEpisodes",
    "PlayedStory",
    "RestoredImages",
    "SampledClips",
    "SampledImages",
    "SampledPoints",
]
