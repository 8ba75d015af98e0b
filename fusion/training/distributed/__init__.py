"""Distributed training: strategies, gradient compression, synchronised batch normalisation."""
