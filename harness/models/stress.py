"""Outlier channels by function-preserving rescaling, so that a small model has the activations that large ones have.

The rows that produce an input are multiplied by k, the columns that read it divided by k: the output stays as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.target import AdaLNRows, Producer, Site, TableRows


def inject_outliers(transformer: nn.Module, sites: list[Site], channels: int, log2_factor: int, seed: int) -> None:
    """In every foldable site, scale `channels` channels by 2^(log2_factor − 2) … 2^log2_factor, at least by 2. In place.

    Powers of two: nothing is lost in the columns. Rows of adaLN-single stay: their embedding is shared by all blocks.

    Raises:
        UserError: a site has fewer channels.
    """
    generator = torch.Generator().manual_seed(seed)
    for site in sites:
        if not site.foldable or any(isinstance(producer, TableRows) for producer in site.producers):
            continue
        consumers = [transformer.get_submodule(name) for name in site.consumers]
        width = consumers[0].weight.shape[1]
        if channels > width:
            raise UserError(f"model.stress.channels={channels}, and {site.consumers[0]} reads {width}; take fewer")
        chosen = torch.randperm(width, generator=generator)[:channels]
        exponents = torch.randint(max(1, log2_factor - 2), log2_factor + 1, (channels,), generator=generator)
        factor = torch.ones(width)
        factor[chosen] = 2.0**exponents
        for producer in site.producers:
            _scale_rows(transformer, producer, factor)
        for consumer in consumers:
            consumer.weight /= factor


def _scale_rows(transformer: nn.Module, producer: Producer, factor: Tensor) -> None:
    assert not isinstance(producer, TableRows)
    linear = transformer.get_submodule(producer.linear)
    if not isinstance(producer, AdaLNRows):
        linear.weight[producer.rows] *= factor[:, None]
        if linear.bias is not None:
            linear.bias[producer.rows] *= factor
        return
    linear.weight[producer.shift_rows] *= factor[:, None]
    linear.bias[producer.shift_rows] *= factor
    linear.weight[producer.scale_rows] *= factor[:, None]
    linear.bias[producer.scale_rows] = (linear.bias[producer.scale_rows] + 1) * factor - 1
