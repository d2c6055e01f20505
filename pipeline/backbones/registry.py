"""The backbones by name."""

import difflib
import fnmatch
import functools

from pipeline.backbones.config import BackboneConfig
from pipeline.backbones.cspdarknet import CSPDARKNET53
from pipeline.backbones.efficientnetv2 import EFFICIENTNETV2_RW_M
from pipeline.backbones.fbnetv3 import FBNETV3_B
from pipeline.backbones.resnetv2 import RESNETV2_50
from pipeline.backbones.vovnet import ESE_VOVNET19B_DW
from pipeline.errors import UnknownBackboneError

BACKBONES: dict[str, BackboneConfig] = {
    "cspdarknet53.ra_in1k": CSPDARKNET53,
    "efficientnetv2_rw_m.agc_in1k": EFFICIENTNETV2_RW_M,
    "ese_vovnet19b_dw.ra_in1k": ESE_VOVNET19B_DW,
    "fbnetv3_b.ra2_in1k": FBNETV3_B,
    "resnetv2_50.a1h_in1k": RESNETV2_50,
}

_PREFIXES = ("timm:", "hf-hub:", "hf_hub:", "timm/")


def list_backbones(pattern: str = "*") -> list[str]:
    """Return the names of the backbones that fit a pattern of a shell, sorted: ``"res*"``."""
    return sorted(fnmatch.filter(BACKBONES, pattern))


def find_backbone(name: str) -> BackboneConfig:
    """Return the configuration of a backbone.

    Args:
        name: Its name; timm's and the hub's prefixes are understood (``timm/…``, ``hf-hub:timm/…``,
            ``timm:…``), and so is an architecture without its tag, whose weights are then those
            that timm takes. ``config.name`` says which it was.

    Raises:
        UnknownBackboneError: No backbone has this name; the message names the nearest one.
    """
    plain = functools.reduce(str.removeprefix, _PREFIXES, name)
    tagged = [known for known in BACKBONES if known.split(".")[0] == plain.split(".")[0]]
    if plain in BACKBONES or (tagged and "." not in plain):
        return BACKBONES[plain if plain in BACKBONES else tagged[0]]
    nearest = tagged or difflib.get_close_matches(plain, BACKBONES, n=1, cutoff=0.0)
    raise UnknownBackboneError(
        f"unknown backbone {name!r}; did you mean {nearest[0]!r}? "
        f"Known are {', '.join(list_backbones())}"
    )
