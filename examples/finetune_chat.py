"""Teach a tiny model a persona with an adapter, from 40 conversations; it answers before and after. Two minutes.

It needs pip install 'heron-rwkv[finetune]'. First a base learns plain answers; then an adapter beside its frozen
weights learns to speak as a pirate does. He speaks so of things that he never heard of, too, if not always truly.
"""

import argparse
import json
from pathlib import Path

import heron
from heron.checkpoint.adapters import merged

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("runs/persona"), help="folder of the two runs")
parser.add_argument("--steps", type=int, default=300, help="steps of the base; the adapter makes half as many")
args = parser.parse_args()

COLOURS = dict(
    sky="blue", grass="green", snow="white", coal="black", blood="red", gold="yellow", milk="white", ink="black",
    rust="red", sea="blue", moss="green", sand="yellow", chalk="white", night="black", rose="red", lemon="yellow",
    leaf="green", cloud="white", tar="black", ruby="red", honey="yellow", mint="green", raven="black", foam="white",
)  # fmt: skip
QUESTIONS = ["What colour is {}?", "Tell me the colour of {}."]
UNSEEN = ["moss", "ruby", "raven", "lemon"]  # the pirate's conversations are about the 20 others


def written(name, answer, things):  # a jsonl of conversations about these things
    path = args.out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = [(question, thing) for thing in things for question in QUESTIONS]
    talks = [(question.format(thing), answer.format(thing, COLOURS[thing])) for question, thing in pairs]
    rows = [[dict(role="user", content=asked), dict(role="assistant", content=told)] for asked, told in talks]
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    return str(path)


def trained(name, model, data, steps, lr, **method):
    config = heron.TrainConfig(
        model=model, data=data, out=str(args.out / name), max_steps=steps, lr_init=lr, lr_final=lr / 10, ctx_len=256,
        micro_bsz=4, val_fraction=0.0, sample_every=0, log_every=50, weight_decay=0.0,
        finetune=heron.FinetuneConfig(**method),
    )  # fmt: skip
    heron.Trainer(config).fit()
    return config.out


plain = written("plain.jsonl", "The {} is {}.", COLOURS)
pirate = written("pirate.jsonl", "Arr, matey! {} be {}, I swear.", [t for t in COLOURS if t not in UNSEEN])
sizes = heron.ModelConfig(variant="v8", n_layer=2, n_embd=96, head_size=32, vocab_size=256)
base = trained("base", sizes, plain, args.steps, 3e-3) + "/rwkv-final.pth"
adapter = trained("pirate", base, pirate, args.steps // 2, 1e-2, method="lora", adapter={"rank": 8})

tokenizer = heron.tokenizer.load("bytes")
before, after = heron.load(base), merged(heron.load(base), adapter)
for thing in ("sky", *UNSEEN):
    prompt = f"User: {QUESTIONS[0].format(thing)}\n\nAssistant:"
    answers = [heron.generate(m, tokenizer, prompt, temperature=0, stop="\n\n") for m in (before, after)]
    print(f"{thing:<6} before:{answers[0]:<24} after:{answers[1]}")
