"""All that is written or drawn for people: tables, pictures, plots and pages, from arrays and results."""

from sp_yolo.report.evaluation import per_class_table, write_report, written_files
from sp_yolo.report.pictures import boxes_of_targets, draw_mosaic
from sp_yolo.report.plots import draw_channels

__all__ = ["boxes_of_targets", "draw_channels", "draw_mosaic", "per_class_table", "write_report", "written_files"]
