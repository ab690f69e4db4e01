"""From events of a profiler to phases, on made-up traces: the CPU's, and those of a GPU, which is not here."""

import pytest

from tlkernels.profiling import phases
from tlkernels.profiling.events import PREFIX, Changes, Event, Segment, Step
from tlkernels.profiling.timeline import seconds, segments

LOOP, ENGINE, GLOO = 1, 2, 3
NODE = "autograd::engine::evaluate_function: "


def host(name, start, end, thread=LOOP, **more):
    return Event(name, start, end, thread, **more)


def ours(phase, start, end):
    return host(PREFIX + phase, start, end)


def node(start, end, sequence, thread=LOOP, name="MmBackward0", made_by=LOOP, **more):
    return host(NODE + name, start, end, thread, sequence=sequence, forward_thread=made_by, **more)


CHANGES = Changes([10, 20, 30], [phases.FORWARD, phases.HEAD, None])
"""Nodes 10 to 19 are of the trunk, 20 to 29 of the head and the loss; later ones are made in the backward."""


def of(events, device=(), end=100, on_gpu=False):
    found = segments(Step(0, end, LOOP, events, device), CHANGES, on_gpu)
    assert [part.start for part in found] == [0, *(part.end for part in found[:-1])], "no gap, no overlap"
    assert found[-1].end == end
    merged = []
    for part in found:
        if merged and merged[-1].phase == part.phase:
            merged[-1] = merged[-1]._replace(end=part.end)
        else:
            merged.append(part)
    return [(part.start, part.end, part.phase) for part in merged]


def test_a_step_on_the_cpu():
    events = [
        ours(phases.DATA, 2, 10),
        ours(phases.FORWARD, 12, 40),
        ours(phases.HEAD, 25, 40),
        ours(phases.HEAD, 30, 38),
        ours(phases.ENGINE, 45, 80),
        node(46, 50, 25),
        node(50, 52, -1, name="torch::autograd::AccumulateGrad"),
        node(53, 70, 12),
        node(70, 75, -1, name="torch::autograd::AccumulateGrad"),
        host("aten::_foreach_norm", 82, 84),
        ours(phases.OPTIMISER, 86, 95),
        host("Optimizer.step#SGD.step", 85, 96),
    ]
    assert of(events) == [
        (0, 2, None),
        (2, 10, phases.DATA),
        (10, 12, None),
        (12, 25, phases.FORWARD),
        (25, 45, phases.HEAD),  # with what comes after the loss
        (45, 53, phases.HEAD_BACKWARD),  # with the engine's own time
        (53, 80, phases.BACKWARD),
        (80, 82, None),
        (82, 84, phases.OPTIMISER),  # clipping
        (84, 86, None),
        (86, 95, phases.OPTIMISER),
        (95, 100, None),
    ]


def test_time_before_a_forward_is_data_only_without_a_loader():
    micro = [ours(phases.FORWARD, 10, 20), ours(phases.ENGINE, 22, 30), node(22, 30, 12), ours(phases.FORWARD, 40, 50)]
    assert of(micro)[0] == (0, 10, phases.DATA)
    assert (30, 40, phases.DATA) in of(micro)
    with_loader = of([ours(phases.DATA, 1, 2), *micro])
    assert (30, 40, None) in with_loader and (2, 10, None) in with_loader


def test_pooling_between_the_model_and_the_loss_is_of_the_loss_but_two_forwards_are_apart():
    events = [ours(phases.FORWARD, 10, 20), ours(phases.FORWARD, 30, 40), ours(phases.HEAD, 50, 60)]
    assert of(events)[1:] == [
        (10, 20, phases.FORWARD), (20, 30, None), (30, 40, phases.FORWARD), (40, 60, phases.HEAD), (60, 100, None),
    ]  # fmt: skip


def test_a_forward_computed_again_in_the_backward_belongs_to_its_node():
    events = [
        ours(phases.ENGINE, 0, 90),
        node(10, 80, 12, name="CheckpointFunctionBackward"),
        node(30, 50, 35),  # made in the backward
        node(80, 90, 99, made_by=ENGINE),
    ]
    assert of(events, end=90) == [(0, 80, phases.BACKWARD), (80, 90, phases.BACKWARD_ALL)]


def test_communication_counts_where_the_loop_waits_for_it():
    events = [
        ours(phases.ENGINE, 0, 80),
        node(10, 40, 12),
        host("gloo:all_reduce", 30, 70, GLOO),
        host("c10d::allreduce_", 15, 17),
    ]
    assert of(events, end=80) == [
        (0, 15, phases.BACKWARD), (15, 17, phases.COMMUNICATION), (17, 40, phases.BACKWARD),
        (40, 70, phases.COMMUNICATION), (70, 80, phases.BACKWARD),
    ]  # fmt: skip
    later = [ours(phases.FORWARD, 0, 20), host("gloo:all_reduce", 10, 70, GLOO)]
    assert of(later, end=80) == [(0, 20, phases.FORWARD), (20, 70, phases.COMMUNICATION), (70, 80, None)]


def kernel(name, start, end, link):
    return Event(name, start, end, 0, link=link)


def test_a_step_on_a_gpu_is_that_of_the_kernels():
    events = [
        ours(phases.DATA, 0, 10),
        host("aten::to", 10, 12, id=1),
        ours(phases.FORWARD, 12, 20),
        host("aten::mm", 13, 14, id=2),
        ours(phases.HEAD, 16, 20),
        host("aten::mm", 17, 18, id=3),
        host("aten::div", 21, 22, id=9),
        ours(phases.ENGINE, 23, 70),
        node(25, 30, 22, ENGINE, id=4),
        host("aten::mm", 26, 27, ENGINE, id=5),
        node(31, 40, 11, ENGINE),
        host("aten::mm", 32, 33, ENGINE, id=6),
        host("c10d::allreduce_", 34, 35, ENGINE, id=7),
        ours(phases.OPTIMISER, 72, 80),
        host("aten::_foreach_add_", 73, 75, id=8),
    ]
    device = [
        kernel("Memcpy HtoD (Pageable -> Device)", 11, 15, 1),
        kernel("gemm", 15, 30, 2),
        kernel("gemm", 30, 40, 3),
        kernel("div", 40, 42, 9),
        kernel("gemm", 42, 55, 5),
        kernel("gemm", 55, 65, 6),
        kernel("ncclDevKernel_AllReduce", 60, 70, 7),
        kernel("multi_tensor", 76, 90, 8),
        kernel("of the step before", -20, -5, 2),
        kernel("unknown", 95, 97, 1234),
    ]
    assert of(events, device, on_gpu=True) == [
        (0, 10, phases.DATA),  # nothing runs, and the loop waits for rows
        (10, 11, phases.IDLE),
        (11, 15, phases.TO_DEVICE),
        (15, 30, phases.FORWARD),
        (30, 42, phases.HEAD),
        (42, 55, phases.HEAD_BACKWARD),
        (55, 65, phases.BACKWARD),
        (65, 70, phases.COMMUNICATION),  # only where nothing is computed
        (70, 76, phases.IDLE),
        (76, 90, phases.OPTIMISER),
        (90, 95, phases.IDLE),
        (95, 97, phases.OTHER),
        (97, 100, phases.IDLE),
    ]


def test_seconds_are_summed_and_unknown_time_is_named():
    parts = [
        Segment(0, 10**9, phases.DATA),
        Segment(10**9, 3 * 10**9, None),
        Segment(3 * 10**9, 4 * 10**9, phases.DATA),
    ]
    assert seconds(parts) == pytest.approx({phases.DATA: 2, phases.OTHER: 2})
