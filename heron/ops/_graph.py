"""What our operators owe to torch.compile, torch.export and torch.func, which look at a call instead of running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from heron.errors import KernelError


def in_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, functional calls inside them) is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def in_graph() -> bool:
    """Whether this call is recorded into a graph or transformed: values of tensors can't be looked at.

    An implementation that calls C++, or that writes into views of its own memory, then has to be one operator of
    PyTorch, which those see from outside alone.
    """
    return torch.compiler.is_compiling() or in_transform()


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


class Operator:
    """A differentiable operator of PyTorch that every one of those can take: call it with what `run` takes.

    Args:
        name: in ``torch.ops``, as ``heron::name``.
        run: of tensors and plain values, to one tensor or a tuple of new ones that share no memory.
        shapes: the same for tensors without contents: empty ones of the right shapes, dtypes and strides.
        keep: ``(ctx, inputs, output)``, saves what `backward` needs.
        backward: ``(ctx, *gradients)``, to the gradients of what `run` takes; None: this is itself a gradient.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        shapes: Callable[..., Any],
        keep: Callable[..., None] = _keep_nothing,
        backward: Callable[..., Any] | None = None,
    ):
        backward = backward or _refuse_second
        self._operator = torch.library.custom_op(f"heron::{name}", run, mutates_args=())
        self._operator.register_fake(shapes)
        self._operator.register_autograd(backward, setup_context=keep)
        operator = self._operator

        class Transformed(torch.autograd.Function):
            """torch.func differentiates this; it cannot differentiate the gradient that torch.library registers."""

            @staticmethod
            def forward(*arguments: Any) -> Any:
                return operator(*arguments)

            @staticmethod
            def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
                """One call for each member of the batch."""
                calls = [
                    Transformed.apply(
                        *(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True))
                    )
                    for i in range(info.batch_size)
                ]
                if isinstance(calls[0], Tensor):
                    return torch.stack(calls), 0
                return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])

        Transformed.setup_context = staticmethod(keep)
        Transformed.backward = staticmethod(backward)
        Transformed.jvp = staticmethod(_refuse_forward_mode)
        self._transformed = Transformed

    def __call__(self, *arguments: Any) -> Any:
        return (self._transformed.apply if in_transform() else self._operator)(*arguments)


def _refuse_second(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise KernelError(
        "second derivatives are not there for RWKV's operators; wkv7 and linear_cross_entropy have them with "
        'impl="reference"'
    )


def _refuse_forward_mode(ctx: Any, *tangents: Tensor | None) -> NoReturn:
    raise KernelError(
        "forward-mode differentiation (torch.func.jvp, jacfwd, hessian) is not there for RWKV's operators; "
        "use reverse mode: torch.func.grad, vjp or jacrev"
    )
