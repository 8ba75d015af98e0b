"""Many devices: strategies, compression, statistics of whole batches."""
