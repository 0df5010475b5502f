"""Files in, batches out: named sets that are on the device as a whole, and images in folders, tar files or tables."""

from mpvg.data.factory import describe as describe
from mpvg.data.factory import open_data as open_data
from mpvg.data.factory import open_listing as open_listing
from mpvg.data.factory import open_split as open_split
from mpvg.data.factory import register_format as register_format
from mpvg.data.images import read_image as read_image
from mpvg.data.listing import Listing as Listing
from mpvg.data.named_sets import DATASETS as DATASETS
from mpvg.data.tensors import denormalize as denormalize
from mpvg.data.transforms import image_pipeline as image_pipeline
from mpvg.data.transforms import make_preprocess as make_preprocess
from mpvg.data.types import Batches as Batches
from mpvg.data.types import Data as Data
from mpvg.data.types import DataInfo as DataInfo
from mpvg.data.types import ImageBatch as ImageBatch
from mpvg.data.types import Pipeline as Pipeline
from mpvg.data.types import Sample as Sample
from mpvg.data.types import Shard as Shard
