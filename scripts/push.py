"""fusion push, from a checkout: see fusion/cli/push.py."""

from fusion.cli.main import run

if __name__ == "__main__":
    run("push")
