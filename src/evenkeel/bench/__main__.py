"""`python -m evenkeel.bench`."""

from .group import bench_app

if __name__ == "__main__":
    bench_app()
