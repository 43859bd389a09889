"""The engine room. The scripts at the top are the experiment and import kit; kit imports no script,
but for its two programs, study and training_speed, which use train.py as it stands.

What figures depend on
    attention       the further attention modules; SE and CBAM are in models.py
    augment         crop, flip, erase, RandAugment, CutMix: per image, on the device
    datasets        ImageData; Fashion-MNIST and its like, CIFAR
    image_folder    any other: its parts, classes and files;  decoding: its pixels, kept decoded
    fast            precisions, and the modes of a step: eager, compiled, as one CUDA graph
    ema             the moving average of the weights

A run
    settings        the flags of train.py, made from its tables
    run             resume, signals, saving, logging, result.json
    runs            a run's folder: read, checked, compared, locked
    checkpoint      last.pt: states saved, verified, loaded in place
    preflight       will this machine do, on which device?  environment: what it is (env.json)
    tensorboard_log, command_line (errors, exit codes, tables), files

The report and the pictures
    results         studies of comparable runs; rows of benchmark.json
    verdicts        is a difference real?  findings, costs: what a study shows, in numbers
    words           its sentences;  report_tables: its tables;  pages: laid out, with page.html
    figures         the report's figures;  plots: matplotlib as they need it
    attribution     Grad-CAM and gates, measured;  pictures: drawn

All of it
    training_speed  benchmark.py --train: steps of train.py, and of a plain loop
    study           what run_all.sh does, as lists of commands;  runner: runs them, JOBS at a time
    plans           RUNS/plan.json: which seeds were planned
"""

import getpass
import os
import sys

# Ctrl-C while PyTorch is imported ends a script without a traceback: kit is imported before it.
_excepthook = sys.excepthook
sys.excepthook = lambda kind, *error: kind is KeyboardInterrupt or _excepthook(kind, *error)

try:
    getpass.getuser()
except (KeyError, OSError):  # a container's user id without a name, which torch.compile asks for
    os.environ["USER"] = f"uid{os.getuid()}"
