"""References that the ranks share out against one process that holds them all."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, Dataset

from lightning_vr.callbacks.target_variance import TargetVariance
from lightning_vr.core.distributed import world_size
from lightning_vr.core.rng import generator
from lightning_vr.core.rows import mapped, tensors
from lightning_vr.core.types import UNLABELLED, Clean, Noised
from lightning_vr.estimators.draws import noise_samples
from lightning_vr.estimators.stf import STF
from lightning_vr.posterior.posterior_mean import Posterior, posterior_mean
from lightning_vr.posterior.references import References
from lightning_vr.posterior.sharded_references import ShardedReferences
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.process.schedules import EDM
from lightning_vr.training.module import DiffusionModule
from lightning_vr.training.reference_bank import _mapped

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

WIDE = torch.float64
COUNT, DIM, QUERIES = 31, 6, 8
# the middle one of three ranks has nothing to ask
SHARES = {2: [slice(0, 3), slice(3, 8)], 3: [slice(0, 3), slice(3, 3), slice(3, 8)]}

# what posterior_mean is asked: noise level, options, element type
CASES = {
    "plain": (1.0, (), WIDE),
    "own": (1.0, ("own",), WIDE),
    "own in place of its copy": (1.0, ("own", "exclude"), WIDE),
    "exclude": (1.0, ("exclude",), WIDE),
    "classes": (1.0, ("group",), WIDE),
    "some dropped": (1.0, ("own", "exclude", "dropped"), WIDE),
    "two labels": (2.0, ("own", "exclude", "labels"), WIDE),
    "chunks": (1.0, ("own", "exclude", "group", "chunks"), WIDE),
    "low noise": (0.02, ("own", "exclude"), WIDE),
    "lower noise without own": (1e-3, (), WIDE),
    "high noise": (100.0, ("own", "exclude"), WIDE),
    "float32": (1.0, ("own", "exclude", "group"), torch.float32),
    "float32 at low noise": (0.3, ("own", "exclude"), torch.float32),
}


def problem(sigma, dtype):
    """Queries with sigma and alpha of their own, made from references far off the origin."""
    source = generator("sharded problem")
    references = 3 + torch.randn(COUNT, DIM, generator=source, dtype=WIDE)
    own = torch.tensor([4, 0, 30, 15, 16, 29, 2, 4])
    alpha = torch.linspace(0.5, 1, QUERIES, dtype=WIDE)
    sigma = sigma * torch.linspace(1, 1.3, QUERIES, dtype=WIDE)
    noise = torch.randn(QUERIES, DIM, generator=source, dtype=WIDE)
    xt = alpha[:, None] * references[own] + sigma[:, None] * noise
    return *(x.to(dtype) for x in (xt, alpha, sigma, references)), own


def labels():
    """Classes of the references, of which class 7 has only one, and a second label."""
    group = torch.arange(COUNT) // 2 % 3
    group[4] = 7
    return group, torch.arange(COUNT) % 2


def posterior_of(case, rows, share=slice(None), prepare=References.prepare):
    """The posterior for some of the queries; ``prepare`` gets ``share`` of the references."""
    sigma, options, dtype = CASES[case]
    xt, alpha, sigma, references, own = problem(sigma, dtype)
    group, second = labels()
    given = {}
    if "own" in options:
        given["own"] = references[own][rows]
    if "exclude" in options:
        given["exclude"] = torch.where(torch.arange(QUERIES) == 1, -1, own)[rows]
    if "chunks" in options:
        given["chunk_size"] = 3
    if "dropped" in options:
        given["query_group"] = torch.where(own % 2 == 0, UNLABELLED, group[own])[rows]
    elif "labels" in options:
        group = torch.stack([group, second], dim=1)
        dropped = torch.where(own[:, None] == 29, UNLABELLED, torch.zeros(1, 2, dtype=torch.int64))
        given["query_group"] = torch.where(dropped == UNLABELLED, dropped, group[own])[rows]
    elif "group" in options:
        given["query_group"] = group[own][rows]
    if "query_group" not in given:
        group = None
    group = None if group is None else group[share]
    prepared = prepare(references[share].clone(), group)
    return posterior_mean(xt[rows], alpha[rows], sigma[rows], prepared, **given)


def at_low_noise(rows, wide, share=slice(None), prepare=References.prepare):
    """Spreads of large samples in float32 or float64, far below where references mix."""
    source = generator("sharded low noise")
    references = torch.randn(40, 64, generator=source)
    xt = (references[:8] + 1.2 * torch.randn(8, 64, generator=source))[rows]
    own, at = references[:8][rows], torch.arange(8)[rows]
    if wide:
        xt, references, own = xt.double(), references.double(), own.double()
    prepared = prepare(references[share].clone())
    return posterior_mean(xt, 1.0, 1.2, prepared, own=own, exclude=at).spread


def of_near_duplicates(rows, wide=False, share=slice(None), prepare=References.prepare, own=True):
    """The posterior at low noise; 2k and 2k + 1 are two sigmas apart, on different ranks."""
    source, sigma = generator("sharded near-duplicates"), 0.002
    x = torch.randn(20, 64, generator=source)
    x = torch.stack([x, x + 2 * sigma / 8 * torch.randn(20, 64, generator=source)], 1).flatten(0, 1)
    at = torch.arange(0, 16, 2)[rows]
    xt = (x[:16:2] + sigma * torch.randn(8, 64, generator=source))[rows]
    if wide:
        xt, x = xt.double(), x.double()
    given = {"own": x[at], "exclude": at} if own else {}
    return posterior_mean(xt, 1.0, sigma, prepare(x[share].clone()), **given)


def stored(x, group):
    """A rank's references in two parts, of which one may be empty."""
    return ShardedReferences.stored([part for part in (x[:11], x[11:]) if len(part) > 0], group)


