"""The operation as torch knows it: tracing, compiling, gradients of any order, autocast, threads and forks."""

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import expert_conv2d
from smoe_hpc.kernels.build import libraries
from smoe_hpc.kernels.build.compilers import find_cxx
from smoe_hpc.kernels.expert_conv import is_traced

ROOT = Path(__file__).resolve().parents[2]
OP = torch.ops.smoe_hpc.expert_conv2d.default
BACKWARD = torch.ops.smoe_hpc.expert_conv2d_backward.default
FORMS = ["native", "torch"]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and libraries.find_cxx() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("SMOE_KERNELS", request.param)
    return request.param


def a_case(
    batch: int = 2, channels: int = 6, per_sample: bool = False, dtype: torch.dtype = torch.float64, grad: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + channels)
    x = torch.randn(batch, channels, 5, 6, dtype=dtype, generator=generator, requires_grad=grad)
    weight = torch.randn(4, 2, channels, 3, 3, dtype=dtype, generator=generator, requires_grad=grad)
    chance = torch.rand(*([batch] if per_sample else []), 4, 5, 6, generator=generator)
    return x, weight, chance.argsort(-3)[..., :2, :, :]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "sphere"])
def test_registration_holds_up(form: str, per_sample: bool, padding: str):
    x, weight, indices = a_case(per_sample=per_sample)
    torch.library.opcheck(OP, (x, weight, indices, padding, []))
    g = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(BACKWARD, (g, x, weight, indices, padding, [], True, True))
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(OP, (last, weight, indices, padding, []))


@pytest.mark.parametrize("channels", [2, 6])
def test_second_gradients(form: str, channels: int):
    x, weight, indices = a_case(channels=channels)
    convolve = functools.partial(expert_conv2d, padding="periodic_longitude")
    assert torch.autograd.gradcheck(lambda x, weight: convolve(x, weight, indices), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, weight: convolve(x, weight, indices), (x, weight))


