"""The command line and the drawings of a schedule."""
