"""Exported models: folders of a model file and what is needed to ask it. No torch, unless the model file is one of torch."""
