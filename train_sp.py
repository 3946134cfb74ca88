"""Train a YOLOv7 detector with SP: `python train_sp.py --data data/bccd.yaml --cfg yolov7-tiny --img 320`."""

import sys

from sp_yolo.cli import main_train

if __name__ == "__main__":
    sys.exit(main_train())
