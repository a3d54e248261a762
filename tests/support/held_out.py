"""A training set with a set that was not trained on."""

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader


class TrainAndTest(LightningDataModule):
    """Loaders of two data sets."""

    def __init__(self, train, test, batch_size=32):
        super().__init__()
        self.train, self.test, self.batch_size = train, test, batch_size

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test, self.batch_size)
