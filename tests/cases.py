"""What the tests are parametrised over."""

import torch

BACKENDS = ("native", "reference")

# Around every width of a vector (4 .. 64 elements), and of a block of half-precision work (1024).
SIZES = (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1003, 1023, 1024, 1025)

# Around a thread's chunk of 1 << 14 elements.
CHUNK_SIZES = (16383, 16384, 16385, 40001)

# torch.optim.SGD's own options, each alone and together.
SGD_OPTIONS = {
    "plain": {},
    "weight_decay": {"weight_decay": 1e-2},
    "maximize": {"maximize": True, "weight_decay": 1e-2},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "negative_dampening": {"momentum": 0.5, "dampening": -0.5, "weight_decay": 1e-3},
    "momentum_weight_decay": {"momentum": 0.9, "weight_decay": 5e-4},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov_weight_decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "all": {"momentum": 0.8, "dampening": 0.1, "weight_decay": 1e-2, "maximize": True},
    "nesterov_maximize": {
        "momentum": 0.7,
        "nesterov": True,
        "weight_decay": 1e-2,
        "maximize": True,
    },
}

# And those that only FusedSGDR has, which the reference defines.
OWN_OPTIONS = {
    "decoupled": {"weight_decay": 1e-2, "decoupled_weight_decay": True},
    "decoupled_nesterov": {
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-2,
        "decoupled_weight_decay": True,
    },
    "reset_momentum": {"momentum": 0.9, "reset_momentum": True},
}

ANY_OPTIONS = SGD_OPTIONS | OWN_OPTIONS

FULL_PRECISION = (torch.float32, torch.float64)
HALF_PRECISION = (torch.float16, torch.bfloat16)


def _every_second(x):
    part = x.new_full([*x.shape[:3], 2 * x.shape[3]], -7)[..., ::2]
    part.copy_(x)
    return part


def _cropped(x):
    part = x.new_full([n + 1 for n in x.shape], -7)[1:, :-1, 1:, :-1]
    part.copy_(x)
    return part


def _misaligned(x):
    room = x.new_full([x.numel() + 3], -7)
    part = room[3:].view(x.shape)
    part.copy_(x)
    return part


# Layouts of a parameter or gradient, each as a function of a tensor of four dimensions that keeps
# the values.
LAYOUTS = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "every_second": _every_second,
    "cropped": _cropped,
    "misaligned": _misaligned,
}
