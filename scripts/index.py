"""fusion index, from a checkout: see fusion/cli/index.py."""

from fusion.cli.main import run

if __name__ == "__main__":
    run("index")
