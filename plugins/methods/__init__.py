"""METHODS maps names to methods. To add a method, add a module in this folder and one line below."""

from collections.abc import Mapping
from types import MappingProxyType

from plugins.methods import (
    amdim,
    barlow_twins,
    byol,
    cissl,
    corinfomax,
    cpc,
    deepcluster,
    deepcluster_v2,
    dino,
    directcopy,
    directpred,
    dissl,
    dissl_dino,
    i_vne,
    isocopy,
    isoloss,
    lejepa,
    matrix_ssl,
    mec,
    moco,
    pirl,
    rectified_lpjepa,
    relic,
    relicv2,
    seer,
    sela,
    simclr,
    simdino,
    simsiam,
    ssl_ey,
    swav,
    vicreg,
)
from plugins.spec import MethodSpec

METHODS: Mapping[str, MethodSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            amdim.SPEC,
            barlow_twins.SPEC,
            byol.SPEC,
            cissl.SPEC,
            corinfomax.SPEC,
            cpc.SPEC,
            deepcluster.SPEC,
            deepcluster_v2.SPEC,
            dino.SPEC,
            directcopy.SPEC,
            directpred.SPEC,
            dissl.SPEC,
            i_vne.SPEC,
            isocopy.SPEC,
            isoloss.SPEC,
            lejepa.SPEC,
            matrix_ssl.SPEC,
            mec.SPEC,
            moco.SPEC,
            pirl.SPEC,
            rectified_lpjepa.SPEC,
            relic.SPEC,
            relicv2.SPEC,
            seer.SPEC,
            sela.SPEC,
            simclr.SPEC,
            simdino.SPEC,
            simsiam.SPEC,
            ssl_ey.SPEC,
            swav.SPEC,
            vicreg.SPEC,
        )
    }
)
VARIANTS: Mapping[str, MethodSpec] = MappingProxyType({spec.name: spec for spec in (dissl_dino.SPEC,)})
"""Methods of METHODS as another paper trained them. solo-learn uses them for an option that only they have."""
