"""What `bench/launches.py` counts, against counts by hand."""

from __future__ import annotations

import runpy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ditbench.harness.backends import cuda_int8
from ditbench.harness.common.paths import CONF

pytest.importorskip("triton", reason="the CUDA design's operators need triton")
bench = SimpleNamespace(**runpy.run_path(str(CONF.parent / "bench" / "launches.py")))
T, C, H = 8, 32, 64  # tokens, width, width inside


class Small(nn.Module):
    """q, k and v of one norm; attention; a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(C, C) for name in ("to_q", "to_k", "to_v", "to_out")})
        self.ff = nn.ModuleDict({"up": nn.Linear(C, H), "down": nn.Linear(H, C)})

    def forward(self, x):
        y = F.layer_norm(x, (C,))
        q, k, v = (self.attn[name](y)[:, None] for name in ("to_q", "to_k", "to_v"))
        x = x + self.attn["to_out"](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + self.ff["down"](F.gelu(self.ff["up"](x)))


def counted(label=None, *, fused=False):
    with bench.META:
        block = Small().to(torch.bfloat16).eval()
    if label is not None:
        bench.quantize(block, label, fused=fused)
    return bench.count(block, {"x": bench.tokens_of(T, C)})


def test_a_small_block_in_bf16_has_the_launches_and_bytes_counted_by_hand():
    found = counted()
    assert found.launches == {"norms": 1, "products": 6, "attention": 1, "activations": 1, "elementwise": 2}
    assert found.bytes["attention"] == 4 * T * C * 2
    assert found.bytes["activations"] == 2 * T * H * 2
    assert found.bytes["elementwise"] == 2 * 3 * T * C * 2
    square, wide = (C * C + C + 2 * T * C) * 2, 2 * C * H * 2 + (C + H) * 2 + 2 * T * (C + H) * 2
    assert found.bytes["products"] == 4 * square + wide


@pytest.mark.parametrize(("label", "weight_bytes"), [("w8a8", 1.0), ("w4a8", 0.5)])
def test_rows_and_products_of_a_format_have_the_bytes_counted_by_hand(label, weight_bytes):
    found = counted(label)
    assert found.launches["rows"] == found.launches["products"] == 6
    read = 5 * C + H  # channels that the six layers read, of a token
    assert found.bytes["rows"] == T * (2 + 1) * read + 6 * T * (4 + 4)  # bf16 in, codes out; scales and zero points
    codes = int((4 * C * C + 2 * C * H) * weight_bytes)
    written = 5 * C + H
    around = 6 * T * (4 + 4) + written * (4 + 2)  # of rows; scales and bias of outputs
    assert found.bytes["products"] == codes + T * read + T * written * 2 + around


@pytest.mark.parametrize("label", ["w8a8", "w4a8", "fp8"])
def test_q_k_and_v_share_one_launch_that_has_the_norm_in_it(label):
    """It reads bf16 and writes codes; what the three rows read and wrote, and the norm's own floats, are gone. The GELU ends our products."""
    before, now = counted(label), counted(label, fused=True)
    assert (before.launches["rows"], now.launches["rows"]) == (6, 4)
    ends = {"activations": 1} if label != "fp8" else {}
    assert before.launches - now.launches == {"norms": 1, "rows": 2} | ends
    assert now.bytes["activations"] == before.bytes["activations"] * (not ends)
    assert before.bytes["norms"] == 2 * T * C * 2 + 2 * T * 4  # and the means and deviations that torch keeps
    assert before.bytes["rows"] - now.bytes["rows"] == 2 * T * (C * (2 + 1) + 4 + 4)
    assert before.bytes["products"] == now.bytes["products"]


def test_views_start_nothing_and_an_expanded_tensor_is_read_once():
    x = bench.tokens_of(T, C)
    with bench.Launches() as found:
        x.transpose(1, 2).unflatten(1, (2, -1)).detach()
        torch.empty_like(x)
    assert not found.launches
    with bench.Launches() as found:
        x[:, :1].expand(-1, T, -1) + x
    assert found.bytes == {"elementwise": (C + 2 * T * C) * 2}


def test_counting_leaves_the_backends_as_they_were():
    asked = cuda_int8.unsupported
    counted("w8a8")
    assert cuda_int8.unsupported is asked


def test_the_blocks_of_the_table_launch_and_move_less_than_bf16_in_every_format():
    """Rows that are shared are saved. DiT: q, k and v. PixArt: those, and k and v of the text. FLUX: of both streams; the MLP's too."""
    saved = {}
    for name in bench.SHAPES:
        rows = {(row["format"], row["design"]): row for row in bench.rows({name: bench.SHAPES[name]}, (16,))}
        launches = {key: sum(row["launches"].values()) for key, row in rows.items()}
        moved = {key: sum(row["bytes"].values()) for key, row in rows.items()}
        for label in bench.BACKENDS:
            for counts in (launches, moved):
                assert counts[label, "now"] < counts["bf16", "bf16"], (name, label)
            assert launches[label, "now"] < launches[label, "before"]
        kinds = [rows["w8a8", design]["launches"] for design in ("before", "now")]
        saved[name] = kinds[0]["rows"] - kinds[1]["rows"]
    assert saved == {"DiT-XL/2": 2, "PixArt": 3, "FLUX, two streams": 4, "FLUX, one stream": 3}
