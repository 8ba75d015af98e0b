"""Files of a run's folder: its model and its checkpoints."""
