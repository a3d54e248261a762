"""What loggers get: a few numbers, and curves as pictures and tables after validation runs."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger
from support.networks import small_mlp
from support.trainers import quiet_trainer

from lightning_vr import DiffusionModule, GradientVariance, TargetVariance, TaylorCV
from lightning_vr.data import EightGaussians
from lightning_vr.lifecycle.loggers import markdown_table, shows_pictures

pytestmark = pytest.mark.usefixtures("no_pictures")

CURVES = ("target_variance", "excess_loss", "gradient_variance")


class Recorder(Logger):
    """Keeps what it is given, as a list of (kind, name, step, content)."""

    name, version, save_dir = "recorder", 0, None

    def __init__(self):
        super().__init__()
        self.events = []

    def log_metrics(self, metrics, step=None):
        self.events += [("number", name, step, value) for name, value in metrics.items()]

    def log_hyperparams(self, *args, **kwargs):
        pass

    def of(self, kind, name):
        return [(step, content) for k, n, step, content in self.events if (k, n) == (kind, name)]


class Tables(Recorder):
    """Shows pictures and tables as the logger of Weights & Biases does."""

    def log_image(self, key, images, step=None):
        self.events.append(("picture", key, step, images))

    def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
        self.events.append(("table", key, step, (columns, data)))


class Texts(Recorder):
    """Shows pictures and text as the logger of TensorBoard does."""

    @property
    def experiment(self):
        return SimpleNamespace(add_image=self.add_image, add_text=self.add_text)

    def add_image(self, tag, pixels, step, dataformats):
        self.events.append(("picture", tag, step, pixels))

    def add_text(self, tag, text, step):
        self.events.append(("table", tag, step, text))


def fit(folder, logger, control_variate=None, **options):
    trainer = quiet_trainer(
        TargetVariance([4], noise_levels=3, samples=64),
        GradientVariance(every_n_steps=2, samples=2, noise_levels=2),
        logger=logger,
        default_root_dir=folder,
        **({"max_steps": 14, "log_every_n_steps": 1} | options),
    )
    data = EightGaussians(8, num_samples=40, num_validation=8)
    trainer.fit(DiffusionModule(small_mlp(), control_variate=control_variate), data)
    return trainer


@pytest.mark.parametrize("kind", [Tables, Texts])
def test_curves_are_shown_after_each_validation_run_and_at_the_end(tmp_path, kind):
    logger = kind()
    fit(tmp_path, logger)
    for name in CURVES:
        steps = [0] if name == "target_variance" else [5, 10, 14]
        assert [step for step, _ in logger.of("picture", name)] == steps
        assert [step for step, _ in logger.of("table", f"{name}_table")] == steps


def test_a_validation_run_at_the_end_does_not_show_them_twice(tmp_path):
    logger = Tables()
    fit(tmp_path, logger, max_steps=10)
    assert [step for step, _ in logger.of("picture", "excess_loss")] == [5, 10]


def test_without_validation_they_are_shown_at_the_end(tmp_path):
    logger = Tables()
    fit(tmp_path, logger, limit_val_batches=0)
    for name in ("excess_loss", "gradient_variance"):
        assert [step for step, _ in logger.of("picture", name)] == [14]


def test_a_validation_run_of_its_own_shows_nothing(tmp_path):
    logger = Tables()
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
        "excess_loss/total",
        "irreducible_loss/total",
        "target_variance/dsm_total",
        "target_variance/removed_fraction",
        "control_variate/reduction",
        *(f"gradient_variance/{name}" for name in (*components, *ratios)),
    }
    assert {name.split("/")[0] for name in names} == {
        *CURVES,
        "irreducible_loss",
        "control_variate",
    }


@pytest.mark.parametrize("kind", [Tables, Texts])
def test_tables_hold_the_rows_of_the_last_event(tmp_path, kind):
    logger = kind()
    trainer = fit(tmp_path, [CSVLogger(tmp_path, name="", version=""), logger])
    _, content = logger.of("table", "excess_loss_table")[-1]
    lines = (tmp_path / "excess_loss.csv").read_text().splitlines()
    header, *rows = [line.split(",") for line in lines]
    last = [row[1:] for row in rows if row[0] == str(trainer.global_step)]
    if kind is Tables:
        columns, data = content
        assert columns == header[1:]
        assert [[str(x) for x in row] for row in data] == [
            [x.replace("nan", "None") for x in row] for row in last
        ]
    else:
        lines = content.splitlines()
        assert lines[0] == f"| {' | '.join(header[1:])} |"
        assert len(lines) == 2 + len(last)
        assert f"| {float(last[-1][0]):.4g} | {float(last[-1][1]):.4g} |" in lines[-1]


def test_a_table_of_a_control_variate_comes_less_and_less_often(tmp_path):
    logger = Tables()
    control = TaylorCV(bins=2, gate="open", refit_every_n_steps=1)
    fit(tmp_path, logger, control, max_steps=10)
    steps = [step for step, _ in logger.of("table", "control_variate_table")]
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


class Unreachable(Tables):
    """A logger that gives no experiment once training has begun."""

    @property
    def experiment(self):
        if self.events:
            raise ConnectionError("no route")


@pytest.mark.filterwarnings("ignore:.*could not be written")
def test_a_logger_without_an_experiment_keeps_no_other_from_showing(tmp_path):
    good = Tables()
    fit(tmp_path, [Unreachable(), good])
    assert [step for step, _ in good.of("picture", "excess_loss")] == [5, 10, 14]
