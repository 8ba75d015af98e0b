"""From a run to production: export, shrink, serve, share."""
