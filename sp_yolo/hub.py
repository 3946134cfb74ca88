"""Weights on the Hugging Face Hub: ``HubModel.from_pretrained("you/cells").model``, and back by ``push_to_hub``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, hf_hub_download

from sp_yolo.models import DetectionModel, description, model_from_weights
from sp_yolo.models.weights.tensors_file import write_tensors

FILE = "model.safetensors"


class HubModel(ModelHubMixin, library_name="sp-yolo", tags=["yolov7", "object-detection"]):
    """A model with the Hub's methods: save_pretrained, push_to_hub, from_pretrained (a repository's name or a folder).

    model.safetensors holds everything: tensors, names, anchors, configuration. Nothing in it can run.
    ``push_to_hub`` uploads under the user's own Hugging Face login.
    """

    def __init__(self, model: DetectionModel) -> None:
        self.model = model

    @classmethod
    def of_file(cls, weights: str | os.PathLike[str]) -> HubModel:
        """Of a checkpoint such as best.pt.

        Raises:
            UserError: it holds no model.
        """
        return cls(model_from_weights(weights))

    def _save_pretrained(self, save_directory: Path) -> None:
        write_tensors(save_directory / FILE, self.model, description(self.model))
        # The Hub counts downloads by this file, and the mixin asks for it.
        about = {"names": self.model.names, "image_channels": self.model.yaml["ch"]}
        (save_directory / "config.json").write_text(json.dumps(about, indent=1), encoding="utf-8")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **unused: Any,
    ) -> HubModel:
        if os.path.isdir(model_id):
            return cls.of_file(Path(model_id) / FILE)
        path = hf_hub_download(
            model_id,
            FILE,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return cls.of_file(path)
