"""Weights and the optimiser's state as whole tensors, also where Accelerate shards them (FSDP2)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from tlkernels.train.config import OptimConfig
from tlkernels.train.optim import make_optimizer

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def prepared(
    accelerator: Accelerator, network: nn.Module, config: OptimConfig
) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
    """Return Accelerate's wrapper of a network, its optimiser, and the `copied` for `whole_network`."""
    sharded = accelerator.is_fsdp2
    copied = copy.deepcopy(network) if sharded else network
    model, optimizer = accelerator.prepare(network, make_optimizer(network, config, sharded))
    if sharded:  # Adagrad makes its state when it is made, here for the whole parameters
        optimizer.optimizer = make_optimizer(network, config, sharded)
    return model, optimizer, copied


def whole_network(accelerator: Accelerator, network: nn.Module, copied: nn.Module) -> nn.Module:
    """Return the network with whole weights, for saving: itself, or `copied` with its weights if it is sharded.

    All processes take part; only in the main one does the copy get the weights.
    """
    if not accelerator.is_fsdp2:
        return network
    state = get_model_state_dict(network, options=_WHOLE)
    if accelerator.is_main_process:
        copied.load_state_dict(state)
    return copied


def optimizer_state(accelerator: Accelerator, optimizer: Any) -> dict[str, Any]:
    """Return the optimiser's state; all processes take part, and the main one gets it whole.

    It does not depend on the sharding, so that a run can be resumed with another number of processes.
    """
    state: dict[str, Any] = optimizer.state_dict()

    def whole(value: Any) -> Any:
        if isinstance(value, DTensor):
            value = value.full_tensor()
            value = value.cpu() if accelerator.is_main_process else None
        return value

    each = state["state"].items()
    return state | {"state": {number: {name: whole(v) for name, v in values.items()} for number, values in each}}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` returned, in each process all of it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def share(value: Any, parameter: Tensor) -> Any:
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
            value = value.to(parameter.device)
            return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return value

    each = state["state"].items()
    shares = {n: {name: share(v, parameters[n]) for name, v in values.items()} for n, values in each}
    optimizer.load_state_dict(state | {"state": shares})


def for_evaluation(accelerator: Accelerator, network: nn.Module) -> nn.Module:
    """Return a network on the accelerator's device, with its autocast, that is not trained and not sharded."""
    if accelerator.is_fsdp2:
        network = network.to(accelerator.device)
        context = torch.autocast(accelerator.device.type, torch.bfloat16, accelerator.mixed_precision == "bf16")
        network.forward = context(network.forward)
        return network.eval()
    prepared: nn.Module = accelerator.prepare_model(network.eval(), evaluation_mode=True)
    return prepared
