"""Run the command of :mod:`solo_ext.ssv.command`."""

from solo_ext.ssv.command import main

if __name__ == "__main__":
    main()
