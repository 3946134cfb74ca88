"""How long a host's run is: its ``--epochs``, and the optimizer steps between two steps of its schedule."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from sp_yolo.plugins.generic import replaced
from sp_yolo.plugins.host_sp import HostSP, Terms


@contextmanager
def counted_epochs(terms: Terms) -> Iterator[None]:
    """Inside the block the epochs of the host's command line, its default included, go into ``terms``, and every
    HostSP hears when its schedule goes on."""
    parse, step = argparse.ArgumentParser.parse_known_args, LRScheduler.step

    def parse_and_note(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        namespace, rest = parse(self, *args, **kwargs)
        epochs = getattr(namespace, "epochs", None)
        terms.epochs = epochs if isinstance(epochs, int) else terms.epochs
        return namespace, rest

    def step_and_tell(self: LRScheduler, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        if isinstance(self.optimizer, HostSP):
            self.optimizer.end_epoch()

    with ExitStack() as stack:
        stack.enter_context(replaced(argparse.ArgumentParser, "parse_known_args", parse_and_note))
        stack.enter_context(replaced(LRScheduler, "step", step_and_tell))
        yield
