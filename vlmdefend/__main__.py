"""``python -m vlmdefend``: the command, for launchers that start modules (torchrun, accelerate launch)."""

from vlmdefend.cli.main import run

run()
