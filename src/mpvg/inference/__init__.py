"""From a run to an application: predictions of images, a look at mistakes, exported networks, and hub folders."""

from mpvg.inference.loading import Exported as Exported
from mpvg.inference.loading import load_export as load_export
from mpvg.inference.predictor import Predictor as Predictor
