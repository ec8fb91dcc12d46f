"""SageAttention's forms against loops in float64, written from the papers: one query, one key, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditbench.harness.quant import sage
from ditbench.harness.quant.sage import FORMS, PER_BLOCK, SageRecipe, sage_attention

E2M1_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E4M3_VALUES = sorted(
    {0.0}
    | {m / 8 * 2.0**-6 for m in range(8)}
    | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)}
)
T, S, D, HEADS = 150, 90, 24, 2  # a whole block of queries and a part of one; keys and channels that fill no block


def nearest(x: Tensor, levels: Iterable[float]) -> Tensor:
    """Ties to the level whose index is even, which has an even last digit."""
    levels = torch.tensor(list(levels), dtype=torch.float64)
    distance = (x.abs()[..., None] - levels).abs()
    least = distance.amin(-1, keepdim=True)
    index = torch.arange(len(levels)).expand_as(distance)
    tied = torch.where(distance == least, index + 1000 * (index % 2), 10**6)
    return levels[tied.argmin(-1)] * x.sign()


def int8(x: Tensor, most: float) -> Tensor:
    return (x / (most / 127)).round() * (most / 127) if most else x


def e4m3(x: Tensor, most: float) -> Tensor:
    return nearest(x / (most / 448), E4M3_VALUES) * (most / 448) if most else x


def e2m1_blocks(row: Tensor) -> Tensor:
    """Of 16 values each: s = e4m3(max / 6), then the nearest of e2m1 · s."""
    parts = []
    for block in row.split(16):
        scale = nearest(block.abs().max() / 6, E4M3_VALUES)
        parts.append(nearest(block / scale, E2M1_VALUES) * scale if scale else torch.zeros_like(block))
    return torch.cat(parts)


def queries_together(t: int) -> tuple[int, int]:
    return t // 32, t % 8


def keys_together(s: int) -> tuple[int, int]:
    return s // 64, s % 8 // 2


def tokens(x_TD: Tensor, number: str, together: Callable[[int], tuple[int, int]]) -> Tensor:
    if number == "e2m1":
        return torch.stack([e2m1_blocks(row) for row in x_TD])
    groups: dict[tuple[int, int], list[int]] = {}
    for t in range(len(x_TD)):
        groups.setdefault(together(t), []).append(t)
    found = torch.empty_like(x_TD)
    for own in groups.values():
        most = float(x_TD[own].abs().max())
        found[own] = int8(x_TD[own], most) if number == "int" else e4m3(x_TD[own], most)
    return found


def by_hand(recipe: SageRecipe, q_TD: Tensor, k_SD: Tensor, v_SD: Tensor, may_read_TS: Tensor | None = None) -> Tensor:
    """One head of one sample."""
    q_TD, k_SD, v_SD = (x.double() for x in (q_TD, k_SD, v_SD))
    if recipe.smooth_k:
        k_SD = k_SD - k_SD.mean(0)
    mean_TD = torch.zeros_like(q_TD)
    if recipe.smooth_q:
        for start in range(0, len(q_TD), 128):
            mean_TD[start : start + 128] = q_TD[start : start + 128].mean(0)
    rounded_q = tokens(q_TD - mean_TD, recipe.qk, queries_together)
    rounded_k = tokens(k_SD, recipe.qk, keys_together)
    if recipe.pv == "e2m1":
        rounded_v = torch.stack([e2m1_blocks(channel) for channel in v_SD.T], 1)
    else:
        of = {"int": int8, "e4m3": e4m3}[recipe.pv]
        rounded_v = torch.stack([of(channel, float(channel.abs().max())) for channel in v_SD.T], 1)
    outputs = []
    for t in range(len(q_TD)):
        scores = torch.stack([(rounded_q[t] @ rounded_k[s] + mean_TD[t] @ k_SD[s]) / D**0.5 for s in range(len(k_SD))])
        if may_read_TS is not None:
            scores[~may_read_TS[t]] = -torch.inf
        p = (scores - scores.max()).exp()
        if recipe.pv == "e2m1":
            rounded_p = e2m1_blocks(p / (1 / (448 * 6))) / (448 * 6)
        else:
            rounded_p = int8(p, 1.0) if recipe.pv == "int" else e4m3(p, 1.0)
        outputs.append(rounded_p @ rounded_v / p.sum())
    return torch.stack(outputs)


def operands(normal, batch: int = 1, kv_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = normal(batch, HEADS, T, D), normal(batch, kv_heads, S, D, seed=1), normal(batch, kv_heads, S, D, seed=2)
    k[..., 3] += 9  # what smoothing takes away
    k[:, :, 40] *= 4
    return q, k, v


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_the_papers_one_query_at_a_time(form, normal):
    q, k, v = operands(normal)
    found = sage_attention(FORMS[form], q, k, v)
    for head in range(HEADS):
        expected = by_hand(FORMS[form], q[0, head], k[0, head], v[0, head])
        assert error(found[0, head], expected) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["bool", "added", "causal"])
def test_what_is_masked_is_not_read(form, kind, normal):
    """A row that may read nothing is 0, as torch has it."""
    q, k, v = operands(normal)
    may_read = normal(1, 1, T, S, seed=3) > 0
    may_read[..., 5, :] = kind != "bool"
    if kind == "causal":
        may_read = torch.ones(T, S, dtype=torch.bool).tril()[None, None]
        found = sage_attention(FORMS[form], q, k, v, causal=True)
    else:
        mask = may_read if kind == "bool" else torch.zeros(may_read.shape).masked_fill(~may_read, -torch.inf)
        found = sage_attention(FORMS[form], q, k, v, mask)
    expected = by_hand(FORMS[form], q[0, 0], k[0, 0], v[0, 0], may_read[0, 0])
    if kind == "bool":
        plain = F.scaled_dot_product_attention(q, k, v, may_read)
        assert expected[5].isnan().all() and not found[:, :, 5].any() and not plain[:, :, 5].any()
    assert error(found[0, 0], expected.nan_to_num(0)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_heads_that_share_keys_are_those_with_keys_repeated(form, normal):
    q, k, v = operands(normal, kv_heads=1)
    repeated = (x.repeat(1, HEADS, 1, 1) for x in (k, v))
    found, expected = sage_attention(FORMS[form], q, k, v), sage_attention(FORMS[form], q, *repeated)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_does_not_depend_on_its_batch_nor_on_how_many_scores_are_there_at_a_time(form, normal, monkeypatch):
    q, k, v = operands(normal, batch=3)
    k[1] *= 50
    mask = normal(3, 1, T, S, seed=4)
    whole = sage_attention(FORMS[form], q, k, v, mask)
    for i in range(3):
        alone = sage_attention(FORMS[form], q[i : i + 1], k[i : i + 1], v[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(sage, "MOST_SCORES", 1)
    torch.testing.assert_close(sage_attention(FORMS[form], q, k, v, mask), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("qk", "pv", "share"), product(sage.SPECS, (None, *sage.SPECS), sage.SHARES))
def test_removed_means_change_nothing_but_rounding(qk, pv, share, normal, monkeypatch):
    """Scores move by the same amount in a row, and what q loses is added again."""
    monkeypatch.setattr(sage, "to_codes", lambda x, scale, zero, spec: x / scale)
    monkeypatch.setattr(sage, "_micro", lambda x: x)
    q, k, v = (x.double() for x in operands(normal))
    found = sage_attention(SageRecipe(qk, pv, share, smooth_q=True), q, k, v)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), rtol=1e-6, atol=1e-6)


def test_errors_grow_from_int8_over_fp8_to_nvfp4_and_a_spiky_key_costs_nothing_without_its_mean(normal):
    """A channel of keys that is large for all tokens (SageAttention, fig. 4) takes most of the levels unless its mean is removed."""
    q, k, v = normal(1, 4, 256, 64), normal(1, 4, 256, 64, seed=1), normal(1, 4, 256, 64, seed=2)
    spiky = k.clone()
    spiky[..., 3], spiky[..., 17] = k[..., 3] + 30, k[..., 17] - 20

    def errors(k: Tensor, smooth: bool) -> list[float]:
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        forms = (replace(FORMS[form], smooth_k=smooth) for form in ("int8", "fp8", "nvfp4"))
        return [error(sage_attention(each, q, k, v), exact) for each in forms]

    plain, removed, kept = errors(k, True), errors(spiky, True), errors(spiky, False)
    for found in (plain, removed, kept):
        assert found[0] < found[1] < found[2]
    assert removed == pytest.approx(plain, rel=1e-3)
    assert plain == pytest.approx([0.036, 0.051, 0.19], rel=0.03), "docs/protocols.md has these"
    assert kept == pytest.approx([0.079, 0.126, 0.46], rel=0.03)
    assert all(with_mean > 1.8 * without for with_mean, without in zip(kept, removed, strict=True))


def test_scales_per_thread_err_less_than_per_block_where_one_token_is_large(normal):
    """One of 128 queries costs three others their levels, instead of all."""
    q, k, v = normal(1, 1, 256, 64), normal(1, 1, 256, 64, seed=1), normal(1, 1, 256, 64, seed=2)
    q[:, :, ::128] *= 30
    others = [t for t in range(256) if t % 128]
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    thread, block = (
        error(sage_attention(SageRecipe("int", None, share), q, k, v)[:, :, others], exact[:, :, others])
        for share in (sage.PER_THREAD, PER_BLOCK)
    )
    assert thread < 0.5 * block


@pytest.mark.parametrize("form", FORMS)
def test_ugly_operands(form):
    """No value at all, one key, one token, and half precision that comes back."""
    zeros = torch.zeros(1, 2, 3, 8)
    assert not sage_attention(FORMS[form], zeros, zeros, zeros).any()
    value = torch.tensor([1.0, -3.0, 0.5, 6.0])[None, None, None]
    one = sage_attention(FORMS[form], torch.ones(1, 1, 2, 4), torch.ones(1, 1, 1, 4), value)
    torch.testing.assert_close(one, value.expand(1, 1, 2, 4), rtol=0.1, atol=0)
    half = sage_attention(FORMS[form], zeros.bfloat16(), zeros.bfloat16(), zeros.bfloat16())
    assert half.dtype == torch.bfloat16
    broken = torch.full_like(zeros, torch.nan)
    assert sage_attention(FORMS[form], broken, zeros, zeros).isnan().all()


def test_a_recipe_of_unknown_parts_is_refused():
    for parts in (("int4", "e4m3"), ("int", "fp8"), ("int", None, "per_token")):
        with pytest.raises(ValueError, match=f"must be one of .*; got '{parts[-1] or parts[0]}'|got 'int4'"):
            SageRecipe(*parts)


def test_a_record_is_told_what_is_rounded_how():
    assert [form.told for form in FORMS.values()] == [
        "q and k int8 per_thread, mean of k removed, map and v e4m3",
        "q and k int8 per_thread, mean of k removed, map and v int8",
        "q and k e4m3 per_thread, mean of k removed, map and v e4m3",
        "q and k e2m1 in blocks of 16 channels, mean of q and k removed, map and v e2m1",
    ]


@pytest.mark.parametrize("causal", [False, True])
def test_the_kernels_of_sageattention_make_the_same_codes_and_outputs(causal):
    """Package sageattention 1 (Triton; on the CPU in Triton's interpreter): int8 q and k per block, P and V in float16.

    Whole blocks of 64 keys: without a causal mask its kernel counts what it fills a last one up with.
    """
    reason = "sageattention is not installed, or finds no Triton here: pip install 'ditbench[oracles]'"
    package = pytest.importorskip("sageattention", reason=reason, exc_type=ImportError)
    kernel = import_module(f"{package.__name__}.attn_qk_int8_per_block{'_causal' if causal else ''}").forward
    quantize = import_module(f"{package.__name__}.quant_per_block").per_block_int8
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(1, 2, 192, 64, generator=generator).half().to(device) for _ in range(3))
    k[..., 3] += 20
    smooth = k - k.mean(-2, keepdim=True)
    q_codes, q_scales, k_codes, k_scales = quantize(q, smooth)
    theirs = kernel(q_codes, k_codes, v, q_scales, k_scales, output_dtype=torch.float16)

    recipe = SageRecipe("int", None, PER_BLOCK)
    ours = sage._tokens(smooth.float(), "int", sage.SHARES[PER_BLOCK][1])
    assert torch.equal(ours.codes, k_codes.float()) and torch.equal(ours.scales[:, :, ::64], k_scales)
    found, exact = (
        sage_attention(recipe, q, k, v, causal=causal),
        sage_attention(replace(recipe, smooth_k=False), q, k, v, causal=causal),
    )
    assert error(found.float(), theirs.float()) < 5e-3 < error(exact.float(), theirs.float())


def test_128_queries_and_64_keys_share_a_scale_per_block(normal):
    """One large token is seen by its whole block, and by no other."""
    for part, size in ((0, 128), (1, 64)):
        x = normal(1, 1, 3 * size, 8).float()
        x[:, :, size + 5] *= 100
        scale = sage._tokens(x, "int", sage.SHARES[PER_BLOCK][part]).scales[0, 0, :, 0]
        assert [len(block.unique()) for block in scale.split(size)] == [1, 1, 1]
        assert float(scale[size]) > 20 * float(scale[size - 1]) and float(scale[2 * size - 1]) == float(scale[size])
