"""`sp-yolo tune`: hyperparameters by optuna, in one process or in several that share a storage."""

from __future__ import annotations

from dataclasses import dataclass

from sp_yolo.config import Config, Rule, option

EXAMPLES = """
  {prog} --data mine.yaml --epochs 30 --trials 40
  {prog} --data mine.yaml --epochs 30 --space lr0=0.001,0.1,log --space mixup=0,0.3 --minutes 120
  {prog} --data mine.yaml --epochs 30 --storage sqlite:///tune.db
"""


@dataclass(frozen=True)
class TuneOptions:
    """Search."""

    trials: int = option(20, "of all processes together", rule=Rule(1))
    minutes: float = option(0.0, "start no further trial after so many (default 0: no limit)", rule=Rule(0))
    space: tuple[str, ...] = option(
        (), "what is searched; repeatable (default: lr0, weight_decay)", metavar="KEY=LOW,HIGH[,log]", repeated=True
    )
    storage: str = option("", "such as sqlite:///tune.db (default: a journal beside the runs)", metavar="URL")
    prune: bool | None = option(None, "give bad trials up early (default: yes, unless --notest)")


OPTIONS = (TuneOptions, Config)


def run(options: TuneOptions, config: Config) -> int:
    """Search, write the best recipe; returns the exit code."""
    from sp_yolo.experiments.tune import default_space, parse_space, search

    search(
        config,
        parse_space(options.space) or default_space(config),
        trials=options.trials,
        minutes=options.minutes,
        storage=options.storage,
        prune=not config.notest if options.prune is None else options.prune,
    )
    return 0
