"""Class names in lightly's manner: from a method's title."""

import re

from plugins.methods import METHODS

CLASS_NAMES = {re.sub(r"[^0-9A-Za-z]", "", spec.title): spec for spec in METHODS.values()}
"""Name of the model class → MethodSpec: SSLEY, DirectPred, IsoLoss, …"""
