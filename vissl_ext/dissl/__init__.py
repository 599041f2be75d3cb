"""What the configurations of DISSL's published VISSL fork (arXiv:2209.06235) name and VISSL 0.1.6 does not have.

Losses ``dstl_issl_loss``, ``cntr_issl_loss`` and ``simple_cntr_issl_loss``; heads on groups of resolutions
(``MODEL.MULTI_RES_SPLIT_CROPS``) or on several features (``TRUNK.OUT_FEATURE_KEYS``); further options of the head
``mlp`` and the trunk ``resnet``; the trunk ``convnext``; transforms that mask patches. Where a configuration uses none
of it, VISSL's own code runs.
"""
