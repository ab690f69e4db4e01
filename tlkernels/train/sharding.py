"""Weights and the optimiser's state as whole tensors, also where Accelerate shards them (FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_network(accelerator: Accelerator, network: nn.Module, copy: nn.Module) -> nn.Module:
    """Return the network with whole weights, for saving: itself, or `copy` with its weights if it is sharded.

    All processes take part; only in the main one does the copy get the weights.
    """
    if not accelerator.is_fsdp2:
        return network
    state = get_model_state_dict(network, options=_WHOLE)
    if accelerator.is_main_process:
        copy.load_state_dict(state)
    return copy


def optimizer_state(accelerator: Accelerator, network: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return the optimiser's state; all processes take part, and the main one gets it whole."""
    if accelerator.is_fsdp2:
        return dict(get_optimizer_state_dict(network, optimizer.optimizer, options=_WHOLE))
    state: dict[str, Any] = optimizer.state_dict()
    return state


def load_optimizer_state(accelerator: Accelerator, network: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` returned, in each process all of it."""
    if accelerator.is_fsdp2:
        set_optimizer_state_dict(network, optimizer.optimizer, optim_state_dict=state, options=_WHOLE)
    else:
        optimizer.load_state_dict(state)


def for_evaluation(accelerator: Accelerator, network: nn.Module) -> nn.Module:
    """Return a network on the accelerator's device, with its autocast, that is not trained and not sharded."""
    if accelerator.is_fsdp2:
        network = network.to(accelerator.device)
        context = torch.autocast(accelerator.device.type, torch.bfloat16, accelerator.mixed_precision == "bf16")
        network.forward = context(network.forward)
        return network.eval()
    prepared: nn.Module = accelerator.prepare_model(network.eval(), evaluation_mode=True)
    return prepared
