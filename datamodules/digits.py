"""Handwritten digits: 1,797 real images that come with scikit-learn, so nothing has to be downloaded."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from datamodules.loading import InMemoryData, Rows, require_at_least


class DigitsData(InMemoryData):
    """scikit-learn's 8x8 digits; batches `{"inputs": float32 [N, 1, 8, 8], "labels": int64 [N]}`, labels 0 to 9.

    Images are split once, with the classes in equal shares, by `split_seed`; pixels are scaled so that the training
    images have mean 0 and standard deviation 1 over all pixels together. The test images serve for validation too: they
    choose nothing here, neither the epoch to stop at nor any setting.

    Args:
        batch_size: training images per batch and process.
        test_fraction: share of the images that are held out, in (0, 1).
        seed: of the order of the training images; None: that of `seed_everything`, or 0.
        split_seed: of the split. Leave it alone, or a target has seen the images that it is measured on.

    Raises:
        ValueError: one line, if a value is outside its range.
    """

    def __init__(
        self, batch_size: int = 64, test_fraction: float = 0.2, seed: int | None = None, split_seed: int = 0
    ) -> None:
        super().__init__(batch_size, seed)
        require_at_least(0, split_seed=split_seed)
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction: found {test_fraction}, allowed are numbers in (0, 1)")
        self.test_fraction = test_fraction
        self.split_seed = split_seed

    def setup(self, stage: str | None = None) -> None:
        digits = load_digits()
        train, test = train_test_split(
            range(len(digits.target)),
            test_size=self.test_fraction,
            random_state=self.split_seed,
            stratify=digits.target,
        )
        images = torch.from_numpy(digits.images).float().unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        images = (images - images[train].mean()) / images[train].std()
        self.train = Rows(inputs=images[train], labels=labels[train])
        self.validation = self.test = Rows(inputs=images[test], labels=labels[test])
