"""What loggers get: a few numbers, and curves as pictures and tables after validation runs."""

import csv
import io
from types import SimpleNamespace

import pytest
import torch
import wandb
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from support.networks import small_mlp
from support.trainers import quiet_trainer
from torch.utils.data import DataLoader

from lightning_vr import Convergence, DiffusionModule, GradientVariance, TargetVariance, TaylorCV
from lightning_vr.data import EightGaussians
from lightning_vr.lifecycle import loggers
from lightning_vr.lifecycle.loggers import log_numbers, log_table, markdown_table, shows_pictures

pytestmark = pytest.mark.usefixtures("no_pictures_in_module")

CURVES = ("target_variance", "convergence", "gradient_variance")


class Recorder(Logger):
    """Keeps what it is given, as a list of (kind, name, step, content)."""

    name, version, save_dir = "recorder", 0, None

    def __init__(self):
        Logger.__init__(self)
        self.events = []

    def log_metrics(self, metrics, step=None):
        self.events += [("number", name, step, value) for name, value in metrics.items()]

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_graph(self, *args):
        pass

    def finalize(self, status):
        pass

    def save(self):
        pass

    def of(self, kind, name):
        return [(step, content) for k, n, step, content in self.events if (k, n) == (kind, name)]


class Wandb(Recorder, WandbLogger):
    """The logger of Weights & Biases on a run that keeps each call."""

    def __init__(self):
        super().__init__()
        self.calls, self.defined = [], {}

    @property
    def experiment(self):
        return SimpleNamespace(define_metric=self.define)

    def define(self, name, **settings):
        self.defined[name] = settings

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, set(metrics)))
        for name, value in metrics.items():
            if isinstance(value, wandb.Image):
                self.events.append(("picture", name, step, value))
            elif isinstance(value, wandb.Table):
                self.events.append(("table", name, step, (value.columns, value.data)))
            else:
                self.events.append(("number", name, step, value))


class TensorBoard(Recorder, TensorBoardLogger):
    """The logger of TensorBoard on a writer that keeps what it is given."""

    log_dir = None

    @property
    def experiment(self):
        return SimpleNamespace(add_image=self.add_image, add_text=self.add_text)

    def add_image(self, tag, pixels, step, dataformats):
        assert (pixels.ndim, pixels.shape[2], dataformats) == (3, 3, "HWC")
        self.events.append(("picture", tag, step, pixels))

    def add_text(self, tag, text, step):
        columns, _, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
        ]
        self.events.append(("table", tag, step, (columns, rows)))


class MLflow(Recorder, MLFlowLogger):
    """The logger of MLflow on a client that keeps what it is given."""

    run_id = "run"

    @property
    def experiment(self):
        return SimpleNamespace(log_image=self.log_image, log_text=self.log_text)

    def log_image(self, run_id, image, *, key, step):
        assert (run_id, image.mode) == ("run", "RGB")
        self.events.append(("picture", key, step, image))

    def log_text(self, run_id, text, artifact_file):
        name, file = artifact_file.rsplit("/", 1)
        columns, *rows = csv.reader(io.StringIO(text))
        self.events.append(("table", name, int(file[5:-4]), (columns, rows)))


KINDS = [Wandb, TensorBoard, MLflow]


def fit(folder, logger, control_variate=None, **options):
    trainer = quiet_trainer(
        TargetVariance([4], noise_levels=3, samples=64),
        Convergence(every_n_steps=2, noise_levels=3, samples=16),
        GradientVariance(every_n_steps=2, samples=2, noise_levels=2),
        logger=logger,
        default_root_dir=folder,
        **({"max_steps": 14, "log_every_n_steps": 1} | options),
    )
    data = EightGaussians(8, num_samples=40, num_validation=8)
    trainer.fit(DiffusionModule(small_mlp(), control_variate=control_variate), data)
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shown")


@pytest.fixture(scope="module")
def shown(folder):
    """What a logger of each kind got of one run, by kind."""
    of_kinds = {kind: kind() for kind in KINDS}
    fit(folder, [CSVLogger(folder, name="", version=""), *of_kinds.values()])
    return of_kinds


@pytest.mark.parametrize("kind", KINDS)
def test_curves_are_shown_after_each_validation_run_and_at_the_end(shown, kind):
    logger = shown[kind]
    for name in CURVES:
        steps = [0] if name == "target_variance" else [4, 9, 14]
        assert [step for step, _ in logger.of("picture", f"{name}/picture")] == steps
        assert [step for step, _ in logger.of("table", f"{name}/table")] == steps
    assert [step for step, _ in logger.of("number", "val/loss")] == [4, 9]


def test_a_validation_run_at_the_end_does_not_show_them_twice(tmp_path):
    logger = Wandb()
    fit(tmp_path, logger, max_steps=10)
    assert [step for step, _ in logger.of("picture", "convergence/picture")] == [4, 9]


def test_without_validation_they_are_shown_at_the_end(tmp_path):
    logger = Wandb()
    fit(tmp_path, logger, limit_val_batches=0)
    for name in ("convergence", "gradient_variance"):
        assert [step for step, _ in logger.of("picture", f"{name}/picture")] == [14]


def test_a_validation_run_of_its_own_shows_nothing(tmp_path):
    logger = Wandb()
    trainer = fit(tmp_path, CSVLogger(tmp_path))
    trainer.loggers = [logger]
    trainer.validate(trainer.lightning_module, datamodule=trainer.datamodule, verbose=False)
    assert {kind for kind, *_ in logger.events} == {"number"}


