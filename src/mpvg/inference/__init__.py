"""From a run to an application: exported networks with their preprocessing, and hub folders."""

from mpvg.inference.loading import Exported as Exported
from mpvg.inference.loading import load_export as load_export
