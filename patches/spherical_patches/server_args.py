"""Flags, keyword arguments and the configuration's way into `ServerArgs`.

`ServerArgs.__init__` is where every start comes through (the command line, `sglang.Engine`, a copy
by `dataclasses.replace`), so everything is decided there: `from_cli_args` only hands it the flags.
The configuration travels on as `server_args._spherical`, an underscore attribute: SGLang makes
public ones read-only once resolved, and these are pickled to the workers.
"""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable
from typing import Any

from sglang_spherical.config import SphericalConfig
from sglang_spherical.errors import StartupError, exit_with
from spherical_patches import defaults, flags, refusals
from spherical_patches.hooks import require_applied

ATTRIBUTE = "_spherical"
FROM_COMMAND_LINE = "_spherical_from_command_line"


def spherical_config(server_args: Any) -> SphericalConfig | None:
    """The configuration of a server with a spherical cache; None where the cache is dense."""
    config: SphericalConfig | None = getattr(server_args, ATTRIBUTE, None)
    return config


def engaged_config(server_args: Any) -> SphericalConfig | None:
    """As `spherical_config`, for the hooks of a worker, none of which works without the others.

    Raises StartupError where the cache is to be spherical and a hook of the ledger is missing.
    """
    config = spherical_config(server_args)
    if config is not None:
        require_applied()
    return config


def add_arguments(result: None, parser: argparse.ArgumentParser) -> None:
    """After `ServerArgs.add_cli_args`."""
    flags.add_arguments(parser)


class _WithKeywords:
    """Stands in for a ServerArgs class and adds keyword arguments to its constructor's.

    `ServerArgs.from_cli_args` hands over the attributes that are fields of the class, no others.
    """

    def __init__(self, cls: Any, keywords: dict[str, Any]) -> None:
        self.__dataclass_fields__ = cls.__dataclass_fields__
        self._cls = cls
        self._keywords = keywords

    def __call__(self, **attributes: Any) -> Any:
        return self._cls(**attributes, **self._keywords)


def from_command_line(original: Callable[..., Any], cls: Any, args: argparse.Namespace) -> Any:
    """Around `ServerArgs.from_cli_args`. A StartupError ends the process in one line."""
    keywords = flags.given(args)
    try:
        server_args = original(_WithKeywords(cls, keywords) if keywords else cls, args)
    except StartupError as error:
        exit_with(error)
    if spherical_config(server_args) is not None:
        setattr(server_args, FROM_COMMAND_LINE, True)
    return server_args


def construct(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    """Around `ServerArgs.__init__`. Raises StartupError for what cannot be served."""
    config = flags.build(flags.take(kwargs))
    if not config.spherical:
        refusals.check_dense(kwargs)
        return original(self, *args, **kwargs)
    try:
        arguments = dict(inspect.signature(original).bind_partial(self, *args, **kwargs).arguments)
    except TypeError:
        return original(self, *args, **kwargs)  # which names the function in its own TypeError
    arguments.pop("self")
    require_applied()
    arguments = defaults.fill(arguments)
    refusals.check(arguments, config, os.environ)
    setattr(self, ATTRIBUTE, config)
    original(self, **arguments)
    refusals.check(vars(self), config, os.environ)


def check_model_config(result: Any, self: Any) -> None:
    """After `ServerArgs.get_model_config`: the first moment at which the model is known.

    Later ones are too late: SGLang's own checks on hybrid models end in a traceback before.
    """
    if spherical_config(self) is not None:
        from sglang_spherical.model_support import check_model

        check_model(result)
