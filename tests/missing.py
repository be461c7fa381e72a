"""What a test needs that is not installed, and the command that installs it."""

import re
import warnings
from contextlib import contextmanager

import pytest

from sgdr_fused import native

# The extra of pyproject.toml that brings a module.
EXTRAS = {
    **dict.fromkeys(("expecttest", "hypothesis", "matplotlib", "numpy", "sklearn"), "test"),
    **dict.fromkeys(("keras", "optax"), "peers"),
    **dict.fromkeys(
        ("accelerate", "lightning", "tensorboard", "torchmetrics", "transformers"), "trainers"
    ),
    **dict.fromkeys(("furo", "latex2mathml", "myst_parser", "sphinx", "sphinx_copybutton"), "docs"),
}
# Their dependencies would bring another torch.
_ALONE = ("timm", "torchvision")

# What Python and pytest say, up to the dot before a submodule.
_MODULE = re.compile(r"(?:No module named|could not import) '(\w+)")


def how_to_install(reason):
    """The command that installs the module that a message names; an empty string if none does."""
    for module in _MODULE.findall(reason):
        if module in EXTRAS:
            return f'pip install ".[{EXTRAS[module]}]"'
        if module in _ALONE:
            return f"pip install --no-deps {' '.join(_ALONE)}"
    return ""


def with_advice(reason):
    """The reason of a skip, with the command that would let the test run."""
    command = how_to_install(reason)
    return f"{reason}; run: {command}" if command and command not in reason else reason


@contextmanager
def skipped_where_something_is_missing():
    """Skips a test that fails for want of the native backend or of an optional module.

    Without the native backend the reference serves ``backend="auto"``, without its warning.
    """
    if native.why_missing:
        warnings.filterwarnings("ignore", ".*" + re.escape(native.why_missing))
    try:
        yield
    except pytest.skip.Exception as skipped:
        skipped.msg = with_advice(skipped.msg or "")
        raise
    except ModuleNotFoundError as error:
        reason = f"No module named '{error.name}'"  # the message may be our own
        if not how_to_install(reason):
            raise
        _skip(with_advice(reason), error)
    except Exception as error:
        if not native.why_missing or native.why_missing not in str(error):
            raise
        _skip(native.why_missing, error)


def _skip(reason, error):
    raise pytest.skip.Exception(reason, _use_item_location=True) from error


def skip_module_where_something_is_missing(report):
    """The same for the report of a test file that could not be imported; changes it."""
    if report.outcome == "skipped":
        path, line, reason = report.longrepr
        report.longrepr = (path, line, with_advice(reason))
    elif report.outcome == "failed":
        cause = report.call.excinfo.value.__cause__
        if isinstance(cause, ModuleNotFoundError) and how_to_install(str(cause)):
            report.outcome = "skipped"
            report.longrepr = (report.fspath, 0, with_advice(str(cause)))
