"""`python -m evenkeel.bench`."""

import typer

from .command import bench_command

if __name__ == "__main__":
    typer.run(bench_command)
