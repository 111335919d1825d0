"""Small convolutional networks for 8x8 images of handwritten digits: the smallest real models with convolutions."""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from l3d_pl.errors import L3DError


class DigitsCNN(nn.Module):
    """Convolutions (3x3, batch norm, ReLU; 2x2 max pooling after the first two) and two linear layers, 10 classes.

    Layers `conv1`, `bn1`, `conv2`, `bn2`, ... (convolutions have no bias, batch norm has), `fc1`, `fc2` (with biases).
    No operation works in place and none depends on the size of the batch, in eval mode.

    Args:
        channels: of the convolutions, two or more.
        hidden: length of the layer between the linear ones.

    Raises:
        L3DError: fewer than two convolutions.
    """

    def __init__(self, channels: tuple[int, ...] = (16, 32), hidden: int = 64) -> None:
        super().__init__()
        if len(channels) < 2:
            raise L3DError(f"channels: found {len(channels)}, at least 2 are needed")
        self.depth = len(channels)
        for i, (before, after) in enumerate(pairwise((1, *channels)), 1):
            setattr(self, f"conv{i}", nn.Conv2d(before, after, 3, padding=1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(after))
        self.fc1 = nn.Linear(channels[-1] * 2 * 2, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 1, 8, 8] -> logits [N, 10]."""
        code = images
        for i in range(1, self.depth + 1):
            code = relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(code)))
            code = max_pool2d(code, 2) if i <= 2 else code
        return self.fc2(relu(self.fc1(code.flatten(1))))
