"""What every op needs to choose among its forms. Each op knows its own forms; this file knows none of them."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from heron.errors import KernelError
from heron.ops import _graph

_no_kernels: str | None = None
_counted_on: ContextVar[list[Callable[[], object]] | None] = ContextVar("_counted_on", default=None)


class Choice(NamedTuple):
    """The form that ``impl="auto"`` takes, by name, and the reason, as one clause."""

    impl: str
    reason: str


def keep_to_pytorch(reason: str) -> None:
    """From here on ``impl="auto"`` takes no CUDA kernel of ours in this process, for `reason`."""
    global _no_kernels
    _no_kernels = reason


def form_of(op: str, impl: str, forms: Mapping[str, Callable]) -> Callable:
    """The form of an op that `impl` names; KernelError where it has no such form."""
    if impl not in forms:
        raise KernelError(f"{op}: impl must be auto, {', '.join(forms)}; got {impl!r}")
    return forms[impl]


@contextlib.contextmanager
def counting_on_builds() -> Iterator[None]:
    """Inside, a form that :meth:`NativeForm.begin` is still building counts as there: for a compiler, which looks at
    shapes alone. Whoever runs what it makes calls :func:`await_builds` before."""
    token = _counted_on.set([])
    try:
        yield
    finally:
        _counted_on.reset(token)


def await_builds() -> None:
    """Wait for all forms that were counted on; KernelError where one failed, which from then on counts as not there."""
    counted_on = _counted_on.get() or []
    while counted_on:
        counted_on.pop()()


class NativeForm:
    """A form of an op in C++ or CUDA: it is built at first use, and runs for some inputs only.

    Args:
        op: the op's name.
        impl: the form's name, which is also the type of device that it runs on: "cuda" or "cpu".
        what: what it computes, for the line on stderr that says that it can't be built.
        why_not: takes the device and the facts of the op's own choice, such as dtype and head size; says why the form
            does not run for these, as a clause about "it", or None.
        load: builds and loads it; takes the compute capability of a CUDA device, and nothing on a CPU. It raises
            KernelError where that fails.
    """

    def __init__(self, op: str, impl: str, what: str, why_not: Callable[..., str | None], load: Callable[..., object]):
        self.op, self.impl, self.what, self.why_not, self.load = op, impl, what, why_not, load
        self._begun: dict[tuple[tuple[int, int], ...], threading.Thread] = {}

        def why_not_here(device: torch.device, *facts: Any) -> str | None:
            against = self.why_not(device, *facts)
            if against is not None or self._counted_on(device):
                return against
            return self.why_not_built(device)

        def refusal(device: torch.device, *facts: Any) -> str | None:
            if device.type == self.impl:
                against = self.why_not(device, *facts)
            else:
                against = f"it needs tensors on {'a CUDA device' if self.impl == 'cuda' else 'the CPU'}, got {device}"
            if against is not None:
                return f'{self.op}: impl="{self.impl}": {against}; use impl="auto"'
            if self._counted_on(device):
                return None
            try:
                self.load(*_capability(device))
            except KernelError as error:
                return str(error)
            return None

        # What torch.compiler.assume_constant_result sets, without its imports: torch.compile asks once, at tracing.
        for asked in (why_not_here, refusal):
            asked._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
        self._why_not_here, self._refusal = why_not_here, refusal

    def begin(self, device: torch.device) -> None:
        """Start to build and load this form for `device`, of its own type, in the background; say nothing if it fails.

        Whoever uses it waits for it. The thread does not keep the process alive.
        """
        capability = _capability(device)
        if capability in self._begun or (self.impl == "cuda" and _no_kernels is not None):
            return

        def build() -> None:
            with contextlib.suppress(KernelError):  # told by the first choice that has to do without
                self.load(*capability)

        thread = self._begun[capability] = threading.Thread(target=build, name=f"heron-build-{self.op}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system starts no more threads: it is built at first use
            del self._begun[capability]

    def why_not_built(self, device: torch.device) -> str | None:
        """Build and load this form for `device`, of its own type; why that failed, which is told once, else None."""
        return _why_not_built(self.load, self.what, *_capability(device))

    def _counted_on(self, device: torch.device) -> bool:
        """Whether it is still being built and may be counted on: then the one who does has to wait for it later."""
        counted_on, capability = _counted_on.get(), _capability(device)
        thread = self._begun.get(capability)
        if counted_on is None or thread is None or not thread.is_alive():
            return False

        def wait() -> None:
            thread.join()
            self.load(*capability)

        counted_on.append(wait)
        return True

    def choice(self, reason: str, other: Choice, device: torch.device, *facts: Any) -> Choice:
        """This form, for `reason`, where it runs for a device and `facts`; else `other`, with what speaks against it.

        A build that fails is told on stderr, once.
        """
        if device.type != self.impl:
            return other
        barred = None
        if self.impl == "cuda":
            barred = _no_kernels or ("torch.func transforms this call" if _graph.in_transform() else None)
        against = barred or self._why_not_here(device, *facts)
        if against is None:
            return Choice(self.impl, reason)
        return Choice(other.impl, f"{other.reason}; not in {'CUDA' if self.impl == 'cuda' else 'C++'} ({against})")

    def require(self, device: torch.device, *facts: Any) -> None:
        """Build and load this form for a device and `facts`; KernelError where it does not run or can't be built."""
        if (refusal := self._refusal(device, *facts)) is not None:
            raise KernelError(refusal)


@functools.cache
def _why_not_built(load: Callable[..., object], what: str, *capability: tuple[int, int]) -> str | None:
    try:
        load(*capability)
    except KernelError as error:
        print(f"heron: going on with the slower form of {what} in PyTorch: {error}", file=sys.stderr)
        return str(error)
    return None


def _capability(device: torch.device) -> tuple[tuple[int, int], ...]:
    return (torch.cuda.get_device_capability(device),) if device.type == "cuda" else ()


def why_not_dtype(dtype: torch.dtype, taken: tuple[torch.dtype, ...]) -> str | None:
    """Why a form does not take `dtype`, as a clause; None where it is one of those `taken`."""
    if dtype in taken:
        return None
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    *names, last = (short[one] for one in taken)
    return f"it takes {', '.join(names)}{' and ' if names else ''}{last}, not {dtype}"
