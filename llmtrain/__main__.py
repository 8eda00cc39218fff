"""Runs the command line as `python -m llmtrain`, the form that torchrun starts."""

from llmtrain.cli import entry

if __name__ == "__main__":
    entry()
