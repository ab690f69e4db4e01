"""Modules replace PyTorch's: their options can be read and set, and they can be copied, pickled and averaged."""

import copy
import inspect
import io
import pickle
from fractions import Fraction
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from battery import LOSSES
from module_case import A, B, X, Y
from torch.nn.modules.loss import _Loss
from torch.optim.swa_utils import AveragedModel

import tlkernels as tlk
from tlkernels._core.group import SavedGroup

CASES = {
    case.make.__name__: case
    for case in (import_module(f"{name}_cases").MODULE for name, loss in LOSSES.items() if loss.module)
}
GROUPED = [name for name, case in CASES.items() if "group" in inspect.signature(case.make).parameters]
every_module = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def test_there_is_a_case_for_each_module():
    modules = {name for name, value in vars(tlk).items() if inspect.isclass(value) and name.endswith("Loss")}
    assert modules == set(CASES)


@every_module
def test_each_option_is_an_attribute_that_can_be_set(case):
    taken = set(inspect.signature(case.make).parameters) & set(inspect.signature(case.function).parameters)
    assert taken - {"group", "vocab_group"} == set(case.options)
    for name, value in case.options.items():
        module = case.build()
        before = module(*case.tensors)
        setattr(module, name, value)
        assert getattr(module, name) is value or getattr(module, name) == value
        torch.testing.assert_close(module(*case.tensors), case.expected(module, **{name: value}))
        torch.testing.assert_close(case.build(**{name: value})(*case.tensors), module(*case.tensors), rtol=0, atol=0)
        if name not in ("impl", "inplace_grad"):
            assert not torch.allclose(module(*case.tensors).sum(), before), name
        assert f"{name}=" in repr(module)
    module = case.build()
    module.impl = "reference"
    assert "served by reference" in tlk.explain(module, *case.tensors)


@every_module
def test_what_is_set_is_checked_at_the_next_forward(case):
    module = case.build()
    for name in case.options:
        before = getattr(module, name)
        if name == "weight":  # a buffer
            with pytest.raises(TypeError, match="weight"):
                module.weight = "no"
            continue
        setattr(module, name, "no")
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            module(*case.tensors)
        setattr(module, name, before)
    module(*case.tensors)


def copies(module):
    """Yield copies of a module, made in every way."""
    yield copy.copy(module)
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    yield torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    yield AveragedModel(module).module
    yield AveragedModel(torch.nn.ModuleList([module]), use_buffers=True).module[0]


@every_module
def test_copies(case):
    """They have the options that were set, and do not change the original."""
    module = case.build()
    apart = ("logit_scale", "inplace_grad") if "temperature" in case.options else ()  # from temperature, impl
    chosen = {name: value for name, value in case.options.items() if name not in apart}
    for name, value in chosen.items():
        setattr(module, name, value)
    expected = case.expected(module, **chosen)
    for made in copies(module):
        assert type(made) is case.make and repr(made) == repr(module)
        torch.testing.assert_close(made(*case.tensors), expected)
        made.impl = "no"
    assert module.impl == "reference"


@every_module
def test_subclass(case):
    class Mine(case.make):
        def __init__(self, more, **kwargs):
            super().__init__(**kwargs)
            self.more = more

        def forward(self, *tensors):
            return self.more * super().forward(*tensors)

    torch.manual_seed(3)
    mine = Mine(2.0, **case.base)
    torch.testing.assert_close(mine(*case.tensors), 2 * case.build()(*case.tensors))
    mine.impl = "no"
    with pytest.raises(ValueError, match="impl"):
        mine(*case.tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_module
def test_to_another_dtype(case, dtype):
    weight = {"weight": torch.arange(1.0, 6)} if "weight" in case.options else {}
    module = case.build(**weight).to(dtype)
    tensors = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in case.tensors]
    assert module(*tensors).dtype == dtype
    assert all(value.dtype == dtype for value in module.state_dict().values())


