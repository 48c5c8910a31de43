"""`python -m peerify`."""

from peerify.cli import main

if __name__ == "__main__":
    main()