def error_message(call):
    """The message of the error that a call raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def posteriors(rank):
    """What a rank gets in each case, and facts about the case."""
    ranks = world_size()
    rows, share = SHARES[ranks][rank], slice(rank, None, ranks)
    found = {case: [*posterior_of(case, rows, share, ShardedReferences.prepare)] for case in CASES}
    x = torch.arange(2.0 * COUNT).reshape(COUNT, 2)
    sharded = ShardedReferences.prepare(x[share], x[share, 0])
    subset = sharded.take(torch.tensor([30, 3, 3, 4]))
    found["subset"] = [subset.positions, subset.local.group, torch.tensor(len(subset))]
    found["rows"] = [sharded.rows_at(torch.arange(-1, COUNT)), sharded.local.group]
    found["centre"] = [sharded.local.centre]
    mine = x[share].clone()
    taken = ShardedReferences.prepare(mine, in_place=True)
    found["in place"] = [taken.local.rows, mine, sharded.local.rows]
    nothing = slice(0, 0)
    found["nobody asks"] = [*posterior_of("own", nothing, share, ShardedReferences.prepare)]
    found["spread"] = [at_low_noise(rows, False, share, ShardedReferences.prepare)]
    files = _mapped([x[:5], x[5:6], x[6:]], x[:, 0], sharded=True)
    everything = files.local.take(torch.arange(len(files.local)))
    found["mapped"] = [everything.rows + files.local.centre, files.positions, files.local.group]
    found["stored"] = [*posterior_of("float32", rows, share, stored)]
    for own in (True, False):
        near = of_near_duplicates(rows, False, share, ShardedReferences.prepare, own)
        found[f"near, {own}"] = [*near]
    query = x[:2]
    label = {"query_group": torch.zeros(2, dtype=torch.int64)} if rank == 0 else {}
    messages = [
        error_message(lambda: posterior_mean(query, 1.0, 1.0, sharded, **label)),
        error_message(lambda: ShardedReferences.prepare(x if rank == 0 else x[:3])),
        error_message(lambda: ShardedReferences.prepare(x[: 1 - rank])),
        error_message(lambda: ShardedReferences.stored([x] if rank == 0 else [])),
    ]
    return found, messages


@pytest.fixture(scope="module", params=[2, 3])
def results(on_ranks, request):
    return on_ranks(posteriors, request.param)


@pytest.mark.parametrize("case", CASES)
def test_the_posterior_over_references_on_all_ranks_is_that_of_one_process(results, case):
    whole = posterior_of(case, slice(0, QUERIES))
    tolerance = 1e-10 if CASES[case][2] == WIDE else 1e-5
    parts = zip(*(found[case] for found, _ in results), strict=True)
    for name, part, expected in zip(Posterior._fields, parts, whole, strict=True):
        found = torch.cat(part)
        assert found.dtype == expected.dtype
        scale = 1 + float(whole.log_evidence.abs().max()) if name == "log_evidence" else 1
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)
        assert torch.isfinite(found).all()


def test_stored_references_on_all_ranks_have_the_posterior_of_one_process(results):
    whole = posterior_of("float32", slice(0, QUERIES))
    parts = zip(*(found["stored"] for found, _ in results), strict=True)
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(torch.cat(part), expected, rtol=1e-4, atol=1e-4)


def test_ranks_map_their_own_rows_of_files(results):
    x = torch.arange(2.0 * COUNT).reshape(COUNT, 2)
    for rank, (found, _) in enumerate(results):
        rows, positions, group = found["mapped"]
        assert positions.tolist() == list(range(rank, COUNT, len(results)))
        torch.testing.assert_close(rows, x[positions])
        assert torch.equal(group, x[positions, 0])


def test_the_cases_reach_from_one_reference_to_all_and_hold_an_empty_class_on_a_rank():
    """A class that only one rank has makes all logits of the others -inf."""
    assert float(posterior_of("high noise", slice(0, 8)).ess.min()) > 29
    ess = posterior_of("low noise", slice(0, 8)).ess
    # the second row does not know the position of its copy
    torch.testing.assert_close(ess, torch.tensor([1, 2, 1, 1, 1, 1, 1, 1], dtype=WIDE))
    assert (posterior_of("classes", slice(0, 8)).ess.round() == 1).any()
    assert (labels()[0] == 7).sum() == 1


def test_without_queries_on_any_rank_all_get_empty_results(results):
    shapes = [[0, DIM], [0], [0], [0]]
    for found, _ in results:
        assert [list(x.shape) for x in found["nobody asks"]] == shapes


def test_at_low_noise_the_spread_keeps_its_relative_precision_over_ranks(results):
    wide = at_low_noise(slice(0, 8), wide=True)
    found = torch.cat([found["spread"][0] for found, _ in results]).double()
    assert 0 < float(wide.median()) < 1e-7
    torch.testing.assert_close(found, wide, rtol=1e-4, atol=1e-22)


@pytest.mark.parametrize("own", [True, False])
def test_near_duplicates_on_other_ranks_are_told_apart(results, own):
    wide = of_near_duplicates(slice(0, 8), wide=True, own=own)
    assert float(wide.ess.max()) > 1.2
    found = [torch.cat(x) for x in zip(*(f[f"near, {own}"] for f, _ in results), strict=True)]
    torch.testing.assert_close(found[1].double(), wide.ess, rtol=0, atol=2e-4)
    torch.testing.assert_close(found[2].double(), wide.spread, rtol=1e-3, atol=4e-8)


def test_every_reference_is_on_the_one_rank_that_the_formula_says(results):
    ranks = len(results)
    for rank, (found, _) in enumerate(results):
        row, group = found["rows"]
        assert row[0] == -1
        assert (row[1:] >= 0).tolist() == [p % ranks == rank for p in range(COUNT)]
        assert (2 * (row[1:] * ranks + rank))[rank::ranks].tolist() == group.tolist()
        assert torch.equal(found["centre"][0], torch.tensor([30.0, 31.0]))
        for rows in found["in place"][1:]:
            torch.testing.assert_close(found["in place"][0], rows)


def test_a_subset_stays_on_its_ranks_and_keeps_its_order_and_repetitions(results):
    values = torch.full((4,), -1.0)
    for found, _ in results:
        positions, group, size = found["subset"]
        assert int(size) == 4
        assert (values[positions] == -1).all()
        values[positions] = group
    assert values.tolist() == [60, 6, 6, 8]


def test_ranks_whose_queries_differ_all_raise(results):
    for _, (labelled, parts, *too_few) in results:
        assert all("fewer references than processes, got" in message for message in too_few)
        assert "`xt` must have one dtype and one number of labels on all ranks" in labelled
        assert "`x` must be every" in parts


def batch():
    """Eight samples of a bank, the third and the last of which are the same one."""
    source = generator("sharded bank")
    bank = torch.randn(13, 3, generator=source, dtype=WIDE)
    group, prompt = torch.arange(13) % 2, torch.arange(13) // 3 % 2
    index = torch.tensor([12, 3, 7, 0, 5, 1, 10, 7])
    return bank, group, prompt, index


def labelled(kind, group, prompt):
    """(class, cond_group) as a network that sees them has them."""
    return group if kind in ("class", "both", "dropped") else None, (
        prompt if kind in ("prompt", "both", "dropped") else None
    )


def stf(rows, references, sharded, kind, switch, key, *, indexed=True):
    """What STF gives for some rows of the batch, on this rank."""
    bank, group, prompt, index = batch()
    known, cond_group = labelled(kind, group, prompt)
    target = STF(references, switch, sharded=sharded)
    target.fill(bank, known, indexed=indexed, cond_group=cond_group)

    known, cond_group = labelled(kind, group[index], prompt[index])
    cond = None if cond_group is None else {"prompt": cond_group}
    whole = Clean(bank[index], known, cond, index if indexed else None, cond_group)
    t = torch.linspace(0.3, 3.0, 8, dtype=WIDE)
    noised = noise_samples(whole, EDM(), t, torch.ones_like(t), generator("noise"))
    if kind == "dropped":
        dropped = torch.arange(8) % 3 == 0
        noised = replace(noised, group=torch.where(dropped, UNLABELLED, known))
    mine = Noised(**mapped(tensors(noised), lambda x: x[rows]))
    found = target(mine, whole.rows(rows), generator(key))
    return torch.cat([found.x0, found.ess[:, None], found.spread[:, None]], dim=1)


KINDS = ["none", "class", "prompt", "both", "dropped"]
MODES = {
    "batch": ("batch", False),
    "replicated": ("all", False),
    "sharded": ("all", True),
    "drawn": (7, False),
    "drawn and sharded": (7, True),
}


def targets(rank):
    rows = SHARES[2][rank]
    found = {
        (mode, kind): stf(rows, *given, kind, 0.0, rank)
        for mode, given in MODES.items()
        for kind in KINDS
    }
    # the first rank has no row above 2
    found |= {
        (mode, "switch"): stf(rows, *given, "both", 2.0, rank) for mode, given in MODES.items()
    }
    given = MODES["drawn and sharded"]
    found["drawn and sharded", "not indexed"] = stf(rows, *given, "both", 0.0, rank, indexed=False)
    return {" / ".join(name): x for name, x in found.items()}


@pytest.fixture(scope="module")
def found_targets(on_two_ranks):
    return on_two_ranks(targets)


def expected_target(mode, kind):
    """What one process gives for the whole batch, with the references that the ranks have."""
    references, _ = MODES[mode]
    options = {"indexed": kind != "not indexed"}
    switch = 2.0 if kind == "switch" else 0.0
    kind = "both" if kind in ("switch", "not indexed") else kind
    # ranks that share out their references draw those of the first one
    keys = [0, 1] if mode == "drawn" else [0, 0]
    whole = [stf(slice(0, 8), references, False, kind, switch, key, **options) for key in keys]
    return torch.cat([x[rows] for x, rows in zip(whole, SHARES[2], strict=True)])


@pytest.mark.parametrize("kind", [*KINDS, "switch"])
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_give_the_target_of_one_process_whatever_masks_references(
    found_targets, mode, kind
):
    found = torch.cat([x[f"{mode} / {kind}"] for x in found_targets])
    torch.testing.assert_close(found, expected_target(mode, kind), rtol=1e-10, atol=1e-12)
    assert float(found[:, 3].max()) > 1.2


def test_without_indices_the_ranks_share_references_drawn_with_replacement(found_targets):
    name = ("drawn and sharded", "not indexed")
    found = torch.cat([x[" / ".join(name)] for x in found_targets])
    torch.testing.assert_close(found, expected_target(*name), rtol=1e-10, atol=1e-12)


def numbers_sent(rank):
    """How many numbers this rank hands to collectives, for banks of two sizes."""
    sent = []
    for count in (64, 1024):
        x = torch.randn(count, 5, generator=generator("traffic"))
        sharded = ShardedReferences.prepare(x[rank::2])
        given = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_gather", "all_to_all_single"):
                whole = getattr(dist, name)

                def counted(out, x, *rest, whole=whole, given=given, **options):
                    given.append(x.numel())
                    return whole(out, x, *rest, **options)

                patch.setattr(dist, name, counted)
            posterior_mean(x[:4], 1.0, 1.0, sharded)
        sent.append(sum(given))
    return sent


def test_communication_does_not_grow_with_the_number_of_references(on_two_ranks):
    for small, large in on_two_ranks(numbers_sent):
        # queries of this rank, and sums for the queries of both
        assert small == large == 3 + 4 * (1 + 5 + 3) + 8 * (5 + 6)


class Points(Dataset):
    x0 = 2 + torch.randn(21, 2, generator=generator("points of shards"))

    def __len__(self):
        return 21

    def __getitem__(self, i):
        return {"x0": self.x0[i], "label": i % 2, "index": i}


class Save(Callback):
    """Writes what each rank has at the end to a file of its own."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        bank = module.target.bank
        curve = trainer.callbacks[0].curve
        found = {
            "held": bank.local.rows + bank.local.centre,
            "group": bank.local.group,
            "switch": module.target.switch,
            "size": len(bank),
            "curve": curve.dsm.mean,
            "curve size": curve.size,
            "weights": torch.nn.utils.parameters_to_vector(module.parameters()).detach(),
        }
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResidualMLP(2, width=8, depth=1, num_class_embeds=3)
        torch.nn.init.normal_(network.project_out.weight)
    return network


