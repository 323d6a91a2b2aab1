"""`python -m evenkeel.bench`."""

from evenkeel.bench.group import bench_app

if __name__ == "__main__":
    bench_app()
