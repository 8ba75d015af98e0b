"""Settings: recipes and options, parsed into the objects of a run."""
