from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditbench.harness.backends import attention as module
from ditbench.harness.backends.attention import attention

needs_kernel = pytest.mark.skipif(module.lacks() is not None, reason=str(module.lacks()))


def operands(batch: int, heads: int, queries: int, keys: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """As attention modules make them: heads side by side in each token."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(batch, rows, heads, width, generator=generator) for rows in (queries, keys, keys))
    q, k, v = (x.bfloat16().transpose(1, 2) for x in drawn)
    return q, k, v


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.fixture
def torch_is_not_asked(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("torch's own attention was called")

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", refuse)


# Head sizes 64, 72, 128 and less than a panel; no whole block of keys or queries, one key, several blocks.
SHAPES = [
    (2, 3, 256, 256, 72),
    (1, 2, 70, 70, 64),
    (1, 2, 65, 130, 128),
    (2, 2, 37, 301, 40),
    (1, 1, 3, 17, 2),
    (1, 2, 5, 1, 6),
    (1, 1, 9, 33, 160),
]


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_near_to_the_exact_result_as_torch(shape):
    q, k, v = operands(*shape)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    theirs = error(F.scaled_dot_product_attention(q, k, v), exact)
    y = attention(q, k, v)
    assert (y.shape, y.dtype) == (q.shape, torch.bfloat16)
    assert error(y, exact) <= 1.1 * theirs + 1e-5


@needs_kernel
@pytest.mark.parametrize("mask_shape", [(1, 1, 1, 77), (2, 1, 5, 77), (2, 3, 5, 77), (5, 77), (2, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["seen", "added"])
def test_masks_hide_keys_or_are_added(mask_shape, kind, torch_is_not_asked):
    q, k, v = operands(2, 3, 5, 77, 16)
    drawn = torch.randn(mask_shape, generator=torch.Generator().manual_seed(1))
    mask = drawn > -0.5 if kind == "seen" else drawn
    added = torch.zeros(mask_shape).masked_fill(~mask, -torch.inf) if kind == "seen" else mask
    scores = q.double() @ k.double().mT / 4 + added.double()
    y = attention(q, k, v, attn_mask=mask if kind == "seen" else mask.bfloat16())
    if mask_shape == (2, 1, 1, 1) and kind == "seen" and not mask.all():
        hidden = ~mask.flatten()
        assert (y[hidden] == 0).all()
        y, scores, v = y[~hidden], scores[~hidden], v[~hidden]
    assert error(y, scores.softmax(-1) @ v.double()) < 4e-3


@needs_kernel
def test_a_row_that_may_see_nothing_is_zero_and_the_others_do_not_notice(torch_is_not_asked):
    q, k, v = operands(1, 2, 6, 200, 8)
    mask = torch.ones(1, 1, 6, 200, dtype=torch.bool)
    mask[:, :, 2] = False
    y, whole = attention(q, k, v, attn_mask=mask), attention(q, k, v)
    assert (y[:, :, 2] == 0).all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[:, :, others], whole[:, :, others])


@needs_kernel
@pytest.mark.parametrize("keys", [40, 300])
def test_a_row_whose_keys_all_have_the_lowest_number_gets_their_mean_as_torch_gives_it(keys, torch_is_not_asked):
    """So diffusers writes masks of padded prompts; no infinity among them."""
    q, k, v = operands(1, 2, 3, keys, 32)
    mask = torch.zeros(1, 1, 3, keys)
    mask[:, :, 1] = torch.finfo(torch.float32).min
    y = attention(q, k, v, mask)
    assert error(y[:, :, 1], v.float().mean(2)) < 0.01
    assert error(y[:, :, 0], attention(q, k, v)[:, :, 0].float()) < 0.01


def test_a_scale_is_taken(torch_is_not_asked):
    q, k, v = operands(1, 2, 6, 40, 8)
    exact = (q.double() @ k.double().mT * 0.7).softmax(-1) @ v.double()
    assert error(attention(q, k, v, scale=0.7), exact) < 4e-3


@needs_kernel
@pytest.mark.parametrize("keys", [40, 300])
def test_scores_of_any_size_neither_overflow_nor_vanish(keys, torch_is_not_asked):
    """The largest score lies in the last block of keys: what was summed before shrinks to nothing."""
    q, k, v = operands(1, 1, 6, keys, 8)
    k[:, :, -1] = 0
    k[:, :, -1, 0], q[..., 0] = 300.0, 300.0
    torch.testing.assert_close(attention(q, k, v), v[:, :, -1:].expand_as(q), rtol=0, atol=0)


@needs_kernel
@pytest.mark.parametrize("operand", range(3))
def test_nan_stays_nan_in_its_head(operand, torch_is_not_asked):
    given = operands(1, 2, 6, 40, 8)
    given[operand][:, 1, 3, 2] = torch.nan
    y = attention(*given)
    assert y[:, 1].isnan().any()
    assert y[:, 0].isfinite().all()


@needs_kernel
def test_a_sample_is_the_same_alone_and_among_others(torch_is_not_asked):
    q, k, v = operands(5, 3, 70, 70, 24)
    whole = attention(q, k, v)
    for index in range(5):
        assert torch.equal(attention(*(x[index : index + 1] for x in (q, k, v))), whole[index : index + 1])


@needs_kernel
def test_operands_may_lie_in_one_tensor_or_across(torch_is_not_asked):
    fused_BTC = torch.randn(2, 20, 3 * 4 * 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in fused_BTC.chunk(3, -1))
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(attention(q, k, v), expected)
    across = [x.mT.contiguous().mT for x in (q, k, v)]
    assert torch.equal(attention(*across), expected)


@needs_kernel
@pytest.mark.parametrize("what", ["float32", "odd", "causal", "grouped", "gradient"])
def test_what_the_kernel_does_not_run_torch_does(what):
    q, k, v = operands(1, 4, 6, 6, 7 if what == "odd" else 8)
    options = {"causal": {"is_causal": True}, "grouped": {"enable_gqa": True}}.get(what, {})
    if what == "float32":
        q, k, v = q.float(), k.float(), v.float()
    if what == "grouped":
        k, v = k[:, :2], v[:, :2]
    if what == "gradient":
        q.requires_grad_()
    y = attention(q, k, v, **options)
    assert torch.equal(y, F.scaled_dot_product_attention(q, k, v, **options))
    assert y.requires_grad == (what == "gradient")


def test_a_machine_without_bfloat16_products_says_so(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    module.lacks.cache_clear()
    try:
        assert "AVX512-BF16" in str(module.lacks())
    finally:
        module.lacks.cache_clear()
