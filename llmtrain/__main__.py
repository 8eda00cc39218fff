"""`python -m llmtrain`, the form that torchrun starts."""

import sys

from llmtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
