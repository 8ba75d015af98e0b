"""Encoders from images, texts or table rows to Features."""

from fusion.encoders.base import Encoder
from fusion.encoders.pair_image import PairImage
from fusion.encoders.pair_text import PairText
from fusion.encoders.table_columns import TableColumns
from fusion.encoders.timm_image import TimmImage
from fusion.encoders.transformers_text import TransformersText
from fusion.inputs import Columns, Images, Texts

__all__ = ["Columns", "Encoder", "Images", "PairImage", "PairText", "TableColumns", "Texts", "TimmImage", "TransformersText"]
