"""DMD2 (arXiv 2405.14867): the distillation method, its data and its training loop."""
