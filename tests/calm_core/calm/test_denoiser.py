"""What a denoiser is told of the time."""

import numpy as np
import torch

from calm_core.calm.denoiser import time_features


def test_time_features_in_closed_form() -> None:
    times = np.array([[0, 1], [37, 999]])
    angles = times[..., None] * 10_000.0 ** (-np.arange(128) / 128)
    expected = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)).float()
    torch.testing.assert_close(time_features(torch.from_numpy(times)), expected, rtol=0, atol=2e-4)
