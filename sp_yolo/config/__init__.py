"""Everything a run is told: strict YAML, options, hyperparameters, dataset descriptions.

Of the package it knows the errors and, for SP's own defaults and bounds, the optimizer. Who builds a part of a run asks
for the part of the configuration that it needs, by type.
"""

from sp_yolo.config.dataset import SPLITS, DatasetConfig, load_dataset_config
from sp_yolo.config.files import CHECKOUT, YamlDict, find_file, read_yaml
from sp_yolo.config.options import REQUIRED, Rule, add_options, checked, did_you_mean, entries, from_arguments, option
from sp_yolo.config.recipe import (
    HYP_RULES,
    AugmentRecipe,
    LossRecipe,
    OptimizerRecipe,
    Recipe,
    ScheduleRecipe,
    check_hyperparameter,
    load_recipe,
    parse_assignments,
    read_recipe,
)
from sp_yolo.config.run import (
    ComputeOptions,
    Config,
    DataOptions,
    FolderOptions,
    LoopOptions,
    ModelOptions,
    RecipeOptions,
    load_config,
)

__all__ = [
    "CHECKOUT",
    "HYP_RULES",
    "REQUIRED",
    "SPLITS",
    "AugmentRecipe",
    "ComputeOptions",
    "Config",
    "DataOptions",
    "DatasetConfig",
    "FolderOptions",
    "LoopOptions",
    "LossRecipe",
    "ModelOptions",
    "OptimizerRecipe",
    "Recipe",
    "RecipeOptions",
    "Rule",
    "ScheduleRecipe",
    "YamlDict",
    "add_options",
    "check_hyperparameter",
    "checked",
    "did_you_mean",
    "entries",
    "find_file",
    "from_arguments",
    "load_config",
    "load_dataset_config",
    "load_recipe",
    "option",
    "parse_assignments",
    "read_recipe",
    "read_yaml",
]
