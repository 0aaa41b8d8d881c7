"""What torchrun starts: `torchrun --nproc-per-node 2 launch/train.py --config recipe.yaml [a.b=c ...]`."""

from leanmill.cli.rank import run_and_leave


if __name__ == "__main__":
    run_and_leave()
