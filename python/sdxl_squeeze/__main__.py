"""`python -m sdxl_squeeze`: the program of this Python, whatever is on the PATH."""

from .launcher import main

main()
