"""The entry point of ``lrk`` and of ``python -m lowrank_cli``."""

import signal


def main() -> None:
    """Run the command line; a Ctrl-C while it is still imported ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored, as in a script's background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from lowrank_cli import cli

    cli.main()


if __name__ == "__main__":
    main()
