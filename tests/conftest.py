"""What every test shares: one thread, and no deadline for hypothesis (machines that train at the same time are slow)."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fusion", deadline=None)
settings.load_profile("fusion")
