"""`python -m keelnorm.bench`."""

from keelnorm.bench.group import bench_app

if __name__ == "__main__":
    bench_app()
