"""fusion search, from a checkout: see fusion/cli/search.py."""

from fusion.cli.main import run

if __name__ == "__main__":
    run("search")
