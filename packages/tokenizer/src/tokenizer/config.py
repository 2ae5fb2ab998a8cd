"""Typed configuration of the tokenizer's commands.

A command's YAML root is `conf/tokenizer/COMMAND.yaml`; names, types and defaults are the dataclasses below, and YAML holds
only what differs. `python -m tokenizer.train --cfg job` prints the complete configuration.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF_DIR = str(Path(__file__).with_name("conf"))

T = TypeVar("T")


def validated(cfg: DictConfig, schema: type[T]) -> T:
    """Return `cfg` as a `schema` instance, or exit naming the key that is unknown, missing or invalid."""
    try:
        # Through plain containers: merging the DictConfig itself would let unknown keys (`+modle=xl`) pass.
        plain = OmegaConf.to_container(cfg, resolve=True)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))  # type: ignore[return-value]
    except (OmegaConfBaseException, ValueError) as error:
        raise SystemExit(f"error: bad config: {error}") from None


def command(config_name: str, schema: type[T]) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Turn `run(config)` into the entry point of the command whose YAML root is `config_name`.

    What a user can mend (ValueError, OSError such as FileNotFoundError) ends in one line; HYDRA_FULL_ERROR=1 shows where
    it was raised.
    """

    def wrap(run: Callable[[T], None]) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=CONF_DIR, config_name=config_name)
        @functools.wraps(run)
        def main(cfg: DictConfig) -> None:
            config = validated(cfg, schema)
            try:
                run(config)
            except (ValueError, OSError) as error:
                if os.environ.get("HYDRA_FULL_ERROR") == "1":
                    raise
                raise SystemExit(f"error: {error}") from None

        return main

    return wrap
