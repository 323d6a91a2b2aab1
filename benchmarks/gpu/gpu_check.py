"""Compare the GPU kernels with float64 before anything is timed, on shapes that take every path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from keelnorm.bench import correctness
from keelnorm.bench.cases import LAYOUTS, VARIANTS, Case, Shape
from keelnorm.bench.peers import PEERS
from keelnorm.bench.problem import make_problem

#: Channels that fit on the chip and that do not; few channels and many; one position; odd sizes.
SHAPES = (
    (8, 16, 4, 4), (64, 128), (33, 257), (16, 32, 100), (5, 67, 7, 7), (3, 7, 1, 1), (4, 3, 130, 130), (32, 64, 28, 28),
    (2, 1100, 9, 9), (700, 6, 2),
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Checked:
    """The number of right cases, the messages of wrong ones, and by dtype the largest errors (keelnorm, eager), eps."""

    right: int
    wrong: list[str]
    worst: dict[str, tuple[float, float]]


def check_all(device: str, say: Callable[[str], None], shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Checked:
    """Compare y, every gradient and the running statistics of every case."""
    found = Checked(0, [], {})
    for dims, variant, dtype in product(shapes, VARIANTS, DTYPES):
        shape = Shape("small", dims)
        for layout in LAYOUTS if len(dims) == 4 else LAYOUTS[:1]:
            case = Case(shape, layout, variant, dtype=dtype)
            problem = make_problem(case, device)
            expected = correctness.expect(problem, "training")
            errors = {}
            for name in ("keelnorm", "eager"):
                built = PEERS[name].build(problem)
                assert built.norm is not None
                built.norm.to(device)
                try:
                    errors[name] = correctness.check(problem, built, "training", expected)
                    if name == "keelnorm":
                        correctness.check(problem, built, "inference", correctness.expect(problem, "inference"))
                        found.right += 1
                except (ValueError, RuntimeError, TypeError) as error:
                    if name == "keelnorm":
                        found.wrong.append(f"{case.name}: {error}")
            if len(errors) == 2:
                before = found.worst.get(dtype, (0.0, 0.0))
                found.worst[dtype] = max(before[0], errors["keelnorm"]), max(before[1], errors["eager"])
    say(f"{found.right} cases right, {len(found.wrong)} wrong")
    for message in found.wrong:
        say(f"  {message}")
    for dtype, (own, eager) in found.worst.items():
        say(f"  {dtype}: largest error {own:.2f} eps, eager's {eager:.2f}")
    return found
