"""One loop for every task: seeded, exactly resumable."""

from mpvg.training.loop import NonFiniteLoss as NonFiniteLoss
from mpvg.training.loop import resume as resume
from mpvg.training.loop import train as train
from mpvg.training.planning import plan as plan
from mpvg.training.stopping import Interrupted as Interrupted
