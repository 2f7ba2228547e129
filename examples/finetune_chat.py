"""Teach a tiny model a persona with an adapter, from 40 conversations; it answers before and after. Two minutes.

It needs pip install 'heron-rwkv[finetune]'. A base learns plain answers; then an adapter beside its frozen weights
learns to speak as a pirate where the system says so, even of things that he never heard of, if not always truly. Most
of what it reads is more of the base's own text, which the base then does not forget.
"""

import argparse
import json
import random
from pathlib import Path

import heron
from heron.checkpoint.adapters import merged

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("runs/persona"), help="folder of the two runs")
parser.add_argument("--steps", type=int, default=300, help="steps of the base; the adapter makes two thirds as many")
args = parser.parse_args()

COLOURS = dict(
    sky="blue", grass="green", snow="white", coal="black", blood="red", gold="yellow", milk="white", ink="black",
    rust="red", sea="blue", moss="green", sand="yellow", chalk="white", night="black", rose="red", lemon="yellow",
    leaf="green", cloud="white", tar="black", ruby="red", honey="yellow", mint="green", raven="black", foam="white",
)  # fmt: skip
QUESTIONS, PERSONA = ["What colour is {}?", "Tell me the colour of {}."], "You are a pirate."
UNSEEN = ["moss", "ruby", "raven", "lemon"]  # the pirate's conversations are about the 20 others


def plain(seed, n):  # so many plain conversations, as text
    draw = random.Random(seed)
    asked = [(draw.choice(QUESTIONS).format(thing), thing) for thing in draw.choices(list(COLOURS), k=n)]
    return "".join(f"User: {text}\n\nAssistant: The {thing} is {COLOURS[thing]}.\n\n" for text, thing in asked)


def trained(name, steps, lr, **settings):
    settings |= dict(ctx_len=256, micro_bsz=4, val_fraction=0.0, sample_every=0, log_every=50, weight_decay=0.0)
    settings |= dict(out=str(args.out / name), max_steps=steps, lr_init=lr, lr_final=lr / 10)
    heron.Trainer(heron.TrainConfig(**settings)).fit()
    return args.out / name


args.out.mkdir(parents=True, exist_ok=True)
texts, talks = args.out / "plain.txt", args.out / "pirate.jsonl"
texts.write_text(plain(0, 1500))
pairs = [(question.format(thing), thing) for thing in COLOURS if thing not in UNSEEN for question in QUESTIONS]
turns = [dict(system=PERSONA, user=q, assistant=f"Arr, matey! {t} be {COLOURS[t]}, I swear.") for q, t in pairs]
rows = [{"messages": [dict(role=role, content=text) for role, text in turn.items()]} for turn in turns]
talks.write_text("\n".join(map(json.dumps, rows)))
sizes = heron.ModelConfig(variant="v8", n_layer=2, n_embd=96, head_size=32, vocab_size=256)
base = trained("base", args.steps, 3e-3, model=sizes, data=str(texts), tokenizer="bytes") / "rwkv-final.pth"
lora = heron.FinetuneConfig(method="lora", adapter={"rank": 8}, mix=f"{texts}:0.7")
adapter = trained("pirate", args.steps * 2 // 3, 1e-2, model=str(base), data=str(talks), finetune=lora)

tokenizer, new = heron.tokenizer.load("bytes"), list(plain(1, 100).encode())
for when, model in (("before", heron.load(base)), ("after", merged(heron.load(base), adapter))):
    print(f"{when}: loss of new plain text {model.loss([new[:-1]], [new[1:]]).item():.4f}")
    for thing, system in (("sky", ""), *((thing, f"System: {PERSONA}\n\n") for thing in ("sky", *UNSEEN))):
        prompt = f"{system}User: {QUESTIONS[0].format(thing)}\n\nAssistant:"
        answer = heron.generate(model, tokenizer, prompt, temperature=0, stop="\n\n")
        print(f"  {thing:<6} {'pirate' if system else 'plain':<7}{answer}")
