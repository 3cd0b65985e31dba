"""The journey: every stage, one after the other, and what is measured after each: three answers before and after, the exams, a table, a report.
In: the flags of --stage all, and the loop. Out: what the stages save; out/RUN/journey.jsonl, what was measured of each; out/RUN/report.html.
Next: train.py

Where it stands is on the disk alone: a stage with a finished.json of its last save is done, a line of journey.jsonl that names this save is its
measurement. So the same command, given again after an interruption anywhere, does what is missing and nothing twice.
"""

import gc
import json
import os
import time
from pathlib import Path

from data_prep.common import fingerprint
from data_prep.demo.exam import write_exam
from data_prep.demo.scenes import ATTRIBUTES
from nanomind import checkpoint, device, generate, judge, report, stages
from nanomind.config import ModelConfig, TrainConfig, check_unchanged, read_json
from nanomind.exam import DESCRIBE, PROMPTS, QUESTIONS, read_exam, sit
from nanomind.model import LanguageModel
from nanomind.tokenizer import write_whole
from nanomind.vision import looking

CONTINUED = PROMPTS[3], PROMPTS[6], PROMPTS[7]
ASKED = QUESTIONS[0], QUESTIONS[5], QUESTIONS[8]
LONGEST = 100  # tokens of a sample
OWN = "preferred", "kl", "image_gain"  # what a validation may report beside the loss, by its name in log.jsonl
HEAD = "stage", "minutes", "tokens", "loss", "bits/byte", "seen", "read", "unknown", "declined", "ended", "of its own", "peak MB"


def travel(given, train):
    """Run (with `train`) every stage that has not reached its end, and measure each once. -> exit code."""
    rows, place = stages.rows({name: value for name, value in given.items() if name != "overwrite"}), Path("out") / given.get("run", TrainConfig.run)
    command = " ".join(["python train.py", *(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in given.items() if name != "overwrite")])
    if given.get("dry_run"):
        return plans(rows, place, train)
    if given.get("overwrite"):
        start_over(rows, place)
    before = {row["stage"]: checkpoint.finished(place / row["stage"]) for row in rows}
    for row in rows:
        if before[row["stage"]]:
            check_unchanged(row, settings(place / row["stage"]), place / row["stage"])
    for number, row in enumerate(rows, 1):
        folder = place / row["stage"]
        print(f"\n[{number} of {len(rows)}] {row['stage']}", flush=True)
        if before[row["stage"]]:
            print(f"already finished: {before[row['stage']]['step']:,} steps in {folder}")
        else:
            code = train({**row, **({"resume": True} if checkpoint.saved_step(folder) else {})})
            if code:
                print(f"go on with: {command}")
                return code
            gc.collect()  # its model and optimiser, before those of the next stage
        known = measurements(place)
        if known.get(row["stage"], {}).get("model") != fingerprint([folder / "model.safetensors"]):
            known[row["stage"]] = measure(row, place)
            write_whole(place / "journey.jsonl", "".join(json.dumps(known[other["stage"]], ensure_ascii=False) + "\n" for other in rows if other["stage"] in known))
            write_report(rows, place, known)
        print("\n" + report.said(known[row["stage"]]), flush=True)
    write_report(rows, place, known)
    print(f"\n{report.lines(summary(rows, place, known))}\n\nreport: {place / 'report.html'}; talk to it: python sample.py --run {place.name}")
    if all(before.values()):
        print(f"everything was finished already; begin again with: {command} --overwrite")
    return 0


def plans(rows, place, train):
    """What each stage would do. Where its predecessor is not there yet, it is taken to have the first one's shape."""
    preset = stages.defaults(rows[0]).get("preset", "nano")
    for row in rows:
        print(f"\n{row['stage']}")
        before = stages.STAGES[row["stage"]].starts_from
        missing = before and not any((place / name / "model.safetensors").is_file() for name in before)
        train({**stages.defaults(row), **row, "preset": preset} if missing else row)
    return 0


def start_over(rows, place):
    """Forget all weights, the last stage's first: stopped in between, what is left is the beginning of a journey."""
    for row in reversed(rows):
        (place / row["stage"] / "model.safetensors").unlink(missing_ok=True)
    for name in ("journey.jsonl", "report.html"):
        (place / name).unlink(missing_ok=True)


def settings(folder):
    """The TrainConfig of a saved run, as a dict."""
    return checkpoint.load_progress(folder)[1]["config"]


def measurements(place):
    """stage -> what was measured of it."""
    path = place / "journey.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.is_file() else []
    return {record["stage"]: record for record in found}


# ---- one stage

