"""The option ``too_few``: what one value per channel is in training."""

from __future__ import annotations

from keelnorm.engine.masking import TooFew, check_policy
from keelnorm.engine.torch_internals import BatchNormBase


class HasTooFew(BatchNormBase):
    """A batch normalization with the option ``too_few``; see :class:`keelnorm.BatchNorm`."""

    too_few: TooFew = "error"

    def set_too_few(self, too_few: TooFew) -> None:
        """Change ``too_few`` from the next call on.

        Raises:
            ValueError: It is not one of the legal values.
        """
        check_policy(type(self).__name__, too_few)
        if too_few != self.too_few:
            self.too_few = too_few

    def extra_repr(self) -> str:
        """As torch.nn's, with ``too_few`` where it is not the default."""
        return f"{super().extra_repr()}" + ("" if self.too_few == "error" else f", too_few={self.too_few!r}")
