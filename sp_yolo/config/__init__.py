"""Everything a run is told: strict YAML, hyperparameters, dataset descriptions, the frozen run configuration.

Nothing here imports another part of the package but the errors; each builder of the engine gets its slice, never all.
"""

from sp_yolo.config.dataset import SPLITS, DatasetConfig, load_dataset_config
from sp_yolo.config.files import CHECKOUT, YamlDict, find_file, read_yaml
from sp_yolo.config.recipe import HYP_RULES, Hyp, Rule, load_hyp, parse_assignments
from sp_yolo.config.run import OPTIMIZERS, Config, load_config

__all__ = [
    "CHECKOUT",
    "HYP_RULES",
    "OPTIMIZERS",
    "SPLITS",
    "Config",
    "DatasetConfig",
    "Hyp",
    "Rule",
    "YamlDict",
    "find_file",
    "load_config",
    "load_dataset_config",
    "load_hyp",
    "parse_assignments",
    "read_yaml",
]