def measure(row, place):
    """-> a record of what the model says and knows after a stage, and said before it."""
    began, stage, folder = time.monotonic(), stages.STAGES[row["stage"]], place / row["stage"]
    device.reset_peak_memory()
    was = TrainConfig(**settings(folder))
    start, (model, tokenizer) = stages.find_init(was), checkpoint.load(folder)
    if start:
        older = checkpoint.load_model(start)
    else:  # the random weights it began with
        older = LanguageModel(ModelConfig.from_hf(read_json(folder / "config.json"))).init_weights(was.seed)
    for one in (older, model):
        generate.prepare(one, was.device, was.precision, row.get("threads", was.threads))
    look = looking(model.vision) if hasattr(model, "vision") else None
    questions = (place / "raw" / stage.builtin[0]).with_name("exam.jsonl")
    pictures = read_exam(questions) if look and questions.is_file() else []
    asked = [(prompt, None) for prompt in (ASKED if stage.chat else CONTINUED)]
    if look:
        asked = [(DESCRIBE[i % 2], pictures[i * len(pictures) // 3]["image"]) for i in range(3 * bool(pictures))]
    said = [write(one, tokenizer, stage.chat, asked, look) if not look or hasattr(one, "vision") else ["(no eyes yet)"] * len(asked) for one in (older, model)]
    found = {"stage": row["stage"], "model": fingerprint([folder / "model.safetensors"]), "from": str(start) if start else "random weights",
             "parameters": model.config.parameters(), "samples": [
                 {"prompt": prompt, "before": before, "after": after, **({"image": os.path.relpath(image, place)} if image else {})}
                 for (prompt, image), before, after in zip(asked, *said)]}
    if not stage.trains:  # else the language model is the same as before
        exam = place / "raw" / "exam-first.jsonl"
        if not exam.is_file():
            write_exam(exam.parent)
        items = read_exam(exam)[::1 if stage.chat else 4]  # who has not learnt to answer does not learn to stop: slow, and soon known
        found["exam"] = marks(sit(model, tokenizer, items))
        if pictures:
            right, blind = (sit(model, tokenizer, pictures, look, blind) for blind in (False, True))
            found["pictures"] = {**marks(right), "blind": marks(blind)["right"], "chance": {name: 1 / len(ATTRIBUTES[name]) for name in right.categories if name in ATTRIBUTES}}
    return {**found, "peak_mb": device.peak_memory(model.lm_head.weight.device), "seconds": time.monotonic() - began}


def write(model, tokenizer, chat, asked, look):
    """What a model answers (without `chat`: how it goes on) to (prompt, picture or None), greedily. -> texts"""
    begin, stop = [] if tokenizer.begin is None else [tokenizer.begin], {tokenizer.end_of_text, tokenizer.im_end} - {None}
    contents = [[None, "\n" + prompt] if image else prompt for prompt, image in asked]
    prompts = [begin + (tokenizer.render_prompt([{"role": "user", "content": content}]) if chat else tokenizer.encode(content)) for content in contents]
    features = [look([image]) if image else None for _, image in asked]
    return [tokenizer.decode(ids, specials=False).strip() for ids, _ in judge.answers(model, prompts, LONGEST, stop, features=features)]


def marks(score):
    """A Score as JSON."""
    return {"right": {name: share.right for name, share in score.categories.items()}, "declined": score.declined, "ended": score.ended,
            "n": {name: share.n for name, share in score.categories.items()},
            "interval": {name: [share.low, share.high] for name, share in score.categories.items()}}


# ---- all of them

def summary(rows, place, known):
    """The table as lists of texts, its head first; of the stages that are finished."""
    table, seconds, peak = [HEAD], 0.0, 0.0
    for row in rows:
        folder = place / row["stage"]
        end, log, exam = checkpoint.finished(folder), checkpoint.read_log(folder / "log.jsonl"), known.get(row["stage"], {}).get("exam")
        if not end:
            continue
        validated = [record for record in log if "val_loss" in record]

        def course(name):
            values = [record[name] for record in validated if name in record]
            return f"{values[0]:.2f} -> {values[-1]:.2f}" if values else "-"
        own = [name for name in OWN if validated and name in validated[-1]]
        shares = [*(exam["right"].get(name) for name in ("seen", "read", "unknown")), exam["declined"], exam["ended"]] if exam else [None] * 5
        seconds, peak = seconds + end["seconds"], max(peak, end["peak_mb"])
        table.append([row["stage"], f"{end['seconds'] / 60:.2f}", f"{end['tokens'] / 1e6:.2f}M", course("val_loss"), course("bpb"), *map(report.percent, shares),
                      f"{own[0]} {course(own[0])}" if own else "-", f"{'' if end['own_peak'] else '<= '}{end['peak_mb']:,.0f}"])
    own = [known[row["stage"]] for row in rows if row["stage"] in known]
    measuring, most = sum(record["seconds"] for record in own), max([record["peak_mb"] for record in own], default=0.0)
    return [*table, ["measuring", f"{measuring / 60:.2f}", *["-"] * 9, f"{most:,.0f}"],
            ["together", f"{(seconds + measuring) / 60:.2f}", *["-"] * 9, f"{max(peak, most):,.0f}"]]


def write_report(rows, place, known):
    """out/RUN/report.html from what lies on the disk."""
    table, shown = summary(rows, place, known), []
    for row in rows:
        log, record, stage = checkpoint.read_log(place / row["stage"] / "log.jsonl"), known.get(row["stage"], {}), stages.STAGES[row["stage"]]
        exams = [("Exam: facts that chats ask about in other words, facts only read in pretraining, what this world does not contain; "
                  f"of what it knows it declined {report.percent(record['exam']['declined'])}; {report.percent(record['exam']['ended'])} of the answers ended by themselves.",
                  report.exam_table(record["exam"]))] if record.get("exam") else []
        exams += [("Exam about pictures of combinations never drawn in training.", report.exam_table(record["pictures"]))] if record.get("pictures") else []
        if record:
            shown.append({"name": row["stage"], "about": f"{stage.objective.__doc__.splitlines()[0]} {record['parameters'] / 1e6:.2f}M parameters.", "command": f"python train.py --stage {row['stage']} --run {place.name}",
                          "loss": [(line["step"], line["loss"]) for line in log if "loss" in line], "from": record["from"],
                          "samples": [{**one, **({"image": place / one["image"]} if "image" in one else {})} for one in record["samples"]],
                          "validation": [(line["step"], line["val_loss"]) for line in log if "val_loss" in line], "exams": exams})
    lead = f"A model made from nothing on this computer: {len(shown)} of {len(rows)} stages in {table[-1][1]} minutes. Talk to it: python sample.py --run {place.name}"
    write_whole(place / "report.html", report.page(f"nanomind: {place.name}", lead, table, shown))
