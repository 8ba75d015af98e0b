"""fusion benchmark, from a checkout: see fusion/cli/benchmark.py."""

from fusion.cli.main import run

if __name__ == "__main__":
    run("benchmark")
