"""Who watches a run: the protocol of callbacks, and the experiment trackers of --log."""

from sp_yolo.trackers.background import in_background
from sp_yolo.trackers.callback import Callback, Callbacks, Record, RunStart, Step, new_identity

__all__ = ["Callback", "Callbacks", "Record", "RunStart", "Step", "in_background", "new_identity"]
