"""fusion serve, from a checkout: see fusion/cli/serve.py."""

from fusion.cli.main import run

if __name__ == "__main__":
    run("serve")