def fit(folder, sharded):
    module = DiffusionModule(
        mlp(),
        num_classes=2,
        label_dropout=0.2,
        target=STF("all", min_noise_level="auto", sharded=sharded),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
    )
    torch.manual_seed(5)
    Trainer(
        accelerator="cpu",
        strategy="ddp_fork",
        devices=2,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[TargetVariance(noise_levels=4, samples=64), Save(folder)],
    ).fit(module, DataLoader(Points(), batch_size=4))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return [fit(tmp_path_factory.mktemp("run"), sharded) for sharded in (False, True)]


def test_a_run_with_a_sharded_bank_trains_as_with_one_on_every_rank(runs):
    for replicated, sharded in zip(*runs, strict=True):
        torch.testing.assert_close(sharded["weights"], replicated["weights"], rtol=1e-5, atol=1e-6)
        start = torch.nn.utils.parameters_to_vector(mlp().parameters())
        assert float((start.detach() - sharded["weights"]).norm()) > 0.01
        assert sharded["switch"] == pytest.approx(replicated["switch"], rel=1e-3)
        assert sharded["switch"] > 0


def test_each_rank_of_a_run_keeps_only_what_it_has_read(runs):
    for rank, (replicated, sharded) in enumerate(zip(*runs, strict=True)):
        assert len(replicated["held"]) == 21
        assert len(sharded["held"]) == [11, 10][rank]
        torch.testing.assert_close(sharded["held"], Points.x0[rank::2])
        assert sharded["group"].tolist() == [i % 2 for i in range(rank, 21, 2)]
        assert sharded["size"] == 21


def test_the_target_variance_of_a_run_is_not_measured_on_one_shard(runs):
    for replicated, sharded in zip(*runs, strict=True):
        assert sharded["curve size"] == replicated["curve size"] == 21
        torch.testing.assert_close(sharded["curve"], replicated["curve"], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("references", [5, "all"])
def test_on_one_process_a_sharded_bank_is_the_whole_one(references):
    given = (slice(0, 8), references)
    assert torch.equal(stf(*given, True, "both", 0.0, 0), stf(*given, False, "both", 0.0, 0))
    target = STF(references, sharded=True)
    target.fill(torch.randn(9, 2), None, indexed=True)
    assert isinstance(target.bank, References)
    assert len(target.bank.rows) == 9


def test_references_from_the_batch_cannot_be_sharded():
    with pytest.raises(ValueError, match="`sharded` must be False with references='batch'"):
        STF("batch", sharded=True)
