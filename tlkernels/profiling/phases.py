"""The phases of a training step, in the order in which the report lists them."""

from __future__ import annotations

DATA = "data"
TO_DEVICE = "host to device"
NO_GRAD = "forward without gradient"
FORWARD = "forward of the trunk"
HEAD = "head and loss forward"
HEAD_BACKWARD = "head and loss backward"
BACKWARD = "backward of the trunk"
OPTIMISER = "optimiser"
COMMUNICATION = "communication"
IDLE = "idle: the GPU waits for the host"
OTHER = "other"

# Time that is known to be of the forward or backward pass only.
FORWARD_ALL = "forward, not told apart"
BACKWARD_ALL = "backward, not told apart"

ORDER = (
    DATA, TO_DEVICE, NO_GRAD, FORWARD, FORWARD_ALL, HEAD, HEAD_BACKWARD, BACKWARD, BACKWARD_ALL, OPTIMISER,
    COMMUNICATION, IDLE, OTHER,
)  # fmt: skip

# The range of a backward pass, whose time is that of its nodes. No phase of the report.
ENGINE = "backward pass"

BACKWARDS = {HEAD_BACKWARD, BACKWARD, BACKWARD_ALL}
BACKWARD_OF = {FORWARD: BACKWARD, HEAD: HEAD_BACKWARD, FORWARD_ALL: BACKWARD_ALL}
