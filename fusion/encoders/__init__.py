"""Encoders: an image or a text to Features."""

from fusion.encoders.base import Encoder
from fusion.encoders.timm_image import TimmImage
from fusion.encoders.transformers_text import TransformersText
from fusion.inputs import Images, Texts

__all__ = ["Encoder", "Images", "Texts", "TimmImage", "TransformersText"]
