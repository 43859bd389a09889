"""Everything behind the scripts, which import kit. Within kit only two programs, study and
training_speed, import scripts.

What results depend on
    attention       the further attention modules; SE and CBAM are in models.py
    augment         crop, flip, erase, RandAugment, CutMix: per image, on the device
    datasets        ImageData; Fashion-MNIST, MNIST, KMNIST, CIFAR, .npz
    image_folder    image folders: splits, classes, files;  decoding: pixels, cached
    fast            precisions; modes of a training step: eager, compiled, CUDA graph
    ema             the EMA of the weights

A run
    settings        the flags of train.py, made from its tables
    run             resume, signals, saving, logging, result.json
    runs            run folders: read, checked, compared, locked
    checkpoint      last.pt: states saved, verified, loaded in place
    preflight       chooses and checks the device;  environment: the record in env.json
    tensorboard_log, command_line (errors, exit codes, tables), files

The report and the pictures
    results         studies of comparable runs; rows of benchmark.json
    verdicts        is a difference real?  findings, costs: a study in numbers
    words           ... in sentences;  report_tables: ... in tables;  pages: the layout
    figures         the report's figures;  plots: matplotlib helpers
    attribution     measures Grad-CAM and gates;  pictures: draws them

Programs
    training_speed  benchmark.py --train: steps of train.py, and of a plain loop
    study           run_all.sh's commands;  runner: runs them, JOBS at a time
    plans           RUNS/plan.json: which seeds were planned
"""

import getpass
import os
import sys

# No traceback after Ctrl-C while PyTorch is imported: kit is imported before it.
_excepthook = sys.excepthook
sys.excepthook = lambda kind, *error: kind is KeyboardInterrupt or _excepthook(kind, *error)

try:
    getpass.getuser()
except (KeyError, OSError):  # a container's user without a name: torch.compile needs one
    os.environ["USER"] = f"uid{os.getuid()}"
