"""A trained model over HTTP, in one process."""
