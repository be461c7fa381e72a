"""The table of bad input: which values each argument takes, and calls that are wrong.

``docs/errors.md`` shows it. After a change here, or of a range in sgdr_fused/options.py, run
``PYTHONPATH=. python tests/bad_input.py`` to write the page anew; a test compares the two.
"""

import decimal
from pathlib import Path

import numpy as np
import torch

from sgdr_fused import (
    CosineWarmRestarts,
    EmaSchedule,
    FusedSGDR,
    fit_T_0,
    lr_range_test,
    plot_schedule,
)
from sgdr_fused.options import OPTIONS
from sgdr_fused.trainers import as_scheduler

PAGE = Path(__file__).parent.parent / "docs" / "errors.md"

VALUES = {
    "None": None,
    "True": True,
    "0": 0,
    "1": 1,
    "-1": -1,
    "2**53": 2**53,
    "2**63": 2**63,
    "2**70": 2**70,
    "10**400": 10**400,
    "10**5000": 10**5000,
    "0.5": 0.5,
    "2.5": 2.5,
    "10.0": 10.0,
    "-0.1": -0.1,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "1j": 1j,
    '""': "",
    '"0.1"': "0.1",
    '"False"': "False",
    'b"1"': b"1",
    "[0.1]": [0.1],
    "{}": {},
    "...": ...,
    "range(3)": range(3),
    "Decimal(1)": decimal.Decimal(1),
    "torch.int8": torch.int8,
    "torch.ones(2)": torch.ones(2),
    "torch.ones(0)": torch.ones(0),
    "torch.tensor(nan)": torch.tensor(float("nan")),
    "torch.tensor(1j)": torch.tensor(1j),
    'torch.ones((), device="meta")': torch.ones((), device="meta"),
    "np.float32(nan)": np.float32("nan"),
    "np.ones(2)": np.ones(2),
    "np.datetime64(0, 's')": np.datetime64(0, "s"),
}
"""The values that each argument is given, as Python writes them."""

_AT_LEAST_0 = {"0", "1", "2**53", "2**63", "2**70", "0.5", "2.5", "10.0"}
_FLAG = {"True", "0", "1"}

RIGHT = {
    "lr": _AT_LEAST_0,
    "momentum": _AT_LEAST_0,
    "dampening": _AT_LEAST_0 | {"-1", "-0.1"},
    "weight_decay": _AT_LEAST_0,
    "nesterov": _FLAG,
    "T_0": {"1", "2**53"},
    "T_mult": _AT_LEAST_0 - {"0", "0.5"},
    "eta_min": _AT_LEAST_0,
    "steps_per_epoch": {"1", "2**53"},
    "anneal": set(),
    "warmup_steps": {"0", "1", "2**53"},
    "warmup_start_lr": _AT_LEAST_0,
    "cycle_decay": {"0", "0.5", "1"},
    "n_cycles": {"None", "1", "2**53"},
    "reset_momentum": _FLAG,
    "maximize": _FLAG,
    "decoupled_weight_decay": _FLAG,
    "max_grad_norm": {"None", "inf"} | _AT_LEAST_0 - {"0"},
    "skip_nonfinite": _FLAG,
    "ema_decay": {"None", "0", "0.5"},
    "momentum_dtype": {"None"},
    "stochastic_rounding": _FLAG,
    "master_weights": _FLAG,
    "seed": {"0", "1", "2**53", "2**63"},
    "backend": set(),
}
"""Which of them each argument takes. Any other is a ValueError that names argument and value."""

RIGHT_IN_GROUP = {
    "initial_lr": _AT_LEAST_0,
    "step": {"0", "1", "2**53"},
    "cycle": {"0", "1", "2**53"},
    "T_cur": {"0", "1", "2**53", "-1"},
    "T_i": {"1", "2**53"},
    "skipped_steps": {"0", "1", "2**53"},
}
"""The same for the other entries of a param group."""


def wrong_values(right):
    """The labels and values that are not right."""
    return [(label, value) for label, value in VALUES.items() if label not in right]


def _in_new_group(params):
    return lambda optimizer: optimizer.add_param_group({"params": params})


def _sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)


def _from_pair(**options):
    sgd = _sgd()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(sgd, T_0=10)
    return FusedSGDR.from_pair(sgd, scheduler, **options)


_ONE = torch.nn.Parameter(torch.ones(3))
_SCHEDULE = CosineWarmRestarts(lr=0.1, T_0=10)
_MODEL = torch.nn.Linear(2, 2)

