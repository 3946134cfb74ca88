"""Annotation files -> checked boxes: YOLO txt, COCO json, VOC xml; every refusal carries file:line."""
