"""Answers of a run, or of a published checkpoint, for inputs of one's own: `zoo predict`.

predictor = of_run("runs/photos")
for row in answers(predictor, ["new/", "one.jpg"]):
    print(row["input"], row["label"], row["probability"])
"""

from zoo.prediction.answers import answers, held_out_answers, predict_held_out
from zoo.prediction.predictor import Predictor, of_model, of_run

__all__ = [
    "Predictor",
    "answers",
    "held_out_answers",
    "of_model",
    "of_run",
    "predict_held_out",
]
