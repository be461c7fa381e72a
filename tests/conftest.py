"""What the tests are parametrised over, as fixtures."""

import os

import pytest
from cases import ANY_OPTIONS, BACKENDS, FULL_PRECISION, HALF_PRECISION, LAYOUTS, SGD_OPTIONS
from missing import skip_module_where_something_is_missing, skipped_where_something_is_missing

from sgdr_fused import native


def pytest_configure():
    """Fails, instead of skipping most tests, where the native backend is required.

    The Pythons that tests start are not asked for it: some have no native backend, on purpose.
    """
    if os.environ.pop("SGDR_FUSED_NATIVE", "") == "1" and native.extension is None:
        raise pytest.UsageError(f"SGDR_FUSED_NATIVE=1, but {native.why_missing}")


def pytest_collection_modifyitems(items):
    """Skips tests of the native backend if the extension is not built."""
    if native.extension is not None:
        return
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("backend") == "native":
            item.add_marker(pytest.mark.skip(reason=native.why_missing))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Skips a file that imports what is not installed."""
    report = yield
    skip_module_where_something_is_missing(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Skips a test whose fixtures need what is not installed."""
    with skipped_where_something_is_missing():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips a test that needs what is not installed."""
    with skipped_where_something_is_missing():
        return (yield)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The backend that takes the step."""
    return request.param


@pytest.fixture(params=FULL_PRECISION, ids=str)
def dtype(request):
    """Dtypes in which the bits equal the pair's."""
    return request.param


@pytest.fixture(params=HALF_PRECISION, ids=str)
def half_dtype(request):
    """Dtypes in which the bits equal the reference's."""
    return request.param


@pytest.fixture(params=SGD_OPTIONS.values(), ids=SGD_OPTIONS.keys())
def sgd_options(request):
    """Options that the pair also has."""
    return dict(request.param)


@pytest.fixture(params=ANY_OPTIONS.values(), ids=ANY_OPTIONS.keys())
def any_options(request):
    """Options that change the update, our own included."""
    return dict(request.param)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request):
    """Lays a tensor out in memory."""
    return request.param
