"""`python -m sp_yolo COMMAND`: the program sp-yolo where its script is not on the path."""

import sys

from sp_yolo.cli import main

if __name__ == "__main__":
    sys.exit(main())
