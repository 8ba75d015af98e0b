"""fusion evaluate, from a checkout: see fusion/cli/evaluate.py."""

from fusion.cli.main import run

if __name__ == "__main__":
    run("evaluate")
