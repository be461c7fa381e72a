"""Runs the command line, as ``sgdr-fused`` does: ``python -m sgdr_fused --help``."""

from sgdr_fused.cli.main import main

if __name__ == "__main__":
    main()
