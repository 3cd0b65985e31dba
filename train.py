"""The one training loop: python train.py --stage STAGE [flags]; every flag is a field of TrainConfig (nanomind/config.py).
In: a row of the stage table, a data folder, a model. Out: out/RUN/STAGE/, a Hugging Face folder, with log.jsonl beside the weights.
It contains no stage's name: what differs between stages is in nanomind/stages.py.
Next: sample.py
"""

import math
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from nanomind.cli import keep_memory, run
from nanomind.config import KEPT_ON_RESUME, TrainConfig, check_unchanged, parse_flags, settle

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help and mistyped flags are answered at once
    GIVEN = parse_flags(TrainConfig, sys.argv[1:], __doc__.splitlines()[0])
    keep_memory()

import torch

from nanomind import checkpoint, device, generate, journey, judge, optim, parallel, plan, stages


def main(given):
    """The runs that the given flags name (parse_flags), one after the other. -> exit code of the last."""
    if given.get("stage") == stages.JOURNEY:
        if "LOCAL_RANK" in os.environ:
            raise ValueError(f"--stage {stages.JOURNEY} is for one process; under torchrun give the stages one by one")
        return journey.travel(given, train)
    for row in stages.rows(given):
        code = train(row)
        if code:
            print(f"go on with: python train.py --stage {row.get('stage', TrainConfig.stage)} --run {row.get('run', TrainConfig.run)} --resume")
            break
    parallel.leave()
    return code


def train(given):
    """One run. -> exit code."""
    started, own_peak = time.monotonic(), device.reset_peak_memory()
    stage = stages.STAGES[given.get("stage", TrainConfig.stage)]
    stages.check_flags(given, given.get("stage", TrainConfig.stage))
    cfg, model_config = settle(given, stages.defaults(given))
    if not (cfg.data or cfg.steps or cfg.tokens or cfg.epochs or cfg.time_limit):
        cfg = replace(cfg, time_limit=stage.minutes)

    # 1. where results go, and what is there already
    folder = Path("out") / cfg.run / cfg.stage
    saved = None if cfg.dry_run or cfg.show_batch or cfg.overwrite else checkpoint.load_progress(folder)
    if saved and not cfg.resume:
        raise ValueError(f"{folder} holds a run of {saved[1]['step']} steps: --resume goes on, --overwrite begins again, --run NAME starts another")
    if saved:
        cfg = resumed_config(cfg, given, saved[1], folder)
    elif cfg.resume:
        print(f"nothing to resume in {folder}: starting afresh")

    # 2. the machine, and the processes that share the work
    group = parallel.join(cfg.device)
    if cfg.shard and group.world == 1:
        raise ValueError("--shard shares one model among the processes of torchrun, and there is only one process")
    if cfg.accumulate % group.world:
        raise ValueError(f"--accumulate {cfg.accumulate}: {group.world} processes cannot share it evenly; give a multiple of {group.world}")
    if group.rank:
        sys.stdout = open(os.devnull, "w")  # the first one speaks for all
    precision = cfg.precision if not saved else "bf16" if "bfloat16" in saved[1]["precision"] else "fp32"
    machine = device.choose_device(cfg.device, precision, cfg.threads, group)
    print(f"machine    {machine.reasons}")

    # 3. data, model, objective
    model_config, name = stages.shape(cfg, model_config, given) if not saved else (model_config, str(folder))
    if cfg.dry_run and not stages.prepared(cfg):
        return plan.show(cfg, name, model_config, stages.estimated_tokens(cfg), machine.rate, stage)
    with group.first():
        data = stages.find_data(cfg, stage, folder.parent)
    encoder = stages.find_encoder(cfg, stage, given, folder if saved else None)
    identity = {"tokenizer": data.meta["tokenizer"], "splits": data.meta["splits"]}
    if saved and saved[1]["data"] != identity:
        raise ValueError(f"{data.path}: not the data this run was trained on; --run NAME --init {folder} starts a new one from its weights")
    with group.first():
        train, val = stages.datasets(cfg, data, stage, encoder, machine)
    print(f"data       {data.path}: {train.summary()}" + (f"; validation {len(val.split):,} documents" if val else "; no validation documents"))
    if cfg.show_batch:
        return plan.show_batch(train.batch(0), data.tokenizer)
    if name == (cfg.preset or "nano"):
        model_config = replace(model_config, vocab_size=data.tokenizer.vocab_size)
    if cfg.dry_run:
        return plan.show(cfg, name, model_config, train.used, machine.rate, stage)
    model = stages.freeze(checkpoint.load_model(folder, cfg.checkpointing), stage) if saved else stages.build(cfg, model_config, data.tokenizer, encoder)
    model = (parallel.shard(model, machine.device) if cfg.shard else model.to(machine.device)).train()
    runner = torch.compile(model) if cfg.compile else model
    optimizer = optim.Optimizer(model, cfg, machine.dtype)
    if saved:
        optimizer.load(saved[0])
    plan.show(cfg, name, model.config, train.used, machine.rate, stage, model)

    # 4. the loop
    if not saved and not group.rank:
        for old in ("model.safetensors", "finished.json", "log.jsonl", "reference.safetensors"):
            (folder / old).unlink(missing_ok=True)
        checkpoint.begin_folder(folder, model.config, data.tokenizer, stage.chat, getattr(model, "vision", None))
    state = saved[1] if saved else {"step": 0, "tokens": 0, "seconds": 0.0, "final_seconds": 0.0, "precision": str(machine.dtype),
                                    "config": asdict(cfg), "data": identity, "peak_mb": 0.0}
    state["own_peak"] = own_peak  # or that of the process so far, with all it did before
    log = None if group.rank else checkpoint.Log(folder / "log.jsonl", state["step"], fresh=not saved)
    with parallel.gathered(model), group.first():
        objective = stages.make_objective(cfg, stage, model, data.tokenizer, train, val, folder, machine)
    trainer = Trainer(cfg, stage, objective, machine, data.tokenizer, model, runner, optimizer, train, val, folder, state, log, started, group)
    with group.together():
        return trainer.run()


