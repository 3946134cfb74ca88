"""What a finished run leaves and says: the small network, the report, summary.json, the last lines."""

from __future__ import annotations

from collections.abc import Callable

from sp_yolo.config import Config
from sp_yolo.engine.compact import COMPACT, save_compact
from sp_yolo.engine.setup import Run
from sp_yolo.engine.summary import model_facts, run_report, run_summary
from sp_yolo.eval import EvalResult
from sp_yolo.report import per_class_table
from sp_yolo.trackers import Record

Say = Callable[[str], None]


def write_results(
    run: Run, options: Config, best: EvalResult, seconds: float, *, draws: bool, say: Say, show: Say
) -> Record:
    """Write what ``run`` leaves beside its weights and return the summary. The average holds the best weights.

    ``best``: they, measured. ``seconds``: the run's. ``say``: notes; ``show``: the result. In the main process alone.

    Raises:
        StorageError: a file cannot be written. SPYoloError: the compact model computes something else.
    """
    progress, path = run.state.progress, run.folder.path
    show(f"\n{per_class_table(best)}\n\n{best.summary_text}")
    summary = run_summary(best, progress, seconds, options.seed, run.compute)
    smaller = _write_compact(run, summary, say if draws else None)
    if draws:
        facts = {"data": options.data, "recipe": run.recipe_path, "seed": summary["seed"], "device": summary["device"]}
        facts |= model_facts(run.state.ema.module, run.size.val) | ({"compact": smaller} if smaller else {})
        title = f"{path.name}: {options.cfg or options.weights}, {options.optimizer}"
        say("\n".join(run_report(path, best, run.val, title=title, facts=facts, history=progress.records)))
    run.folder.write_json("summary.json", summary)
    compact_line = f"compact       {run.folder.weights / COMPACT}: {smaller}\n" if smaller else ""
    show(
        f"\n{len(progress.records)} epochs in {seconds / 60:.1f} min; best epoch {progress.best_epoch}: "
        f"mAP@.5 {best.map50:.3f}, mAP@.5:.95 {best.map50_95:.3f}"
        f"{'' if run.val.data.tally.boxes else ' (not one label to measure by: it says nothing)'}\n"
        f"run directory {path}\nweights       {run.folder.best}\n"
        f"{compact_line}pictures      {path}/*.jpg, *.png"
    )
    return summary


def _write_compact(run: Run, summary: Record, draw: Say | None) -> str:
    """Write the best weights without the channels that went; words about it, "" where none did."""
    if not run.recipe.sp_channels:
        return ""
    content = run.state.finished_weights(run.told)
    report = save_compact(run.state.ema.module, run.folder.weights / COMPACT, content, run.size.val)
    summary["compact"] = report.as_dict()
    if draw:
        draw(report.draw(run.folder.path / "channels.png"))
    return str(report)
