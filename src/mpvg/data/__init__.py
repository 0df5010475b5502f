"""Files in, batches out: named sets that lie on the device as a whole, and images in folders, tar files or tables."""

from mpvg.data.contract import Batches, Data, DataInfo
from mpvg.data.images import read_image
from mpvg.data.opening import make_preprocess, open_data
from mpvg.data.sources import DATASETS

__all__ = ["DATASETS", "Batches", "Data", "DataInfo", "make_preprocess", "open_data", "read_image"]
