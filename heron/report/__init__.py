"""What a run tells: lines on the console, files in its folder, TensorBoard and Weights & Biases, and the picture of it.

log.jsonl        one JSON record per logged step and per validation. null stands for NaN and infinity, which JSON
                 does not have; a value that is not known (val_bpb where bytes are not counted) has no key
train_log.txt    one line per mini-epoch and one at the end, as RWKV-LM writes it: epoch loss ppl lr time epoch
samples/         step-00000500.txt, ...: the texts that were sampled
tensorboard/     events, if asked for
"""

from heron.report.log import read_log
from heron.report.picture import plot
from heron.report.reporter import NoReporter, Reporter

__all__ = ["NoReporter", "Reporter", "plot", "read_log"]
