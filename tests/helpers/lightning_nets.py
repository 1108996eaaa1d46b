"""A LightningModule, data and callbacks that the tests of the callback share."""

import torch
from lightning_package import callbacks as C
from lightning_package import pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from qat import QATCallback
from qat.core.quantizer import quantizers

IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(48) % 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + x)


def make_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Lit(pl.LightningModule):
    """Records the order in which batches arrive."""

    def __init__(self, model=None):
        super().__init__()
        if model is None:
            torch.manual_seed(0)
            model = make_net()
        self.model = model
        self.accuracy = MulticlassAccuracy(4)
        self.seen = []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(y.tolist())
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)}


def loader(shuffle=True, **options):
    return DataLoader(TensorDataset(IMAGES, LABELS), 8, shuffle=shuffle, **options)


def make_trainer(*callbacks, epochs=1, **options):
    pl.seed_everything(3, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "devices": 1, **quiet}
    return pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**defaults, **options})


def callback(config=None, **options):
    return QATCallback(config, calibration={"batches": 3, "progress": False}, **options)


def fit(lit, *callbacks, ckpt_path=None, **options):
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(lit, loader(), loader(False), ckpt_path=ckpt_path)
    return trainer


def ranges(model):
    return {name: site.amax.clone() for name, site in quantizers(model)}


class Spy(pl.Callback):
    """Runs a function at one hook."""

    def __init__(self, hook, function):
        setattr(self, hook, lambda trainer, module, *_: function(trainer, module))


def checkpoints(folder):
    return C.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)


def outputs(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


class Order(Lit):
    """Remembers the first image of each batch."""

    def __init__(self):
        super().__init__()
        self.order = []

    def training_step(self, batch, batch_idx):
        x, y = batch["a"] if isinstance(batch, dict) else batch
        self.order.append(x[0].sum().item())
        return nn.functional.cross_entropy(self.model(x), y)


class Whole(pl.LightningModule):
    """Layers and an Add of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = torch.relu(self.b(x) + x)
        return self.head(torch.relu(self.c(x) + x).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)