class TestInPlaceOfPyTorchs:
    def test_instances(self):
        for name in ("CrossEntropyLoss", "MSELoss", "LinearCrossEntropyLoss"):
            if hasattr(torch.nn, name):
                assert isinstance(CASES[name].build(), getattr(torch.nn, name))
        assert all(isinstance(case.build(), _Loss) for name, case in CASES.items() if "reduction" in case.options)

    def test_attributes(self):
        """Label smoothing can be switched off for validation (pytorch/pytorch#129050)."""
        kwargs = {"weight": torch.rand(5), "ignore_index": 1, "label_smoothing": 0.1, "reduction": "sum"}
        for make in (tlk, torch.nn):
            assert {name: getattr(make.CrossEntropyLoss(**kwargs), name) for name in kwargs} == kwargs
        both = tlk.CrossEntropyLoss(**kwargs), torch.nn.CrossEntropyLoss(**kwargs)
        for name, value in (("label_smoothing", 0.0), ("ignore_index", -100), ("reduction", "none"),
                            ("weight", None), ("weight", torch.rand(5)), ("ignore_index", 2)):  # fmt: skip
            for module in both:
                setattr(module, name, value)
            ours, torchs = (module(X, Y) for module in both)
            torch.testing.assert_close(ours, torchs)
            assert list(both[0].state_dict()) == list(both[1].state_dict())

    @pytest.mark.parametrize("weight", [None, torch.arange(5.0)], ids=["plain", "weight"])
    @pytest.mark.parametrize("name", ["CrossEntropyLoss", "LinearCrossEntropyLoss", "MSELoss"])
    def test_state_is_loaded_both_ways(self, name, weight):
        kwargs = {**CASES[name].base, **({} if name == "MSELoss" else {"weight": weight})}
        zero = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        ours, torchs = getattr(tlk, name)(**kwargs), getattr(torch.nn, name)(**kwargs)
        assert list(ours.state_dict()) == list(torchs.state_dict())
        for source, sink in ((ours, torchs), (torchs, getattr(tlk, name)(**zero))):
            sink.load_state_dict(source.state_dict())
            torch.testing.assert_close(sink(*CASES[name].tensors), source(*CASES[name].tensors))

    @pytest.mark.parametrize(("name", "args"), [
        ("CrossEntropyLoss", (torch.arange(1.0, 6), None, 1)),
        ("CrossEntropyLoss", (None, None, -100, None, "sum", 0.1)),
        ("CrossEntropyLoss", (None, None, 2, None, "none")),
        ("MSELoss", (None, None, "sum")), ("MSELoss", (None, None, "none")), ("MSELoss", (None,)),
    ])  # fmt: skip
    def test_arguments_by_position(self, name, args):
        tensors = CASES[name].tensors
        torch.testing.assert_close(getattr(tlk, name)(*args)(*tensors), getattr(torch.nn, name)(*args)(*tensors))

    @pytest.mark.parametrize(("make", "args"), [
        (tlk.CrossEntropyLoss, (None, True)), (tlk.CrossEntropyLoss, (None, None, -100, False)),
        (tlk.MSELoss, (False,)), (tlk.MSELoss, (None, True)),
    ])  # fmt: skip
    def test_deprecated_arguments_by_position(self, make, args):
        with pytest.raises(TypeError, match=r"^(size_average|reduce): expected None .*, got (True|False)"):
            make(*args)

    def test_functions_take_options_by_name(self):
        """A position never has another meaning than in PyTorch, where size_average is third or fourth."""
        for call in (lambda: tlk.cross_entropy(X, Y, None, None, 1), lambda: tlk.mse(A, B, None, None, "sum"),
                     lambda: tlk.mse(A, B, "sum"), lambda: tlk.cross_entropy(X, Y, size_average=None)):  # fmt: skip
            with pytest.raises(TypeError):
                call()


class TestNumbers:
    @every_module
    def test_any_real_number_reaches_the_kernels_as_a_float(self, case):
        """Also under torch.compile."""
        for name, value in case.options.items():
            if name in ("label_smoothing", "ignore_index") or not isinstance(value, float):
                continue
            expected = case.expected(case.build(), **{name: 0.5})
            for number in (np.float32(0.5), np.float16(0.5), Fraction(1, 2), torch.tensor(0.5)):
                module = case.build(**{name: number})
                torch.testing.assert_close(module(*case.tensors), expected)
            for bad in (True, np.bool_(True), np.array(0.5), torch.tensor([0.5, 0.5]), 1j, "0.5", 10**400):
                with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
                    case.build(**{name: bad})(*case.tensors)

    def test_compiled(self):
        torch._dynamo.reset()
        module = tlk.CrossEntropyLoss(ignore_index=np.int64(1), label_smoothing=np.float32(0.25), softcap=np.int64(3))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for smoothing in (np.float32(0.25), 0.0):
            module.label_smoothing = smoothing
            right = F.cross_entropy(3 * torch.tanh(X / 3), Y, ignore_index=1, label_smoothing=float(smoothing))
            torch.testing.assert_close(compiled(X, Y), right)


