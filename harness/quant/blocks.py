"""How a block of a model family is called, told once: the state that goes from block to block, as one tensor.

Block-wise methods (GPTQ, CLQ, AdaRound) hold a block's input, change the block and look at its output. In a family with
two streams the state is text and image tokens side by side, so these methods see one tensor all the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError

Arguments = dict[str, Any]
TEXT_TOKENS = "text_tokens"  # of a two-stream state: how many come first


class BlockCall(Protocol):
    """beside (may be missing): {argument: the module of the transformer that makes it} of what later blocks get and the first does
    not; these modules run before the first block.
    """

    beside: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def enter(self, block: nn.Module, arguments: Arguments) -> tuple[Tensor, Arguments]:
        """A block's arguments by name → the state, with samples as rows, and what else all blocks get."""

    def run(self, block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
        """The state behind the block."""


@dataclass(frozen=True)
class OneStream(BlockCall):
    """The state is the block's first argument, and its only output."""

    def enter(self, block: nn.Module, arguments: Arguments) -> tuple[Tensor, Arguments]:
        first, *others = arguments
        return arguments[first], {name: arguments[name] for name in others}

    def run(self, block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
        output = block(hidden, **arguments)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{type(block).__name__} gives a {type(output).__name__}, not one tensor; its family has to say how its "
                "blocks are called (docs/add-a-model.md)"
            )
        return output


@dataclass(frozen=True)
class TwoStreams(BlockCall):
    """Text and image (or video) tokens are two arguments and two outputs, the latter in the order of `outputs`.

    A last block that gives no text (None) leaves a state of image tokens alone. by_place: the other arguments go by their
    place, for families whose kinds of blocks call them by different names.
    """

    outputs: tuple[str, str]
    image: str = "hidden_states"
    text: str = "encoder_hidden_states"
    by_place: bool = False

    def enter(self, block: nn.Module, arguments: Arguments) -> tuple[Tensor, Arguments]:
        image, text = arguments[self.image], arguments[self.text]
        rest = {name: value for name, value in arguments.items() if name not in (self.image, self.text)}
        return torch.cat([text, image], 1), rest | {TEXT_TOKENS: text.shape[1]}

    def run(self, block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
        rest = {name: value for name, value in arguments.items() if name != TEXT_TOKENS}
        text, image = hidden.tensor_split([arguments[TEXT_TOKENS]], 1)
        if self.by_place:
            outputs = block(image, text, *rest.values())
        else:
            outputs = block(**{self.image: image, self.text: text}, **rest)
        found = dict(zip(self.outputs, outputs, strict=True))
        return torch.cat([part for part in (found[self.text], found[self.image]) if part is not None], 1)


@dataclass(frozen=True)
class NotInLine(BlockCall):
    """Blocks that also read what others gave long before: no state goes from block to block. Block-wise methods are refused."""

    why: str

    def enter(self, block: nn.Module, arguments: Arguments) -> tuple[Tensor, Arguments]:
        raise UserError(f"a method that works block by block cannot be used with this model: {self.why}")

    def run(self, block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
        raise UserError(f"a method that works block by block cannot be used with this model: {self.why}")


def by_name(block: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """The arguments of a call of the block, by the names of its forward."""
    return dict(inspect.signature(block.forward).bind(*args, **kwargs).arguments)


def tokens_of(output: Any) -> Tensor:
    """What a block gave, as (rows, values), whatever its streams."""
    parts = [output] if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)]
    return torch.cat([part.flatten(1) for part in parts], 1)
