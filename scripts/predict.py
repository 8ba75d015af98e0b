"""fusion predict, from a checkout: see fusion/cli/predict.py."""

from fusion.cli.main import run

if __name__ == "__main__":
    run("predict")
