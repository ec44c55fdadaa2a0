"""`python -m repkern`: the command, where its script is not on the path."""

from repkern.cli.main import main

if __name__ == "__main__":
    main()
