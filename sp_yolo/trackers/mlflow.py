"""MLflow, where MLFLOW_TRACKING_URI says (default: a database beside you); MLFLOW_EXPERIMENT_NAME names the place."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import mlflow
from mlflow.entities import Metric, Param

from sp_yolo.trackers.callback import Callback, Record, RunStart, scalars


class Tracker(Callback):
    def on_start(self, run: RunStart) -> None:
        client = self._client = mlflow.MlflowClient()
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.project)
        known = client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else client.create_experiment(project)
        found = client.search_runs([experiment], f"tags.sp_yolo_run = '{run.identity}'", max_results=1)
        made = found or [client.create_run(experiment, run_name=run.name, tags={"sp_yolo_run": run.identity})]
        self._id = made[0].info.run_id
        client.set_terminated(self._id, "RUNNING")
        params = [] if found else [Param(key, str(value)[:500]) for key, value in run.settings.items()]
        for first in range(0, len(params), 100):  # as many as it takes at once
            client.log_batch(self._id, params=params[first : first + 100])

    def on_epoch(self, record: Record) -> None:
        now, step = int(1000 * time.time()), record["epoch"]
        values = {tag: (value, now, step) for tag, value in scalars(record).items()}
        self._client.log_batch(self._id, [Metric(tag.replace(":", "-"), *each) for tag, each in values.items()])

    def on_files(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._client.log_artifact(self._id, str(path))

    def on_end(self, summary: Record | None) -> None:
        self._client.set_terminated(self._id, "FINISHED" if summary else "KILLED")
