"""A call of a transformer as a flat list of tensors, as other libraries want it: arguments by name, one prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ditbench.harness.common.errors import UserError


class FlatCall(nn.Module):
    """The transformer with its tensors as places, as a tracer wants them; what is no tensor stays what it was in the example."""

    def __init__(self, model: nn.Module, example: dict[str, Any], names: list[str]) -> None:
        super().__init__()
        self.model, self.example, self.names = model, example, names

    def forward(self, *tensors: Tensor) -> Tensor:
        values = dict(zip(self.names, tensors, strict=True))
        return output_of(self.model(**with_leaves(self.example, values)))


def with_leaves(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    if isinstance(value, Tensor):
        return tensors[path]
    if isinstance(value, Mapping):
        return {key: with_leaves(each, tensors, f"{path}.{key}" if path else str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_leaves(each, tensors, f"{path}.{index}") for index, each in enumerate(value))
    return value


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested arguments with their names, "a.b" of what lies in a."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, each in items:
            yield from leaves(each, f"{path}.{key}" if path else str(key))


def output_of(returned: Any) -> Tensor:
    """The prediction in what a transformer returned.

    Raises:
        UserError: it is no single tensor.
    """
    found = returned if isinstance(returned, Tensor) else returned[0]
    if not isinstance(found, Tensor):
        raise UserError(f"OpenVINO's models return tensors, this transformer a {type(found).__name__} of them")
    return found


def relative_error(y: Tensor, expected: Tensor) -> float:
    """‖y − expected‖ / ‖expected‖, infinite where shapes differ."""
    if y.shape != expected.shape:
        return float("inf")
    expected = expected.double().cpu()
    return float((y.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30))
