"""Tensors of the host on a device, without waiting for what the device has yet to do."""

import torch
from torch import Tensor


def pinned(device: torch.device | str) -> bool:
    """Whether tensors for `device` belong into pinned memory, from which a GPU copies while the host goes on."""
    return torch.device(device).type == "cuda" and torch.cuda.is_available()


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; what the host computes next does not wait for the copy.

    An ordinary copy from the host first waits until the device has done all that was asked of it before.
    """
    if not tensor.is_cpu:
        return tensor.to(device)
    return (tensor.pin_memory() if pinned(device) else tensor).to(device, non_blocking=True)
