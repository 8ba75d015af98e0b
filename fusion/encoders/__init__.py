"""Encoders: an image or a text to Features."""

from fusion.encoders.base import Encoder, Images, Texts
from fusion.encoders.timm_image import TimmImage
from fusion.encoders.transformers_text import TransformersText

__all__ = ["Encoder", "Images", "Texts", "TimmImage", "TransformersText"]