class TestLearnableScale:
    def test_attributes(self):
        module = tlk.InfoNCELoss(learnable=True, init_temperature=np.float32(0.5), max_scale=8)
        assert (module.learnable, module.init_temperature, module.max_scale) == (True, 0.5, 8)
        torch.testing.assert_close(module(A, B), F.cross_entropy(2 * A @ B.T, torch.arange(6)))
        module.max_scale = 1.5
        torch.testing.assert_close(module(A, B), F.cross_entropy(1.5 * A @ B.T, torch.arange(6)))
        module.init_temperature = 1.0
        module.reset_parameters()
        torch.testing.assert_close(module(A, B), F.cross_entropy(A @ B.T, torch.arange(6)))
        assert not tlk.InfoNCELoss().learnable
        with pytest.raises(AttributeError, match="learnable"):
            module.learnable = False

    def test_trained_copies(self):
        module = tlk.InfoNCELoss(learnable=True)
        with torch.no_grad():
            module.log_logit_scale.fill_(1.0)
        for made in copies(module):
            assert made.log_logit_scale.requires_grad
            torch.testing.assert_close(made(A, B), F.cross_entropy(torch.e * A @ B.T, torch.arange(6)))

    def test_averaged(self):
        module = tlk.InfoNCELoss(learnable=True)
        average = AveragedModel(module)
        for value in (1.0, 2.0):
            with torch.no_grad():
                module.log_logit_scale.fill_(value)
            average.update_parameters(module)
        torch.testing.assert_close(average(A, B), F.cross_entropy(torch.tensor(1.5).exp() * A @ B.T, torch.arange(6)))

    @pytest.mark.parametrize(("name", "value"), [("temperature", 0.1), ("logit_scale", 3.0), ("max_scale", -1.0),
                                                 ("max_scale", None)])  # fmt: skip
    def test_what_is_set_is_checked(self, name, value):
        module = tlk.InfoNCELoss(learnable=True)
        setattr(module, name, value)
        with pytest.raises((TypeError, ValueError), match="learnable" if value and value > 0 else name):
            module(A, B)


@pytest.fixture
def world():
    """A process group of one process, which the test starts; it ends with the test."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch.distributed has no gloo here")

    def up():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return dist.group.WORLD

    yield up
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("name", GROUPED)
class TestGroup:
    """A process group can be neither copied nor pickled; a module that has one can."""

    def test_copies_have_the_group(self, world, name):
        case, default = CASES[name], world()
        for group in (default, dist.new_group([0])):
            module = case.build()
            module.group = group
            for made in copies(module):
                assert made.group is group
                torch.testing.assert_close(made(*case.tensors), module(*case.tensors))
            assert module.group is group

    def test_a_pickle_waits_for_its_group(self, world, name):
        case, default = CASES[name], world()
        pickles = [pickle.dumps(case.build(group=group)) for group in (default, dist.new_group([0]))]
        dist.destroy_process_group()
        modules = [pickle.loads(each) for each in pickles]
        for module in (*modules, *map(copy.deepcopy, modules), pickle.loads(pickle.dumps(modules[1]))):
            with pytest.raises(ValueError, match=r"^group: expected .* torch.distributed is not initialized"):
                module(*case.tensors)
            assert "ranks" in repr(module)
        groups = [world(), dist.new_group([0]), dist.new_group([0])]
        for module, pickled, group in zip(modules, pickles, groups, strict=False):
            torch.testing.assert_close(module(*case.tensors), case.expected(module))
            assert pickle.loads(pickled).group is group

    def test_no_such_group(self, world, name):
        world()
        module = pickle.loads(pickle.dumps(CASES[name].build(group=SavedGroup([0, 1], "1"))))
        with pytest.raises(ValueError, match=r"^group: expected a group of ranks \[0, 1\], .* has no such group"):
            module(*CASES[name].tensors)
        module.group = None
        module(*CASES[name].tensors)

    def test_a_group_that_is_gone(self, world, name):
        module = CASES[name].build(group=world())
        dist.destroy_process_group()
        assert copy.deepcopy(module).group is module.group
        with pytest.raises(ValueError, match="group: expected a process group that is not destroyed"):
            pickle.dumps(module)

    def test_not_a_group(self, name):
        module = CASES[name].build(group="world")
        with pytest.raises(TypeError, match=r"group: expected a torch\.distributed\.ProcessGroup or None, got str"):
            module(*CASES[name].tensors)
