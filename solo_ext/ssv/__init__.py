"""The commands of the repository Self-Supervised-Vision, with its own YAML files: ``python -m solo_ext.ssv``."""
