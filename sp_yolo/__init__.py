"""sp-yolo: YOLOv7 detectors trained with the Spectral Proximal (SP) optimizer."""

from sp_yolo.optim import SP

__version__ = "0.2.0"
__all__ = ["SP", "__version__"]
