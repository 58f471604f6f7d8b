"""Lets `python -m heddle_loadtest` do what `heddle-loadtest` does."""

from heddle_loadtest.cli import main

if __name__ == "__main__":
    main()
