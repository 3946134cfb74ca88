"""SP, the spectral proximal optimizer. Imports torch only and can be copied out alone."""

from sp_yolo.optim.group_prox import Removal
from sp_yolo.optim.groups import build_param_groups
from sp_yolo.optim.report import saliency_report
from sp_yolo.optim.sp import DEFAULTS, SP

__all__ = ["DEFAULTS", "SP", "Removal", "build_param_groups", "saliency_report"]