def test_numbers_are_those_of_a_table_of_a_few_columns(tmp_path):
    logger = Recorder()
    fit(tmp_path, logger, TaylorCV(bins=4, gate="open", refit_every_n_steps=5))
    names = {name for _, name, *_ in logger.events} - {"epoch", "train/loss", "val/loss"}
    components = ("data", "timestep", "noise", "total", "squared_mean")
    ratios = ("signal_to_noise", "noise_scale")
    assert names <= {
        *(f"convergence/{name}" for name in ("loss", "floor", "excess", "held_out")),
        "control_variate/reduction",
        *(f"gradient_variance/{name}" for name in (*components, *ratios)),
    }
    kinds = {name.split("/")[0] for name in names}
    assert kinds == {"convergence", "gradient_variance", "control_variate"}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_hold_the_rows_of_the_last_event(folder, shown, kind):
    step, (columns, table) = shown[kind].of("table", "convergence/table")[-1]
    lines = (folder / "convergence.csv").read_text().splitlines()
    header, *rows = [line.split(",") for line in lines]
    last = [row[1:] for row in rows if row[0] == str(step)]
    assert columns == header[1:]
    numbers = [
        [float(cell or "nan") if cell is not None else float("nan") for cell in row]
        for row in table
    ]
    expected = [[float(cell) for cell in row] for row in last]
    torch.testing.assert_close(
        torch.tensor(numbers), torch.tensor(expected), rtol=5e-4, atol=0, equal_nan=True
    )


def test_a_picture_and_its_table_are_one_row_of_the_history(shown):
    calls = shown[Wandb].calls
    together = [(step, names) for step, names in calls if "convergence/picture" in names]
    assert together == [(s, {"convergence/picture", "convergence/table"}) for s in (4, 9, 14)]


def test_a_page_knows_the_step_and_the_smallest_value_of_what_should_be_small(tmp_path):
    logger = Wandb()
    fit(tmp_path, logger, max_steps=2, limit_val_batches=1, callbacks=[OfCallback()])
    assert {each["step_metric"] for each in logger.defined.values()} == {"trainer/global_step"}
    small = {name for name, each in logger.defined.items() if each.get("summary") == "last,min"}
    assert {"val/loss", "convergence/excess", *OfCallback.logged} <= small
    assert [name for name, each in logger.defined.items() if each.get("hidden")] == ["epoch"]


class TwoOptimizers(LightningModule):
    """Steps two optimizers in each batch, and logs a number of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1)

    def configure_optimizers(self):
        return [torch.optim.SGD([each]) for each in self.layer.parameters()]

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.layer(batch).sum())
        for optimizer in self.optimizers():
            optimizer.step()
        self.log("own", 1.0)


class OfCallback(Callback):
    logged = ("frechet_distance/identity_n20",)

    def on_train_batch_end(self, trainer, *_):
        log_numbers(trainer, {"of_callback": 1.0})


def test_numbers_stand_at_the_step_of_the_modules_own_with_two_optimizers_too():
    logger = Recorder()
    trainer = quiet_trainer(OfCallback(), logger=logger, max_epochs=1, log_every_n_steps=1)
    trainer.fit(TwoOptimizers(), DataLoader(torch.ones(3, 1)))
    assert trainer.global_step == 6
    steps = [step for step, _ in logger.of("number", "own")]
    assert steps == [step for step, _ in logger.of("number", "of_callback")] == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_cell_among_numbers_is_shown_as_one(kind):
    logger = kind()
    trainer = quiet_trainer(logger=logger)
    rows = [["kid", 0.5, ""], ["bits", 3.0, 0.25], ["recall", float("inf"), 0.5]]
    log_table(trainer, "evaluation", ["measure", "value", "error"], rows)
    ((_, (_, table)),) = logger.of("table", "evaluation/table")
    assert [[cell in ("", None) for cell in row[1:]] for row in table] == [
        [False, True],
        [False, False],
        [True, False],
    ]


def test_of_a_logger_that_shows_no_tables_it_is_said_once(monkeypatch):
    said = []
    loggers._tell_files_only.cache_clear()
    monkeypatch.setattr(loggers, "rank_zero_info", said.append)
    for logger in (Recorder(), Recorder(), CSVLogger("unused")):
        log_table(quiet_trainer(logger=logger), "samples", ["x"], [[1.0]])
    (message,) = said
    assert message.startswith("Recorder shows no pictures and tables")


def test_a_table_of_a_control_variate_comes_less_and_less_often(tmp_path):
    logger = Wandb()
    control = TaylorCV(bins=2, gate="open", refit_every_n_steps=1)
    fit(tmp_path, logger, control, max_steps=10)
    steps = [step for step, _ in logger.of("table", "control_variate/table")]
    assert steps == [0, 1, 3, 7]


def test_a_logger_of_numbers_alone_makes_no_picture_before_the_end(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: drawn.append(1))
    trainer = fit(tmp_path, CSVLogger(tmp_path, name="", version=""))
    assert not shows_pictures(trainer)
    assert len(drawn) == len(CURVES)


def test_a_number_that_is_not_finite_is_an_empty_cell():
    text = markdown_table(["of", "value", "count"], [["all", None, 3], ["net", 0.123456, 4]])
    assert text.splitlines()[2:] == ["| all |  | 3 |", "| net | 0.1235 | 4 |"]


class Unreachable(TensorBoard):
    """A logger that gives no experiment once training has begun."""

    @property
    def experiment(self):
        if self.events:
            raise ConnectionError("no route")


@pytest.mark.filterwarnings("ignore:.*could not be written")
def test_a_logger_without_an_experiment_keeps_no_other_from_showing(tmp_path):
    good = Wandb()
    fit(tmp_path, [Unreachable(), good])
    assert [step for step, _ in good.of("picture", "convergence/picture")] == [4, 9, 14]
