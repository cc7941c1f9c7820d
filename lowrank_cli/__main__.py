"""``python -m lowrank_cli`` is ``lrk``."""

from lowrank_cli.cli import main

if __name__ == "__main__":
    main()