def resumed_config(cfg, given, progress, folder):
    """The saved run's own settings; flags that would change what was already done are refused, all at once."""
    was = progress["config"]
    check_unchanged(given, was, folder)
    lengths = ("time_limit", "steps", "tokens", "epochs")
    newer = {name: value for name, value in given.items() if name in KEPT_ON_RESUME}
    if set(newer) & set(lengths):  # a new length replaces the old one, of whatever kind that was
        newer = {**dict.fromkeys(lengths, 0), **newer}
    return replace(cfg, **{**was, "shard": False, **newer})  # how the work is shared now, not how it was


class Trainer:
    """What the loop carries from step to step. `state` is what a save stores as JSON: step, tokens, seconds and the run's settings."""

    def __init__(self, cfg, stage, objective, machine, tokenizer, model, runner, optimizer, train, val, folder, state, log, started,
                 group=parallel.Group()):
        self.cfg, self.stage, self.machine, self.tokenizer, self.model, self.runner = cfg, stage, machine, tokenizer, model, runner
        self.optimizer, self.train, self.val, self.folder, self.state, self.log = optimizer, train, val, folder, state, log
        self.objective, self.steps, self.group = objective, plan.total_steps(cfg, train.rows), group
        self.started = started - state["seconds"]  # the runs before this one count
        late = self.seconds() - 30 * cfg.time_limit if cfg.time_limit and state["step"] == 0 else 0.0
        if late > 0:  # a slow disk or processor, or a short limit: what was asked for is a trained model
            print(f"preparation took {plan.clock(self.seconds())} of {cfg.time_limit:g} minutes: training gets half of them all the same, and ends {plan.clock(late)} later")
            self.started += late
        self.step_share, self.stop_asked, self.asked_at, self.stopping = 0.0, False, 0.0, False

    def seconds(self):
        """Wall-clock seconds of the run so far, start-up and preparation of the data included."""
        return time.monotonic() - self.started

    def progress(self):
        """Where the run stands, in [0, 1]: by steps or by the clock, whichever is further. The clock leaves room for the last evaluation."""
        by_step = self.state["step"] / self.steps if self.steps else 0.0
        by_clock = self.seconds() / max(self.cfg.time_limit * 60 - self.state["final_seconds"], 1e-3) if self.cfg.time_limit else 0.0
        return min(1.0, max(by_step, by_clock))

    def run(self):
        previous = {kind: signal.signal(kind, self.ask_stop) for kind in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.loop()
        finally:
            for kind, handler in previous.items():
                signal.signal(kind, handler)
        if self.stopping:
            self.save()
            print(f"stopped at step {self.state['step']}, saved")
            return 130
        return 0

    def ask_stop(self, *_):
        """Ctrl-C: finish the step, save, leave. A second one leaves at once, as the last save left it (torchrun passes on what the terminal has
        sent already: within a second it is the same one)."""
        if self.stop_asked and time.monotonic() - self.asked_at > 1:
            raise KeyboardInterrupt
        if self.stop_asked:
            return
        self.stop_asked, self.asked_at = True, time.monotonic()
        print("\nstopping after this step", file=sys.stderr)

    def loop(self):
        from tqdm import tqdm
        state, cfg = self.state, self.cfg
        if state["step"] == 0:
            self.look(cfg.eval_tokens)
        elif self.where() >= 1 and checkpoint.finished(self.folder):
            return print(f"already finished: {state['step']} steps; a longer --steps, --tokens, --epochs or --time-limit goes on")
        bar = tqdm(total=self.steps, initial=state["step"], disable=True if self.group.rank else None, unit="step", dynamic_ncols=True)
        began, first, first_tokens = time.monotonic(), self.progress(), state["tokens"]
        next_line = began + 5  # without a terminal the bar is quiet: a line after 5 seconds, then one a minute
        while (begin := self.agree()) < 1 and not self.stopping:
            loss = self.take_step(begin)
            end, now = self.where(), time.monotonic()
            self.step_share = end - begin
            rate, eta = (state["tokens"] - first_tokens) / (now - began), (now - began) * (1 - end) / max(end - first, 1e-9)
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tok/s, ETA {plan.clock(eta)}", refresh=False)
            bar.update()
            if bar.disable and now > next_line:
                next_line = now + 60
                print(f"step {state['step']:>6} {100 * end:4.0f} %  loss {loss:.3f}  {rate:,.0f} tok/s  ETA {plan.clock(eta)}", flush=True)
            if end < 1 and self.due(begin, end, cfg.save_every or cfg.eval_every):
                self.save()
            if end < 1 and self.due(begin, end, cfg.eval_every):
                bar.clear()
                self.look(cfg.eval_tokens)
        bar.close()
        if state["step"] == 0:
            raise ValueError(f"--time-limit {cfg.time_limit:g}: over before the first step, {plan.clock(self.seconds())} after the start: give it more, or start it again: "
                             "what it has prepared is kept")
        if not self.stopping:
            self.save()
            self.look(4 * cfg.eval_tokens, last=True)
            self.finish()

    def where(self):
        """Where the run stands, by the clock of the first process: what follows from it, all processes do."""
        return self.group.total(self.progress() * (self.group.rank == 0))[0]

    def agree(self):
        """Where the run stands; and a wish to stop in any process is everybody's."""
        at, stop = self.group.total(self.progress() * (self.group.rank == 0), self.stop_asked)
        self.stopping = bool(stop)
        return at

    def due(self, begin, end, every):
        """Is it time? Every so many steps, or (0) whenever another tenth of the run is done."""
        return self.state["step"] % every == 0 if every else int(10 * begin) != int(10 * end)

    def take_step(self, begin):
        """One optimiser step over `accumulate` micro-batches -> mean loss per target. The loss is a sum until it is divided, once, by
        the number of targets of the whole step, so how the rows are split into micro-batches changes nothing."""
        state, cfg, started = self.state, self.cfg, time.monotonic()
        batches = [self.train.batch(state["step"], i, cfg.accumulate) for i in range(self.group.rank, cfg.accumulate, self.group.world)]
        targets, tokens = self.group.total(sum(batch.n_targets for batch in batches), sum(int((batch.doc_ids >= 0).sum()) for batch in batches))
        targets, tokens, found, sums = max(1, int(targets)), int(tokens), [], {}
        for batch in batches:
            with self.machine.autocast():
                loss, metrics = self.objective(self.runner, batch.to(self.machine.device))
            with self.group.summing(self.model, last=batch is batches[-1]):
                (loss / targets).backward()
            found.append({"loss": loss.detach(), **metrics})
        for metrics in found:  # read when a GPU has been given all of its work: reading waits for it
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        values = self.group.total(*sums.values())
        total = values[0]
        norm = optim.whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip)).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise ValueError(f"step {state['step'] + 1}: loss {total / targets}, gradient norm {norm}: not finite, stopped before the weights were "
                             f"touched. Begin again with a lower --lr (now {cfg.lr:g})"
                             + (f", or go on from the last good save with --init {self.folder}" if (self.folder / "model.safetensors").is_file() else ""))
        scale = optim.schedule(begin, self.step_end(begin), cfg.warmup, cfg.decay)
        self.optimizer.step(scale)
        state["step"] += 1
        state["tokens"] += tokens
        state["seconds"] = self.seconds()
        self.record({"step": state["step"], "tokens": state["tokens"], "loss": total / targets, "lr": cfg.lr * scale, "grad_norm": norm,
                     **{name: value / targets for name, value in zip(sums, values)}, "seconds": round(state["seconds"], 2),
                     "tokens_per_second": round(tokens / (time.monotonic() - started))})
        return total / targets

    def step_end(self, begin):
        """Where this step will end: exact by steps, by the clock as long as the step before."""
        return max((self.state["step"] + 1) / self.steps if self.steps else 0.0, begin + self.step_share if self.cfg.time_limit else 0.0)

    def look(self, tokens, last=False):
        """Validate, and write something once it has learnt; the first process does it for all."""
        with parallel.gathered(self.model):
            if not self.group.rank:
                self.evaluate(tokens, last)
                if self.state["step"]:
                    self.sample()

    def evaluate(self, tokens, last=False):
        """Validate, print and log."""
        if self.val is None:
            return
        began = time.monotonic()
        self.model.eval()
        sums = {}
        for batch in self.val.validation(tokens):
            with self.machine.autocast():
                for name, value in self.objective.validate(self.runner, batch.to(self.machine.device)).items():
                    sums[name] = sums.get(name, 0.0) + float(value)
        self.model.train()
        record = {"step": self.state["step"], **self.objective.summary(sums)}
        if last and self.stage.chat:
            self.model.eval()
            record.update(judge.judge(self.model, self.tokenizer, self.val))
            self.model.train()
        self.record(record)
        print(f"step {record['step']:>6} validation: " + "  ".join(f"{name} {value:.4f}" for name, value in record.items() if name != "step"), flush=True)
        self.state["final_seconds"] = 5 * (time.monotonic() - began)  # room for the last one, four times as long, and the save behind it

    def sample(self):
        """Print what the model writes now."""
        self.model.eval()
        stop = {self.tokenizer.end_of_text, self.tokenizer.im_end}
        for prompt in self.stage.prompts:
            ids = [self.tokenizer.end_of_text]
            ids += self.tokenizer.render_prompt([{"role": "user", "content": prompt}]) if self.stage.chat else self.tokenizer.encode(prompt)
            text = generate.complete(self.model, self.tokenizer, ids, 40, generate.Sampling(seed=self.cfg.seed), stop)
            print(f"    {prompt} > {' '.join(text.split())}", flush=True)
        for ids, pictures in zip(*judge.questions(self.val, 3)) if self.val is not None and self.val.features is not None else ():
            text = generate.complete(self.model, self.tokenizer, ids, 40, judge.GREEDY, stop, pictures)
            print(f"    {' '.join(self.tokenizer.decode(ids, specials=False).split())} > {' '.join(text.split())}", flush=True)
        self.model.train()

    def record(self, values):
        if not self.group.rank:
            self.log.write(values)

    def finish(self):
        """Note and say that the run has reached its end."""
        if self.group.rank:
            return
        end = {"step": self.state["step"], "tokens": self.state["tokens"], "seconds": self.seconds(), "peak_mb": self.peak(),
               "own_peak": self.state["own_peak"]}
        checkpoint.finish(self.folder, end)
        print(f"done: {end['step']:,} steps, {end['tokens'] / 1e6:.2f}M tokens in {plan.clock(end['seconds'])}, "
              f"peak memory {end['peak_mb']:,.0f} MB; saved in {self.folder}")

    def peak(self):
        """The largest memory of the run, also of the processes that it was interrupted in, in MB."""
        return max(self.state.get("peak_mb", 0.0), device.peak_memory(self.machine.device))

    def save(self):
        if self.group.rank and not self.cfg.shard:
            return
        self.state["seconds"], self.state["peak_mb"] = self.seconds(), self.peak()
        checkpoint.save(self.folder, self.model, self.optimizer, self.state, not self.group.rank)


if __name__ == "__main__":
    run(lambda: main(GIVEN))
