"""Run the rows of the table of evidence, each as far as a budget of processor time goes.

    python examples/evidence/run.py --list
    python examples/evidence/run.py --only stf_variance --data FOLDER --budget 300

What is in the tables of ``--folder`` is not measured again: several short runs make one result.
"""

import argparse
import logging
import sys
import warnings
from importlib import import_module
from pathlib import Path

import torch
from study import CheckFailedError, OutOfTimeError, Study

ROWS = {
    "stf_variance": "STF, figures 2 and 3, theorem 2: phases, V_DSM, D, V_STF against n",
    "cifar10_audit": "STF, CARV, Taylor: an audit at a checkpoint of CIFAR-10",
    "stf_training": "STF, figures 4a and 5: Fréchet distance against n, steps, seconds, with VE",
    "stf_samplers": "STF, tables 1 and 2: plain against STF under RK45, PC and DDIM",
    "carv_proposals": "CARV, table 6, figure 13: proposal from the weight against the best",
    "carv_cost": "CARV, figure 21: the cost αR + RK against processor seconds",
    "grids": "Design space, table 2: polynomial against exponential, poor and good network",
    "bell_weight": "Design space: a bell-shaped weight against others at equal steps",
    "taylor_mnist": "Taylor: variance reduction of orders 0, 1, 2 on MNIST, a U-Net",
    "taylor_losses": "Taylor: loss curves on MNIST, SGD and Adam",
    "taylor_optimizers": "Taylor: SGD beside Adam",
    "taylor_equivalence": "Taylor: control of the objective and of the gradient, a printed check",
    "combined": "Beyond the papers: pairs in training; pairs, strata, learned q, STF together",
    "predictions": "Beyond the papers: predicted against realised savings of all audits",
    "prediction_gaps": "Beyond the papers: why audits predict more savings than come true",
    "readmes": "The pages: their exact numbers, and that their commands run",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--only", nargs="+", choices=ROWS, help="all if not given")
    parser.add_argument("--data", type=Path, help="folder that holds cifar10 and mnist")
    parser.add_argument("--budget", type=float, default=600.0, help="processor seconds of each row")
    parser.add_argument("--quick", action="store_true", help="smallest sizes")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--predictions", type=Path, default=Study.predictions, help="results.csv")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name}: {text}" for name, text in ROWS.items()))
        return
    folder = options.folder / "quick" if options.quick else options.folder
    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
    failures = []
    for name in options.only or ROWS:
        print(f"\n## {name}", flush=True)
        study = Study(folder, options.data, options.budget, options.quick, options.predictions)
        try:
            row = import_module(name)
            logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
            row.run(study)
        except OutOfTimeError:
            print(f"{name}: {options.budget:g} seconds are used up; run it again to carry on.")
        except CheckFailedError as error:
            failures.append(f"{name}: {error}")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
