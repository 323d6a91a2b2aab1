"""What a layer has learned about the operations that follow its calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from keelnorm.engine.activations import NONE
from keelnorm.engine.fusion.operations import Kernel, Steps, kernel_of

#: The expectation of a layer whose result does not wait.
NEVER = Kernel(False, NONE, ())
#: Where a layer keeps its memory, in its ``__dict__``.
ATTRIBUTE = "_fusion"
#: How many wrong expectations make a layer give up.
_MISSES = 3
#: After how many calls a layer that expects nothing looks again at what follows.
_AGAIN = 64


@dataclass
class Memory:
    """What follows a layer's calls, for each mode: evaluation first, training second.

    A layer that has no memory never defers its result. One that has learned nothing computes its result at once and
    looks at what is done with it; the next call then runs together with that.

    Args:
        expected: The kernel that is expected: None where that is not known yet, :data:`NEVER` where nothing is fused.
        reasons: Why nothing is fused, or what came instead.
        misses: How often something else came than expected.
        calls: Calls since a layer that expects nothing last looked; -1 where it never looks again.
        refused: Steps that must not be fused, because other code also reads the value before the last one.
    """

    expected: list[Kernel | None] = field(default_factory=lambda: [None, None])
    reasons: list[str | None] = field(default_factory=lambda: [None, None])
    misses: list[int] = field(default_factory=lambda: [0, 0])
    calls: list[int] = field(default_factory=lambda: [0, 0])
    refused: list[Steps] = field(default_factory=lambda: [(), ()])

    def learn(self, training: bool, kernel: Kernel) -> None:
        """Expect the steps of this kernel from now on."""
        self.expected[training] = kernel
        self.reasons[training] = None

    def give_up(self, training: bool, reason: str, for_good: bool = False) -> None:
        """Compute results at once from now on; unless ``for_good``, look again after some calls."""
        self.expected[training] = NEVER
        self.reasons[training] = reason
        self.calls[training] = -1 if for_good or self.calls[training] < 0 else 0

    def next_expected(self, training: bool) -> Kernel | None:
        """Return the kernel to expect after this call; None to look at what follows, :data:`NEVER` not to wait.

        A layer that expects nothing looks again after every 64 calls, unless it gave up for good.
        """
        kernel = self.expected[training]
        if kernel is None or kernel.steps:
            return kernel
        if self.calls[training] < 0:
            return NEVER
        self.calls[training] = (self.calls[training] + 1) % _AGAIN
        return None if self.calls[training] == 0 else NEVER

    def excuse(self, training: bool, reason: str) -> None:
        """Note why nothing was learned from a call, where nothing is known yet."""
        if self.expected[training] is None and self.reasons[training] is not reason:
            self.reasons[training] = reason

    def stop_before(self, training: bool, steps: Steps) -> None:
        """Expect these steps without the last one from now on, if there is a kernel for them."""
        self.refused[training] = steps
        self.expected[training] = kernel_of(steps[:-1])

    def miss(self, training: bool, reason: str) -> None:
        """Note a wrong expectation: look again, unless that happened too often."""
        self.misses[training] += 1
        if self.misses[training] >= _MISSES:
            self.give_up(training, reason, for_good=True)
        else:
            self.expected[training] = None

    def is_new(self) -> bool:
        """Return whether nothing has been learned yet."""
        return self == Memory()

    def kernels(self) -> list[Kernel]:
        """Return the kernels that are expected, in either mode."""
        return list(dict.fromkeys(kernel for kernel in self.expected if kernel is not None and kernel.steps))

    def reason(self) -> str | None:
        """Return why nothing is fused; None where something is."""
        if self.is_new():
            return "has not been called yet"
        return None if self.kernels() else next((reason for reason in reversed(self.reasons) if reason), None)
