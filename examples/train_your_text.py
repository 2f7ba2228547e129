"""Train a small RWKV-8 on a text of yours and let it write on, with the library alone.

python examples/train_your_text.py --data my.txt
"""

import argparse

import heron

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", default="builtin:python-docs", help="txt, jsonl, a folder of them, or builtin:NAME")
parser.add_argument("--out", default="runs/your-text", help="run folder; the same command goes on where it stopped")
parser.add_argument("--steps", type=int, default=600, help="optimizer steps; 600 take about two minutes on two cores")
parser.add_argument("--prompt", default="The ", help="text to continue")
args = parser.parse_args()

config = heron.TrainConfig(
    model=heron.ModelConfig(variant="v8", n_layer=3, n_embd=128, vocab_size=256),
    data=args.data,
    tokenizer="bytes",
    out=args.out,
    ctx_len=256,
    micro_bsz=4,
    max_steps=args.steps,
    lr_init=2e-3,
    lr_final=1e-4,
    eval_every=200,
    sample_prompt=args.prompt,
)
heron.Trainer(config).fit()

model = heron.load(args.out)
tokenizer = heron.tokenizer.load("bytes")
for temperature in (0.5, 1.0):
    text = heron.generate(model, tokenizer, args.prompt, max_tokens=150, temperature=temperature, top_p=0.8)
    print(f"\n--- temperature {temperature}\n{args.prompt}{text}")