def test_compiled_as_one_graph(form: str):
    if find_cxx() is None:
        pytest.skip("needs a C++ compiler")

    def step(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
        return expert_conv2d(x.relu(), weight, indices, padding="periodic_longitude").square().mean()

    compiled = torch.compile(step, fullgraph=True)
    for batch in (2, 3):  # the second with a size that is not known ahead
        x, weight, indices = a_case(batch=batch, dtype=torch.float32)
        for ours, theirs in zip(
            torch.autograd.grad(compiled(x, weight, indices), (x, weight)),
            torch.autograd.grad(step(x, weight, indices), (x, weight)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def test_the_operation_and_the_function_give_the_same_bits(form: str):
    x, weight, indices = a_case(dtype=torch.float32)
    one, other = OP(x, weight, indices, "zeros", []), expert_conv2d(x, weight, indices)
    assert torch.equal(one, other)
    g = torch.randn_like(one)
    for ours, theirs in zip(torch.autograd.grad(one, (x, weight), g), torch.autograd.grad(other, (x, weight), g), strict=True):
        assert torch.equal(ours, theirs)


def test_only_the_gradients_that_are_needed(form: str):
    x, weight, indices = a_case()
    for needed in ((True, False), (False, True)):
        inputs = x.detach().requires_grad_(needed[0]), weight.detach().requires_grad_(needed[1])
        expert_conv2d(*inputs, indices).sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == list(needed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_type_and_leaves_float64(form: str, dtype: torch.dtype):
    x, weight, indices = a_case(dtype=torch.float32)
    exact = expert_conv2d(x, weight, indices)
    rounded = expert_conv2d(x.to(dtype), weight.to(dtype), indices)
    assert rounded.dtype == dtype
    with torch.autocast("cpu", dtype=dtype):
        y = expert_conv2d(x, weight, indices)
        assert torch.equal(y, rounded)
        assert torch.equal(OP(x, weight, indices, "zeros", []), rounded)
        assert expert_conv2d(x.double(), weight.double(), indices).dtype == torch.float64
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.2)
    grads = torch.autograd.grad(y.float().sum(), (x, weight))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
    for ours, theirs in zip(grads, torch.autograd.grad(exact.sum(), (x, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.5)


def test_outputs_lie_in_memory_as_the_input(form: str):
    x, weight, indices = a_case(dtype=torch.float32)
    expected = expert_conv2d(x, weight, indices)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    y = expert_conv2d(last, weight, indices)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    (grad,) = torch.autograd.grad(y.square().sum(), last)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0])


WRONG: list[tuple[dict[str, object], str]] = [
    ({"g": torch.zeros(1, 4, 3, 3)}, r"gradient \[1, 4, 3, 3\] does not fit the output \[2, 4, 5, 6\]; give one of its shape"),
    ({"g": torch.zeros(2, 3, 5, 6)}, r"gradient \[2, 3, 5, 6\] does not fit"),
    ({"g": torch.zeros(4, 5, 6)}, r"gradient \[4, 5, 6\] does not fit"),
    ({"g": torch.zeros(2, 4, 5, 6, device="meta")}, "gradient is on meta, input on cpu; move them to one device"),
    ({"x": torch.zeros(2, 3, 5, 6)}, "does not fit an input of 3 channels"),
    ({"padding": "reflect"}, "padding='reflect' is not known; choose one of zeros"),
]


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_backward_of_what_does_not_go_together_is_refused(
    form: str, change: dict[str, object], message: str, needs: tuple[bool, bool]
):
    x, weight, indices = a_case(dtype=torch.float32, grad=False)
    good = {"g": torch.zeros(2, 4, 5, 6), "x": x, "weight": weight, "indices": indices, "padding": "zeros"}
    assert BACKWARD(*good.values(), [], *needs)[0].shape == (x.shape if needs[0] else (0,))
    with pytest.raises(ConfigError, match=message):
        BACKWARD(*{**good, **change}.values(), [], *needs)


@pytest.mark.parametrize(("change", "message"), [wrong for wrong in WRONG if "meta" not in wrong[1]])
def test_a_traced_backward_is_refused_too(change: dict[str, object], message: str):
    x, weight, indices = a_case(dtype=torch.float32, grad=False)
    wrong = {"g": torch.zeros(2, 4, 5, 6), "x": x, "weight": weight, "indices": indices, "padding": "zeros", **change}
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in wrong.values()]
        with pytest.raises(ConfigError, match=message):
            BACKWARD(*fakes, [], True, True)


# -- threads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 24])
def test_bits_do_not_depend_on_the_number_of_threads(channels: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, channels, 24, 32, generator=generator, requires_grad=True)
    weight = torch.randn(9, 3, channels, 3, 3, generator=generator, requires_grad=True)
    indices = torch.rand(9, 24, 32, generator=generator).argsort(0)[:4]
    g = torch.randn(3, 12, 24, 32, generator=generator)

    def results() -> list[Tensor]:
        y = expert_conv2d(x, weight, indices)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), g)]

    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(results())
        with ThreadPoolExecutor(4) as pool:  # several callers at once
            runs += [future.result() for future in [pool.submit(results) for _ in range(8)]]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


FORKED = """
import os, torch
from smoe_hpc.kernels import expert_conv2d
torch.set_num_threads(2)
x, weight = torch.randn(4, 8, 16, 16), torch.randn(3, 1, 8, 3, 3)
indices = torch.zeros(2, 16, 16, dtype=torch.int64)
y = expert_conv2d(x, weight, indices)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(expert_conv2d(x, weight, indices), y) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(expert_conv2d(x, weight, indices), y)
"""


def test_a_forked_child_computes_too():
    done = subprocess.run(
        [sys.executable, "-c", FORKED], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=120, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


def test_torch_and_the_kernels_share_their_threads():
    if find_cxx() is None:
        pytest.skip("needs a C++ compiler")
    from smoe_hpc.kernels import cpu

    assert cpu.openmp() is not None
    with open("/proc/self/maps") as maps:
        libraries = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}
    assert len(libraries) == 1


def test_tracing_is_seen():
    x, weight, _ = a_case()
    assert not is_traced(x, weight)
    with torch._subclasses.FakeTensorMode():
        assert is_traced(x, weight)
