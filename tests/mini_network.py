"""A network of 9,000 parameters: what a flag, a fault or a tool does to a run shows on it in a tenth of the time."""

MINI = """
nc: 6
depth_multiple: 1.0
width_multiple: 1.0
anchors: [[8,8, 12,12, 16,16], [20,20, 28,28, 36,36], [40,40, 50,50, 60,60]]
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [1, 1, Conv, [16, 1, 1]]
  - [2, 1, Conv, [16, 1, 1]]
  - [3, 1, Conv, [16, 1, 1]]
  - [[4, 5, 6], 1, IDetect, [nc, anchors]]
"""