CALLS = [
    # what a user writes, the call, the error, a part of its text
    ("FusedSGDR(None, T_0=10)", lambda o: FusedSGDR(None, T_0=10), TypeError,
     "params must be an iterable of tensors, but is None (NoneType)"),
    ("FusedSGDR(model, T_0=10)", lambda o: FusedSGDR(torch.nn.Linear(2, 2), T_0=10), TypeError,
     "(Linear)"),
    ('FusedSGDR("weight", T_0=10)', lambda o: FusedSGDR("weight", T_0=10), TypeError,
     "must be a tensor or a pair of name and tensor, but is 'w' (str)"),
    ("FusedSGDR([param], lr=0.1)", lambda o: FusedSGDR([_ONE], lr=0.1), TypeError,
     "FusedSGDR needs T_0, the length of the first cycle: pass T_0=..., or set it in each"),
    ("FusedSGDR([param], T_0=10, ema_decay=lambda step: 2)",
     lambda o: FusedSGDR([_ONE], T_0=10, ema_decay=lambda step: 2), ValueError,
     "Invalid ema_decay(0) value: 2; ema_decay(0) must be a float from 0 to 1"),
    ("FusedSGDR([], T_0=10)", lambda o: FusedSGDR([], T_0=10), ValueError, "empty parameter list"),
    ("optimizer.add_param_group(None)", lambda o: o.add_param_group(None), TypeError,
     "param_group must be a dict, but is None (NoneType)"),
    ("optimizer.add_param_group([param])", lambda o: o.add_param_group([_ONE]), TypeError,
     "param_group must be a dict"),
    ("optimizer.add_param_group({})", lambda o: o.add_param_group({}), ValueError,
     'param_groups[2]["params"] is missing'),
    ('optimizer.add_param_group({"params": None})', _in_new_group(None), TypeError,
     'param_groups[2]["params"] must be an iterable of tensors, but is None (NoneType)'),
    ('optimizer.add_param_group({"params": 3})', _in_new_group(3), TypeError, "but is 3 (int)"),
    ('optimizer.add_param_group({"params": {param}})', _in_new_group({_ONE}), TypeError,
     "ordered collections"),
    ('optimizer.add_param_group({"params": [(param,)]})', _in_new_group([(_ONE,)]), TypeError,
     "pair of name and tensor"),
    ('optimizer.add_param_group({"params": [param, param]})', _in_new_group([_ONE, _ONE]),
     ValueError, "params[0] and params[1] are one tensor"),
    ('optimizer.add_param_group({"params": [("new", param)], "max_grad_norm": 2.0})',
     lambda o: o.add_param_group({"params": [("new", _ONE)], "max_grad_norm": 2.0}), ValueError,
     "max_grad_norm=2.0, which is an option of the whole optimizer"),
    ('optimizer.add_param_group({"params": [("new", param)], "T_Mult": 2})',
     lambda o: o.add_param_group({"params": [("new", _ONE)], "T_Mult": 2}), ValueError,
     "param_groups[2] has 'T_Mult', which is no option; did you mean 'T_mult'?"),
    ("optimizer.seek(-1)", lambda o: o.seek(-1), ValueError, "Invalid step value: -1"),
    ("optimizer.seek(1.5)", lambda o: o.seek(1.5), ValueError, "Invalid step value: 1.5"),
    ("optimizer.seek(True)", lambda o: o.seek(True), ValueError, "Invalid step value: True"),
    ("optimizer.seek(2**63)", lambda o: o.seek(2**63), ValueError,
     "Invalid step value: 9223372036854775808; step must be an integer from 0 to 2**61"),
    ('optimizer.restart(group="a")', lambda o: o.restart(group="a"), ValueError,
     "Invalid group value: 'a'; group must be an integer"),
    ("optimizer.restart(group=2)", lambda o: o.restart(group=2), IndexError,
     "group=2 is out of range: there are 2 param groups, numbered from 0 to 1"),
    ("optimizer.register_restart_hook(3)", lambda o: o.register_restart_hook(3), TypeError,
     "hook must be callable, but is 3"),
    ("optimizer.register_restart_hook(print, group=2.0)",
     lambda o: o.register_restart_hook(print, group=2.0), ValueError, "Invalid group value: 2.0"),
    ("optimizer.load_state_dict(None)", lambda o: o.load_state_dict(None), TypeError,
     "state_dict must be a dict, but is None"),
    ('optimizer.load_state_dict({"model": {}, "optimizer": {}})',
     lambda o: o.load_state_dict({"model": {}, "optimizer": {}}), ValueError,
     "it has the keys ['model', 'optimizer'], but needs"),
    ("optimizer.load_state_dict(adam.state_dict())",
     lambda o: o.load_state_dict(torch.optim.Adam([_ONE]).state_dict()), ValueError, "'betas'"),
    ("CosineWarmRestarts(lr=0.1, T_0=1.5)", lambda o: CosineWarmRestarts(lr=0.1, T_0=1.5),
     ValueError, "Invalid T_0 value: 1.5; T_0 must be an integer from 1 to 2**53"),
    ("CosineWarmRestarts(lr=0.1, T_0=2**40, steps_per_epoch=2**40)",
     lambda o: CosineWarmRestarts(lr=0.1, T_0=2**40, steps_per_epoch=2**40), ValueError,
     "T_0=1099511627776 epochs of steps_per_epoch=1099511627776 are more than 2**53 steps"),
    ("schedule.lr_at(-1)", lambda o: _SCHEDULE.lr_at(-1), ValueError, "Invalid step value: -1"),
    ("schedule.cycle_length(-1)", lambda o: _SCHEDULE.cycle_length(-1), ValueError,
     "Invalid cycle value: -1"),
    ("schedule.cycle_start(0.5)", lambda o: _SCHEDULE.cycle_start(0.5), ValueError,
     "Invalid cycle value: 0.5"),
    ("schedule.restarts(2**40)", lambda o: _SCHEDULE.restarts(2**40), ValueError,
     "has 109951162777 restarts, too many for a list"),
    ('schedule.restarts("100")', lambda o: _SCHEDULE.restarts("100"), ValueError,
     "Invalid total_steps value: '100'"),
    ("fit_T_0(nan, 2)", lambda o: fit_T_0(float("nan"), 2), ValueError,
     "Invalid total_steps value: nan"),
    ("fit_T_0(90, 2.5)", lambda o: fit_T_0(90, 2.5), ValueError, "Invalid n_cycles value: 2.5"),
    ("fit_T_0(90, 2, T_mult=0.5)", lambda o: fit_T_0(90, 2, 0.5), ValueError,
     "Invalid T_mult value: 0.5"),
    ("plot_schedule(schedule, 0)", lambda o: plot_schedule(_SCHEDULE, 0), ValueError,
     "Invalid total_steps value: 0"),
    ("FusedSGDR.from_pair(adam, scheduler)",
     lambda o: FusedSGDR.from_pair(torch.optim.Adam([_ONE]), None), TypeError, "got Adam"),
    ("FusedSGDR.from_pair(sgd, None)", lambda o: FusedSGDR.from_pair(_sgd(), None), TypeError,
     "got NoneType"),
    ("FusedSGDR.from_pair(sgd, scheduler, steps_per_epoch=0)",
     lambda o: _from_pair(steps_per_epoch=0), ValueError, "Invalid steps_per_epoch value: 0"),
    ("EmaSchedule(decay=1)", lambda o: EmaSchedule(decay=1), ValueError,
     "Invalid decay value: 1; decay must be a float in [0, 1)"),
    ("EmaSchedule(every=0)", lambda o: EmaSchedule(every=0), ValueError, "Invalid every value: 0"),
    ("lr_range_test(model, sgd, train_step)", lambda o: lr_range_test(_MODEL, _sgd(), len),
     TypeError, "Expected optimizer to be a FusedSGDR, but got SGD"),
    ("lr_range_test(model, optimizer, train_step, lr_start=1, lr_end=0.1)",
     lambda o: lr_range_test(_MODEL, o, len, lr_start=1, lr_end=0.1), ValueError,
     "Expected lr_start < lr_end, but got lr_start=1.0 and lr_end=0.1"),
    ("as_scheduler(sgd)", lambda o: as_scheduler(_sgd()), TypeError, "got a SGD"),
]  # fmt: skip
"""Other wrong calls; each gets an optimizer of two groups."""


def table_of_options():
    """The arguments in Markdown: the range of each, and what it takes of VALUES."""
    lines = ["| argument | must be | takes of these values |", "|---|---|---|"]
    for option in OPTIONS:
        taken = [f"`{label}`" for label in VALUES if label in RIGHT[option.name]]
        lines.append(f"| `{option.name}` | {option.range.words} | {', '.join(taken) or 'none'} |")
    return "\n".join(lines)


def list_of_values():
    """VALUES in Markdown."""
    return ", ".join(f"`{label}`" for label in VALUES) + "."


def table_of_calls():
    """CALLS in Markdown."""
    lines = ["| call | error |", "|---|---|"]
    lines += [
        f"| `{call}` | `{error.__name__}`: {_escaped(text)} |" for call, _, error, text in CALLS
    ]
    return "\n".join(lines)


def _escaped(text):
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def page_with_tables(page):
    """The text of the page with each generated part in place."""
    parts = {"values": list_of_values, "options": table_of_options, "calls": table_of_calls}
    for name, text in parts.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        page = before + begin + text() + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text()))
