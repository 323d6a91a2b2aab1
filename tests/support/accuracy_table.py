"""Prints the worst errors of keelnorm's kernels, as multiples of torch's: ``python -m tests.support.accuracy_table``.

Each row is a kernel, a layout and an offset of the mean (in deviations); each column a quantity. A value is the worst
over all shapes and options. What it is a ratio of is said in ``accuracy``.
"""

from __future__ import annotations

import argparse
import itertools

import torch

import keelnorm as kn

from .accuracy import LIMIT, ratios
from .cases import LARGE_SHAPES, LAYOUTS, OFFSETS, SHAPES, all_options, layouts_of

QUANTITIES = ("y", "dx", "dresidual", "dweight", "dbias", "running_mean", "running_var")

#: (kernel, layout, offset, quantity) -> ratio, and where it occurred
Worst = dict[tuple[str, str, float, str], tuple[float, str]]


def worst_ratios(kernels: list[str]) -> Worst:
    """The worst ratio of every row and column."""
    worst: Worst = {}
    for shape in (*SHAPES, *LARGE_SHAPES):
        for layout, options, kernel in itertools.product(layouts_of(shape), all_options(shape), kernels):
            with kn.kernels.use(kernel):
                found = ratios(shape, layout, options)
            for name, ratio in found.items():
                key = (kernel, layout, options.offset, name)
                if key not in worst or not ratio <= worst[key][0]:
                    worst[key] = (ratio, f"{shape} {options}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--where", action="store_true", help="say for which shape and options each row's worst occurred"
    )
    where = parser.parse_args().where
    torch.set_num_threads(1)  # small tensors; the results are the same for any number
    kernels = [kernel.name for kernel in kn.kernels.available() if kernel.usable]
    worst = worst_ratios(kernels)
    print(f"{'kernel':<10} {'layout':<14} {'offset':>6}" + "".join(f"{name:>13}" for name in QUANTITIES))
    for kernel, layout, offset in itertools.product(kernels, LAYOUTS, OFFSETS):
        row = {name: worst[kernel, layout, offset, name] for name in QUANTITIES}
        name = max(row, key=lambda name: row[name][0])
        flag = "" if row[name][0] <= LIMIT else "  over the limit"
        print(f"{kernel:<10} {layout:<14} {offset:>6g}" + "".join(f"{row[q][0]:>13.2f}" for q in QUANTITIES) + flag)
        if where:
            print(f"{'':<33}{name}: {row[name][1]}")


if __name__ == "__main__":
    main()
