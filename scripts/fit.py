"""fusion fit, from a checkout: see fusion/session.py."""

from fusion.cli.main import run

if __name__ == "__main__":
    run("fit")
