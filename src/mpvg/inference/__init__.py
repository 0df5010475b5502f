"""What a trained run is good for: predictions of images, and a look at its mistakes."""

from mpvg.inference.predictor import Predictor as Predictor
