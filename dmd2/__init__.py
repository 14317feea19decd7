"""DMD2 (arXiv 2405.14867): the distillation method, its data and its training loop."""

import logging

# Where torchao is installed diffusers imports it, and warns that it knows another version; what they disagree on is
# not used here (dmd2.training.quantised).
for _name in ("diffusers.quantizers.torchao.torchao_quantizer", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
