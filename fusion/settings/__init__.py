"""Settings: from recipes and options to the objects of a run."""
