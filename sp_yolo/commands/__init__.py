"""The commands of `sp-yolo`, a file each: its options and one call."""
