"""MLflow, where MLFLOW_TRACKING_URI says (default: a database beside you); MLFLOW_EXPERIMENT_NAME names the place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import mlflow

from sp_yolo.trackers.callback import Callback, Record, RunStart, scalars

TAG = "sp_yolo_run"  # by which a resumed run is found again


class Tracker(Callback):
    def on_start(self, run: RunStart) -> None:
        self._client = mlflow.MlflowClient()
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.project)
        known = self._client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else self._client.create_experiment(project)
        found = self._client.search_runs([experiment], f"tags.{TAG} = '{run.identity}'", max_results=1)
        made = found or [self._client.create_run(experiment, run_name=run.name, tags={TAG: run.identity})]
        self._id = made[0].info.run_id
        self._client.set_terminated(self._id, "RUNNING")
        for key, value in run.settings.items() if not found else ():
            self._client.log_param(self._id, key, str(value)[:500])

    def on_epoch(self, record: Record) -> None:
        for tag, value in scalars(record).items():
            self._client.log_metric(self._id, tag.replace(":", "-"), value, step=record["epoch"])

    def on_files(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._client.log_artifact(self._id, str(path))

    def on_end(self, summary: Record | None) -> None:
        self._client.set_terminated(self._id, "FINISHED" if summary else "KILLED")
