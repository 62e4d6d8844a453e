"""The `mgml` commands: the only home of argparse and print."""
