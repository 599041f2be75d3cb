"""The command of Self-Supervised-Vision: ``python main.py --config configs/byol.yaml --algo byol --arch resnet18 ...``.

It is ``python -m solo_ext.ssv``; see docs/migration.md.
"""

from solo_ext.ssv.command import main

if __name__ == "__main__":
    main()
