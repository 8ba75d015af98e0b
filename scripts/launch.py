"""fusion launch, from a checkout: see fusion/cli/launch.py."""

from fusion.cli.main import run

if __name__ == "__main__":
    run("launch")
