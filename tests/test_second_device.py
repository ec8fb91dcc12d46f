"""The second device (`second_device.py`): the CPU's bits, CUDA's refusals; and the counting of operations (`operations.py`)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from operations import REPOSITORY, counted
from small_pipelines import SIZES, SMALL
from torch import Tensor, nn

from ditbench.harness.models.base import ModelSpec
from ditbench.harness.models.loading import load_model

MIXED = "Expected all tensors to be on the same device, but found at least two devices, second_device:0 and cpu!"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MATRIX, IMAGE, HEADS = drawn(3, 4), drawn(1, 4, 8, 8), drawn(2, 2, 8, 16)
POSITIVE = drawn(6, 6) @ drawn(6, 6).T + torch.eye(6)
WEIGHT = drawn(6, 4, 3, 3, seed=1)
VISIBLE = torch.ones(8, 8, dtype=torch.bool).tril()

ON_A_MATRIX: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": lambda x: x @ x.T, "einsum": lambda x: torch.einsum("ij,kj->ik", x, x), "bf16": lambda x: x.bfloat16() @ x.bfloat16().T,
    "float64": lambda x: x.double() @ x.double().T, "fp8": lambda x: x.to(torch.float8_e4m3fn).float(),
    "int8": lambda x: (10 * x).to(torch.int8), "layer_norm": lambda x: F.layer_norm(x, (4,)), "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "softmax": lambda x: x.softmax(-1), "gelu": lambda x: F.gelu(x, approximate="tanh"), "std": lambda x: x.std(0),
    "fft": lambda x: torch.fft.fft(x).conj().imag, "polar": lambda x: torch.view_as_real(torch.polar(x.abs(), x)),
    "sort": lambda x: x.sort(-1).indices, "topk": lambda x: x.topk(2).values, "quantile": lambda x: x.quantile(0.3),
    "histc": lambda x: torch.histc(x, 5), "median": lambda x: x.median(), "unique": lambda x: x.round().unique(),
    "svd": lambda x: torch.linalg.svd(x, full_matrices=False)[0], "qr": lambda x: torch.linalg.qr(x)[1], "pinv": torch.linalg.pinv,
    "where": lambda x: torch.where(x > 0, x, 0.0), "embedding": lambda x: F.embedding(x.argmax(1).clamp(max=2), x),
    "in place": lambda x: x.clone().add_(1).mul_(x), "through a view": lambda x: filled(x.clone()),
    "out": lambda x: torch.add(x, x, out=torch.empty(0, device=x.device)), "resize": lambda x: x.clone().resize_(2, 3),
    "CPU index": lambda x: x[torch.tensor([0, 2])], "CPU mask": lambda x: x[torch.tensor([True, False, True])],
    "CPU number": lambda x: x * torch.tensor(2.0), "arange": lambda x: torch.arange(5, device=x.device),
    "linspace": lambda x: torch.linspace(0, 1, 5, device=x.device), "full": lambda x: torch.full((2,), 3.0, device=x.device),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device), "eye": lambda x: torch.eye(3, device=x.device),
    "like": lambda x: torch.ones_like(x) + x.new_zeros(4), "triu": lambda x: torch.triu_indices(3, 3, device=x.device),
    "odd strides": lambda x: torch.empty_strided((1, 4), (9, 1), device=x.device).fill_(1.0),
    "bits": lambda x: ((10 * x).to(torch.uint8) & 3) | ((10 * x).long() << 2).bitwise_xor_(1),
    "integer": lambda x: x.long() * 0.1,
    "float mod": lambda x: x.double().remainder(0.1), "number": lambda x: 0.1 - x.double() ** 2 / 3, "floor": lambda x: x // 0.3,
    "compared": lambda x: (x > 0.1) & (x.long() != 1),
    "nothing": lambda x: torch.tensor([], device=x.device), "view as": lambda x: x.view(torch.int32),
}  # fmt: skip
ON_AN_IMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "conv2d": lambda x: F.conv2d(x, WEIGHT.to(x.device), padding=1),
    "channels last": lambda x: F.conv2d(x.contiguous(memory_format=torch.channels_last), WEIGHT.to(x.device)),
    "conv3d": lambda x: F.conv3d(x[:, :, None], WEIGHT[:, :, None].to(x.device)), "group_norm": lambda x: F.group_norm(x, 2),
    "upsample": lambda x: F.interpolate(x, scale_factor=2.0), "pool": lambda x: F.max_pool2d(x, 2),
    "resize": lambda x: F.interpolate(x, size=(5, 5), mode="bilinear", antialias=True),
}  # fmt: skip
ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda q: F.scaled_dot_product_attention(q, q, q),
    "causal": lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    "masked": lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=VISIBLE.to(q.device)),
    "grouped": lambda q: F.scaled_dot_product_attention(q, q[:, :1], q[:, :1], enable_gqa=True),
    "bf16": lambda q: F.scaled_dot_product_attention(q.bfloat16(), q.bfloat16(), q.bfloat16()),
}  # fmt: skip
SOLVERS: dict[str, Callable[[Tensor], Tensor]] = {
    "cholesky": torch.linalg.cholesky, "inv": torch.linalg.inv, "eigh": lambda a: torch.linalg.eigh(a)[1],
    "solve": lambda a: torch.linalg.solve(a, a[0]), "triangular": lambda a: torch.linalg.solve_triangular(a, a, upper=True),
    "cholesky_inverse": torch.cholesky_inverse,
}  # fmt: skip
CASES = [
    pytest.param(function, given, id=name)
    for functions, given in ((ON_A_MATRIX, MATRIX), (ON_AN_IMAGE, IMAGE), (ATTENTION, HEADS), (SOLVERS, POSITIVE))
    for name, function in functions.items()
]


def filled(x: Tensor) -> Tensor:
    x.T[1].fill_(3.0)
    return x


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("function", "given"), CASES)
def test_every_operator_gives_the_bits_and_strides_of_the_cpu(second, function, given, mode):
    with mode():
        wanted, found = function(given), function(given.to(second))
    assert found.device == second and found.stride() == wanted.stride()
    if function is not ON_A_MATRIX["resize"]:  # its new memory is anything
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize(
    "mix",
    [
        lambda far: far + MATRIX, lambda far: MATRIX + far.sum(), lambda far: MATRIX.clone().add_(far), lambda far: far @ MATRIX.T,
        lambda far: F.linear(MATRIX, far), lambda far: torch.cat([far, MATRIX]), lambda far: torch.where(MATRIX > 0, far, far),
        lambda far: far.masked_fill(MATRIX > 0, 0.0), lambda far: F.embedding(torch.tensor([1]), far), lambda far: MATRIX[far[0] > 0],
        lambda far: far.index_put_((torch.tensor([0]),), MATRIX[:1]), lambda far: F.layer_norm(far, (4,), MATRIX[0]),
        lambda far: F.scaled_dot_product_attention(far, MATRIX, MATRIX), lambda far: torch.add(far, far, out=torch.empty(3, 4)),
    ],
)  # fmt: skip
def test_tensors_of_two_devices_do_not_meet(second, mix):
    with pytest.raises(RuntimeError, match=MIXED):
        mix(MATRIX.to(second))


def test_a_generator_of_the_cpu_draws_on_the_cpu_only(second):
    with pytest.raises(RuntimeError, match="Expected a 'second_device' device type for generator but found 'cpu'"):
        torch.randn(3, device=second, generator=torch.Generator())


def test_numpy_is_refused_and_plain_values_are_not(second):
    far = MATRIX.to("second_device")
    with pytest.raises(TypeError, match="can't convert second_device:0 device type tensor to numpy"):
        far.numpy()
    assert far[0, 0].item() == MATRIX[0, 0].item() and far.tolist() == MATRIX.tolist() and bool((far == far).all())
    assert (
        "device='second_device:0'" in repr(far)
        and far.device == torch.device("second_device", 0)
        and far.to("second_device:0") is far
    )


def test_copies_files_and_pickles_keep_numbers_and_device(second, tmp_path):
    far = MATRIX.to(second)
    torch.save(far, tmp_path / "far.pt")
    for again in (copy.deepcopy(far), pickle.loads(pickle.dumps(far)), torch.load(tmp_path / "far.pt")):
        assert again.device == second and torch.equal(again.cpu(), MATRIX) and again.data_ptr() != far.data_ptr()
    assert torch.load(tmp_path / "far.pt", map_location="cpu").device.type == "cpu"


def trained(device: str | torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    layers = (nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(288, 8), nn.LayerNorm(8))
    model = copy.deepcopy(nn.Sequential(*layers).to(device))
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(IMAGE.to(device)), torch.ones(1, 8, device=device)).backward()
        optimizer.step()
    model.load_state_dict(model.state_dict())
    return [each.detach().cpu() for each in model.state_dict().values()]


def test_training_is_the_cpus_bit_for_bit(learns):
    assert all(map(torch.equal, trained(learns), trained("cpu")))


def attention_gradient(device: str | torch.device) -> Tensor:
    heads = HEADS.clone().to(device).requires_grad_()
    ATTENTION["masked"](heads).square().sum().backward()
    return heads.grad.cpu()


def test_the_gradient_of_attention_is_the_cpus(learns):
    assert torch.equal(attention_gradient(learns), attention_gradient("cpu"))


@pytest.mark.parametrize("name", ["flux", "pixart", "wan", "hunyuan_video"])
def test_a_whole_pipeline_on_it_draws_the_cpus_pixels(second, name, tmp_path):
    torch.manual_seed(0)
    SMALL[name]().save_pretrained(tmp_path)
    model = load_model(ModelSpec("small", name, source=str(tmp_path)))
    for part in filter(lambda part: isinstance(part, nn.Module), model.pipe.components.values()):
        for weight in part.parameters():  # those of a file lie at odd addresses, where the CPU rounds otherwise (1e-6)
            weight.data = weight.data.clone()
    given = model.adapter.call(model.pipe) | SIZES.get(name, {}) | {"output_type": "pt", "num_inference_steps": 2}

    def draw() -> Tensor:
        return model.pipe(prompt=["a circle"], generator=[torch.Generator().manual_seed(0)], **given)[0][0]

    with torch.no_grad():
        wanted = draw()
        model.pipe.to(second)
        with counted() as ops:
            found = draw()
    assert found.device == second and torch.equal(found.cpu(), wanted)
    assert ops.share_on_second_device() > 0.99, ops.report()


def test_outside_of_a_test_that_asks_for_it_nobody_finds_the_device(second):
    assert torch.accelerator.is_available() and torch.second_device.device_count() == 1
    import second_device

    second_device._module.in_use = False
    assert not torch.accelerator.is_available() and torch.accelerator.device_count() == 0
    torch.manual_seed(3)
    drawn_once = torch.randn(3)
    with torch.random.fork_rng():
        torch.randn(3)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(3), drawn_once)


# --- counting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_operations_are_counted_as_by_hand(mode):
    linear, conv = nn.Linear(4, 5), nn.Conv2d(4, 6, 3, padding=1)
    with mode(), counted() as ops:
        with ops.stage("linear"):
            linear(MATRIX)
        with ops.stage("conv"):
            conv(IMAGE)
        with ops.stage("attention"):
            F.scaled_dot_product_attention(HEADS, HEADS, HEADS)
        with ops.stage("other"):
            MATRIX.T.contiguous().clone()[1:].exp()
            MATRIX.sum()
        with ops.stage("nothing"):
            torch.arange(1000).sum() + torch.randn(10).long().sum()
    assert {stage: ops.by_stage[stage, "cpu"] for stage in ("linear", "conv", "attention", "other", "nothing")} == {
        "linear": 2 * 3 * 4 * 5,
        "conv": 2 * 64 * 4 * 6 * 9,
        "attention": 2 * 2 * (2 * 8 * 8 * 16) * 2,
        "other": 9 + 12,
        "nothing": 0,
    }


OTHERS = {  # what it does, and its operations
    "moves": (lambda: F.unfold(IMAGE, 3), 0),
    "views": (lambda: torch.ops.aten._unsafe_view(torch.zeros(3, 4), [12]), 0),
    "distances": (lambda: torch.cdist(torch.zeros(6, 8), torch.zeros(5, 8)), 3 * 6 * 5 * 8),
    "distances of many": (lambda: torch.cdist(torch.zeros(30, 8), torch.zeros(30, 8)), 3 * 30 * 30 * 8),
    "solves": (lambda: torch.cholesky_solve(torch.zeros(8, 300), torch.eye(8)), 2 * 8 * 8 * 300),
    "sums of products": (lambda: torch.addbmm(torch.zeros(8, 12), *MANY), 2 * 6 * 8 * 16 * 12),
    "lists": (lambda: torch._foreach_add([torch.zeros(6), torch.zeros(5)], 1.0), 11),
    "least squares": (lambda: torch.linalg.lstsq(torch.eye(20, 8), torch.zeros(20, 3)), 2 * 20 * 64 - 341 + 3 * (640 - 64)),
}  # fmt: skip
MANY = (torch.zeros(6, 8, 16), torch.zeros(6, 16, 12))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", OTHERS)
def test_rarer_operators_count_as_by_hand(name, mode):
    function, expected = OTHERS[name]
    with mode(), counted() as ops:
        function()
    assert ops.by_stage.total() == pytest.approx(expected, abs=1)


def test_a_backward_pass_counts_too():
    linear, x = nn.Linear(4, 5, bias=False), MATRIX.clone().requires_grad_()
    with counted() as ops:
        linear(x).backward(torch.ones(3, 5))
    assert ops.by_stage["", "cpu"] == 3 * 2 * 3 * 4 * 5


def test_the_share_is_by_device_and_nothing_counts_twice(second):
    with counted() as ops, ops.stage("both"):
        MATRIX.to(second) @ MATRIX.T.to(second)
        MATRIX + MATRIX
    assert ops.by_stage["both", "second_device"] == 2 * 3 * 3 * 4 and ops.by_stage["both", "cpu"] == 12
    assert ops.share_on_second_device() == ops.share_on_second_device("both") == 72 / 84
    assert "both: 85.7143% on second_device" in ops.report() and "add" in ops.report()


def test_the_report_says_which_line_of_ours_asked_the_cpu():
    ours = compile("\nx + x", REPOSITORY / "methods" / "some.py", "exec")
    with counted() as ops, ops.stage("fit"):
        exec(ours, {"x": MATRIX})
    assert ops.on_cpu == {("fit", "add", "methods/some.py:2"): 12}


def test_a_share_of_nothing_is_no_number():
    with pytest.raises(ValueError, match="no floating-point operation was counted in stage 'fit'; known: "):
        counted().share_on_second_device("fit")
