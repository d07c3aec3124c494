"""`python -m torchfolio`: the command, where it is not on the path."""

from torchfolio.cli import main

if __name__ == "__main__":
    main()
