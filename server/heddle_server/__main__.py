"""`python -m heddle_server` is `heddle`."""

from heddle_server.cli import main

if __name__ == "__main__":
    main()
