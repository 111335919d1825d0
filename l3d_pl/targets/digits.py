"""A small convolutional network for 8x8 images of handwritten digits: the smallest real model with convolutions."""

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu


class DigitsCNN(nn.Module):
    """Two convolutions (3x3, batch norm, ReLU, 2x2 max pooling) and two linear layers, for 8x8 images of 10 classes.

    Layers `conv1`, `bn1`, `conv2`, `bn2` (convolutions have no bias, batch norm has), `fc1`, `fc2` (with biases). No
    operation works in place and none depends on the size of the batch, in eval mode.

    Args:
        channels: of the two convolutions.
        hidden: length of the layer between the linear ones.
    """

    def __init__(self, channels: tuple[int, int] = (16, 32), hidden: int = 64) -> None:
        super().__init__()
        first, second = channels
        self.conv1 = nn.Conv2d(1, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.fc1 = nn.Linear(second * 2 * 2, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 1, 8, 8] -> logits [N, 10]."""
        code = max_pool2d(relu(self.bn1(self.conv1(images))), 2)
        code = max_pool2d(relu(self.bn2(self.conv2(code))), 2)
        return self.fc2(relu(self.fc1(code.flatten(1))))
