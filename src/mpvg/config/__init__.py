"""The configuration of a run: plain, frozen dataclasses that load no torch."""

from mpvg.config.parts import PRETRAINED, AugmentConfig, LoaderConfig, NetworkConfig, OptimConfig
from mpvg.config.run import (
    ADDED_FIELDS,
    FORMAT,
    UNCOUNTED,
    RunConfig,
    digest_defaults,
    digest_format,
    flatten,
    nested,
)

__all__ = [
    "ADDED_FIELDS",
    "FORMAT",
    "PRETRAINED",
    "UNCOUNTED",
    "AugmentConfig",
    "LoaderConfig",
    "NetworkConfig",
    "OptimConfig",
    "RunConfig",
    "digest_defaults",
    "digest_format",
    "flatten",
    "nested",
]
