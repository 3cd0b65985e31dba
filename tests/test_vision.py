"""Eyes against Hugging Face's CLIP and open_clip's own preprocessing, and the two phases end to end with a tiny encoder made here."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample as sample_module
import train
from conftest import ROOT
from data_prep.common import prepare
from nanomind import bins, checkpoint, judge
from nanomind.config import ModelConfig, load_preset
from nanomind.data import PackedTokens
from nanomind.device import choose_device
from nanomind.generate import Sampling, complete, generate
from nanomind.model import LanguageModel
from nanomind.objectives import Describe, NextToken
from nanomind.stages import STAGES, freeze
from nanomind.vision import Features, VisionLanguageModel, add_eyes, expand, load_encoder, projector_parameters

VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 4.0}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
COLOURS = ("red", "green", "blue", "white")


def encoder_folder(folder, seed=0, **vision):
    """A CLIP with random weights as a folder of open_clip."""
    from open_clip.model import CLIP
    torch.manual_seed(seed)
    model = CLIP(embed_dim=16, vision_cfg={**VISION, **vision}, text_cfg=TEXT)
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 16, "vision_cfg": {**VISION, **vision}, "text_cfg": TEXT},
                                                              "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}}))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def encoder(clip):
    return load_encoder(str(clip))


def picture(colour, size=32):
    data = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, tokenizer_folder):
    """A data folder of 48 conversations about pictures of one colour; the answer names it. Some have two pictures, some none."""
    folder = tmp_path_factory.mktemp("pictures")
    records = []
    for i in range(48):
        colours = [COLOURS[(i + j) % 4] for j in range((1, 1, 2, 0)[i % 4])]
        for colour in colours:
            (folder / f"{colour}{i % 12}.png").write_bytes(picture(colour, 20 + i % 12))
        question = "<image>" * len(colours) + "\nquick brown fox?"
        records.append({"image": [f"{colour}{i % 12}.png" for colour in colours], "conversations": [
            {"role": "user", "content": question if colours else "天地?"}, {"role": "assistant", "content": " ".join(colours) or "玄黄"}]})
    for name, part in (("train", records[:40]), ("val", records[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in part), encoding="utf-8")
    prepare("images", [folder / "train.jsonl"], tokenizer_folder, folder / "data", val=[folder / "val.jsonl"])
    return folder / "data"


def rows_of(pictures, encoder, budget=1e9, T=96, B=2, whole=True):
    folder = bins.open_folder(pictures)
    machine = choose_device("cpu", "fp32", 1)
    features = Features(folder.train, folder.path, "train", encoder, machine, budget)
    return PackedTokens(folder.train, folder.tokenizer, T, B, whole=whole, features=features)


def seeing(encoder, tokenizer, seed=0):
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                         intermediate_size=48, max_position_embeddings=128)
    vision = {"encoder": encoder.identity, "patches": encoder.patches, "width": encoder.width, "projector": "linear", "mark": tokenizer.end_of_text}
    return add_eyes(LanguageModel(config).init_weights(seed), vision)


# ---- the encoder

def test_features_equal_hugging_face(clip, encoder):
    """Another layer, a norm too many or the class token among the patches: the projector learns something else than the reference's does."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    theirs = CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16,
                                              hidden_act="gelu")).eval()
    ours, state = encoder.tower.state_dict(), theirs.state_dict()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in state) else ""
    mapped = {"embeddings.class_embedding": ours["class_embedding"], "embeddings.patch_embedding.weight": ours["conv1.weight"],
              "embeddings.position_embedding.weight": ours["positional_embedding"]}
    for kind in ("weight", "bias"):
        mapped |= {f"pre_layrnorm.{kind}": ours[f"ln_pre.{kind}"], f"post_layernorm.{kind}": ours[f"ln_post.{kind}"]}
        for i in range(2):
            block = f"transformer.resblocks.{i}."
            for name, part in zip("qkv", ours[f"{block}attn.in_proj_{kind}"].chunk(3)):
                mapped[f"encoder.layers.{i}.self_attn.{name}_proj.{kind}"] = part
            for theirs_name, ours_name in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                                           ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                mapped[f"encoder.layers.{i}.{theirs_name}.{kind}"] = ours[f"{block}{ours_name}.{kind}"]
    mapped = {prefix + name: value for name, value in mapped.items()}
    theirs.load_state_dict({**{name: value for name, value in state.items() if name not in mapped}, **mapped})
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = theirs(pixels).last_hidden_state[:, 1:]
    found = encoder.encode(pixels)
    assert found.shape == expected.shape == (3, 4, 32)
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.9999
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_preprocessing_is_open_clips_own(clip, encoder):
    """Crops, other means, bilinear instead of bicubic: features of a picture that nobody ever saw."""
    import open_clip
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    data = io.BytesIO()
    Image.effect_noise((50, 37), 80).convert("RGB").save(data, "PNG")
    assert torch.equal(encoder.pixels(data.getvalue(), "x"), theirs(Image.open(data).convert("RGB")))


def test_a_batch_changes_nothing(encoder):
    """A squeezed batch of one was read as patches."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder.encode(pixels[:1]), encoder.encode(pixels)[:1], atol=1e-5, rtol=1e-5)
    assert not encoder.tower.training and not any(p.requires_grad for p in encoder.tower.parameters())


def test_another_layer_can_be_named(clip, tmp_path):
    folder = encoder_folder(tmp_path / "other")
    config = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({**config, "nanomind": {"layer": -2}}))
    pixels = torch.randn(1, 3, 32, 32)
    one, two = load_encoder(str(folder)), load_encoder(str(clip))
    assert one.identity["sha256"] != two.identity["sha256"] and not torch.allclose(one.encode(pixels), two.encode(pixels))


def test_the_identity_covers_all_that_features_depend_on(clip, encoder, tmp_path):
    """The same weights with QuickGELU or with another mean had one hash: features kept with the one were read for the other, and a checkpoint took
    either for its own."""
    for number, change in enumerate(({"model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}},
                                     {"preprocess_cfg": {"mean": [0.1] * 3, "std": [0.25] * 3, "resize_mode": "squash"}},
                                     {"model_cfg": {"embed_dim": 16, "vision_cfg": {**VISION, "head_width": 8}, "text_cfg": TEXT}}, {})):
        folder = encoder_folder(tmp_path / str(number))
        config = json.loads((folder / "open_clip_config.json").read_text())
        (folder / "open_clip_config.json").write_text(json.dumps({**config, **change}))
        assert (load_encoder(str(folder)).identity["sha256"] == encoder.identity["sha256"]) == (not change)


@pytest.mark.parametrize("name, weights, message", (
    ("ViT-B-61", "openai", "neither a folder nor a model"), ("ViT-B-16", "none-such", "tags of ViT-B-16"), ("ViT-B-16", "missing.safetensors", "no such file"),
    ("RN50", "none", "choose a ViT"), ("demo-empty", "", "neither a folder nor a model")))
def test_encoders_that_cannot_be_had(name, weights, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_encoder(name, weights)


def test_without_a_network_it_says_what_to_fetch():
    """The tests run with the hub switched off: the reference's weights are not here, and the message says where they are."""
    with pytest.raises(ValueError, match="fetch .* --clip ViT-B-16.* --clip-weights FILE"):
        load_encoder("ViT-B-16", "laion2b_s34b_b88k")


def test_a_tag_decides_the_activation(clip, tmp_path, monkeypatch):
    """OpenAI's weights were trained with QuickGELU. For --clip ViT-B-16 --clip-weights openai open_clip builds a model with plain GELU, warns, and
    every feature is a little wrong."""
    import open_clip
    (tmp_path / "tiny-clip.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(tmp_path)
    tag = {"hf_hub": "someone/tiny/", "mean": (0.1, 0.2, 0.3), "std": (1, 1, 1), "interpolation": "bicubic", "resize_mode": "squash", "quick_gelu": True}
    for place in (open_clip, open_clip.factory):
        monkeypatch.setattr(place, "get_pretrained_cfg", lambda model, name: tag if name == "openai" else {})
        monkeypatch.setattr(place, "download_pretrained", lambda cfg, **_: str(clip / "open_clip_model.safetensors"))
    assert "QuickGELU" in repr(load_encoder("tiny-clip", "openai").tower)
    assert "QuickGELU" not in repr(load_encoder("tiny-clip", str(clip / "open_clip_model.safetensors")).tower)


def test_weights_of_an_encoder_never_run_code(tmp_path):
    """A .pt file from anywhere may be a program."""
    import open_clip
    (tmp_path / "tiny-clip.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(tmp_path)
    weights = tmp_path / "weights.pt"
    for content in (f"cos\nsystem\n(S'touch {tmp_path}/poisoned'\ntR.".encode(), None):
        if content:
            weights.write_bytes(content)
        else:
            torch.save({"visual.proj": Poison(tmp_path / "poisoned")}, weights)
        with pytest.raises(ValueError, match="could not be had"):
            load_encoder("tiny-clip", str(weights))
        assert not (tmp_path / "poisoned").exists()
    torch.load(weights, weights_only=False)
    assert (tmp_path / "poisoned").exists()  # it would have been run


class Poison:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# ---- projector and splice

def test_parameters_are_those_of_the_reference():
    """MiniMind-V prints 104.622M trainable parameters."""
    base = load_preset("base")[0]
    assert base.parameters() + projector_parameters("linear", 768, base.hidden_size) == 104_621_568


def test_dry_run_prints_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main({"stage": "vlm", "preset": "base", "dry_run": True}) is None
    out = capsys.readouterr().out
    assert "0.591M trainable" in out and "104.622M trainable" in out


@pytest.mark.parametrize("marks", ([], [3], [1, 2], [1, 2, 5]))
def test_every_picture_gets_its_places(marks):
    """Adjacent pictures merged, the second dropped: places are counted, not searched for."""
    ids = [0 if place in marks else 7 for place in range(8)]
    found, slots = expand([0, *ids], 0, 4)
    assert len(found) == 9 + 3 * len(marks) and [s for s in slots if s >= 0] == list(range(4 * len(marks))) and slots[0] == -1
    assert [token for token, slot in zip(found, slots) if slot < 0] == [0, *(token for token in ids if token)]


def test_splice(encoder, tokenizer):
    """Each vector stands where its place is; a number that does not fit is an error with both numbers, not a cut."""
    model = seeing(encoder, tokenizer)
    features = torch.randn(2, encoder.patches, encoder.width)
    ids, slots = expand([0, 5, 0, 0, 6], 0, encoder.patches)
    embeddings = model.see(torch.tensor([ids]), features, torch.tensor([slots]))[0]
    torch.testing.assert_close(embeddings[2:10], model.projector(features).flatten(0, 1))
    torch.testing.assert_close(embeddings[[0, 1, 10]], model.model.embed_tokens(torch.tensor([0, 5, 6])))
    with pytest.raises(ValueError, match="8 places .* 4 feature vectors"):
        model.see(torch.tensor([ids]), features[:1], torch.tensor([slots]))
    with pytest.raises(ValueError, match="2 places for pictures and 1 pictures"):
        complete(model, tokenizer, [0, 5, 0, 0, 6], 3, features=features[:1])


def test_the_picture_is_seen(pictures, encoder, tokenizer):
    """Swapping the pictures changes the logits, and the gradient reaches the projector and nothing of the encoder."""
    rows, model = rows_of(pictures, encoder), seeing(encoder, tokenizer)
    batch = next(b for b in rows.every_row() if b.features is not None)
    hidden = model(batch.tokens, batch.doc_ids, features=batch.features, slots=batch.slots)
    other = model(batch.tokens, batch.doc_ids, features=batch.features.roll(1, 0), slots=batch.slots)
    assert not torch.allclose(hidden, other)
    loss, _ = NextToken()(model, batch)
    loss.backward()
    assert model.projector[0].weight.grad.abs().sum() > 0 and all(p.grad is None for p in encoder.tower.parameters())


def test_rows_hold_the_right_pictures(pictures, encoder, tokenizer):
    """The place between folder and batch where pictures went astray: features of the batch, in the order of its slots, are those of the documents."""
    rows = rows_of(pictures, encoder)
    split, counted = rows.split, 0
    for number, batch in enumerate(rows.every_row()):
        indices = range(number * rows.B, min((number + 1) * rows.B, rows.rows))
        wanted = [ref for index in indices for document in rows.bins[index] for ref in rows.pictures(rows.starts[document], rows.ends[document])[1]]
        assert batch.features is not None or not wanted
        if wanted:
            expected = torch.cat([encoder.encode(encoder.pixels(split.image(ref), "x")[None]).half().float() for ref in wanted])
            torch.testing.assert_close(batch.features, expected, atol=2e-3, rtol=2e-3)
            assert batch.slots[batch.slots >= 0].tolist() == list(range(len(wanted) * encoder.patches))
            assert (batch.tokens[batch.slots >= 0] == tokenizer.end_of_text).all() and (batch.labels[batch.slots >= 0] < 0).all()
        counted += len(wanted)
        text = [tokenizer.decode(batch.labels[row][batch.labels[row] >= 0].tolist()) for row in range(len(batch.tokens))]
        assert all(part in (*COLOURS, "玄黄", "", *(f"{a} {b}" for a in COLOURS for b in COLOURS)) for row in text for part in row.split("<|im_end|>"))
    assert counted == len(split.refs)


def test_text_among_the_pictures_trains_too(pictures, encoder, tokenizer):
    """Text mixed into the data: a batch without any picture ended phase 1 with a traceback, for nothing in it led to the projector."""
    for budget in (1e9, 0):
        rows = rows_of(pictures, encoder, budget)
        rows.bins = [[document] for document in range(len(rows.starts)) if not len(rows.pictures(rows.starts[document], rows.ends[document])[1])]
        batch = rows._collate([0, 1])
        assert batch.features.shape == (0, 4, 32) and (batch.slots < 0).all() and batch.n_targets
        model = freeze(seeing(encoder, tokenizer), STAGES["vlm-1"]).train()
        Describe()(model, batch)[0].backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())


def test_a_folder_with_too_few_pictures_is_refused(pictures, encoder):
    """Slots and pictures that disagree were cut to the shorter of both."""
    split = bins.open_folder(pictures).train
    with pytest.raises(ValueError, match=rf"{len(split.refs)} places for pictures in the tokens, but {len(split.refs) - 1} pictures"):
        PackedTokens(replace(split, refs=split.refs[:-1]), bins.open_folder(pictures).tokenizer, 96, 2, whole=True, features=rows_of(pictures, encoder).features)


def test_kept_features_equal_live_ones(pictures, encoder, tokenizer):
    """Two ways to the same numbers, or a run depends on the size of somebody's disk."""
    kept, live = rows_of(pictures, encoder), rows_of(pictures, encoder, budget=0)
    assert kept.features.kept is not None and live.features.kept is None
    model = seeing(encoder, tokenizer)
    for step in range(3):
        a, b = kept.batch(step), live.batch(step)
        torch.testing.assert_close(a.features, b.features, atol=1e-3, rtol=1e-3)
        assert Describe()(model, a)[0].item() == pytest.approx(Describe()(model, b)[0].item(), rel=1e-4)


@pytest.mark.parametrize("chunk", (512, 3))
def test_cache_and_batch_change_nothing_with_pictures(pictures, encoder, tokenizer, chunk, monkeypatch):
    """Greedy text with the cache equals text without it, alone and beside prompts of other lengths, with two pictures, one and none."""
    monkeypatch.setattr("nanomind.generate.PREFILL", chunk)
    model = seeing(encoder, tokenizer).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    features = [torch.randn(n, encoder.patches, encoder.width) if n else None for n in (2, 1, 0)]
    prompts = [[0, 5, 0, 0, 9, 11], [0, 8, 0, 12], [0, 5, 7]]
    together = list(zip(*generate(model, prompts, 8, sampling=judge.GREEDY, features=features)))
    for prompt, own, text in zip(prompts, features, together):
        assert tuple(step[0] for step in generate(model, [prompt], 8, sampling=judge.GREEDY, features=[own])) == text
        ids, slots = expand(prompt, 0, encoder.patches)
        for token in text:
            sight = {} if own is None else {"features": own, "slots": torch.tensor([slots])}
            assert model.logits(model(torch.tensor([ids]), **sight))[0, -1].argmax() == token
            ids, slots = [*ids, token], [*slots, -1]


# ---- both phases

@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures, clip, data_folder, tiny):
    """A text model, then both phases; the folder of the run and the settings of a phase."""
    place = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train.main(dict(data=str(data_folder), preset=str(tiny), seq_len=64, batch_size=4, steps=20, eval_tokens=64.0, threads=1, precision="fp32"))
        train.main(settings(pictures, clip, steps=30))
    return place


def settings(pictures, clip, **more):
    return dict(stage="vlm", data=str(pictures), clip=str(clip), seq_len=96, batch_size=4, eval_tokens=300.0, threads=1, precision="fp32", projector_lr=0.01,
                lr=0.02, adam_lr=0.02, **more)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_phase_1_trains_the_projector_alone(run):
    """A frozen model that drifts is a broken promise, and a broken language model."""
    before, after = (load_file(run / "out/demo" / name / "model.safetensors") for name in ("pretrain", "vlm-1"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    phase_2 = load_file(run / "out/demo/vlm-2/model.safetensors")
    assert any(not torch.equal(before[name], phase_2[name]) for name in before)
    losses = [line["loss"] for line in log(run / "out/demo/vlm-1") if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("budget", (0.0, 1.0))
def test_the_encoder_is_frozen(run, pictures, clip, monkeypatch, budget):
    """An encoder in training mode, or one that learns, is not the one that the checkpoint names: looked at while it works and after a run, with
    features that are kept and with features computed for every batch."""
    monkeypatch.chdir(run)
    encoders, calls, real = [], [], load_encoder

    def watched(*given):
        encoders.append(real(*given))
        tower = encoders[-1].tower
        tower.conv1.register_forward_hook(lambda *_: calls.append((any(part.training for part in tower.modules()), torch.is_grad_enabled())))
        return encoders[-1]
    monkeypatch.setattr("nanomind.vision.load_encoder", watched)
    train.main(settings(pictures, clip, steps=3, phase="2", init="out/demo/vlm-1", run=f"frozen{budget}", feature_budget=budget))
    fresh = real(str(clip)).tower.state_dict()
    expected = {(False, False)} if budget == 0 else set()  # kept ones are there since the first run, and not computed again
    assert len(encoders) == 1 and set(calls) == expected and not any(p.requires_grad for p in encoders[0].tower.parameters())
    assert all(torch.equal(fresh[name], value) for name, value in encoders[0].tower.state_dict().items())


def test_the_picture_is_used(run):
    """The loss goes down without looking, too: only exchanged pictures tell. Reported after every evaluation."""
    reports = [line for line in log(run / "out/demo/vlm-2") if "val_loss" in line]
    assert all("shuffled_loss" in line and "image_gain" in line for line in reports)
    assert reports[-1]["image_gain"] > 0.1, reports[-1]


def test_the_checkpoint_is_a_language_model_with_eyes_beside(run, clip):
    """CLIP's weights saved in every checkpoint cost a gigabyte; a projector among the language model's weights kept others from loading it."""
    from transformers import AutoModelForCausalLM
    folder = run / "out/demo/vlm-2"
    names = {path.name for path in folder.iterdir()}
    assert {"vision.json", "config.json", "model.safetensors"} <= names and len([name for name in names if name.startswith("projector-")]) == 1
    AutoModelForCausalLM.from_pretrained(folder)
    assert not any("visual" in name or "projector" in name for name in load_file(folder / "model.safetensors"))
    model, _ = checkpoint.load(folder)
    assert isinstance(model, VisionLanguageModel) and model.vision["encoder"]["sha256"] == load_encoder(str(clip)).identity["sha256"]


@pytest.mark.parametrize("phase", ("1", "2"))
def test_resume_is_exact_in_each_phase(run, pictures, clip, monkeypatch, phase):
    """The same weights, projector and optimiser, as if it had not stopped."""
    monkeypatch.chdir(run)
    common = dict(phase=phase, init="out/demo/" + ("pretrain" if phase == "1" else "vlm-1"), decay=0.0, save_every=3)
    for name, steps in (("whole", [6]), ("parts", [3, 6])):
        for i, count in enumerate(steps):
            given = settings(pictures, clip, **common, run=f"{name}{phase}", steps=count)
            if i:
                given = {**{key: value for key, value in given.items() if key != "init"}, "resume": True}
            train.main(given)
    for pattern in ("model.safetensors", "projector-6.safetensors", "state-6.safetensors"):
        a, b = (load_file(run / f"out/{name}{phase}/vlm-{phase}" / pattern) for name in ("whole", "parts"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_killed_save_leaves_a_whole_checkpoint(run, monkeypatch, pictures, clip):
    """Projector of one step and language model of another would load without a word."""
    monkeypatch.chdir(run)
    folder = run / "out/demo/vlm-2"
    model, _ = checkpoint.load(folder)
    step = checkpoint.load_progress(folder)[1]["step"]
    optimizer = type("Empty", (), {"tensors": lambda self: {"x": torch.zeros(1)}})()
    real = checkpoint.write_tensors

    def die(path, tensors, metadata):
        if path.name == "model.safetensors":
            raise KeyboardInterrupt
        real(path, tensors, metadata)
    monkeypatch.setattr(checkpoint, "write_tensors", die)
    with torch.no_grad():
        model.projector[0].weight.zero_()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, model, optimizer, {"step": step + 1})
    assert checkpoint.load(folder)[0].projector[0].weight.abs().sum() > 0
    for name in (f"projector-{step + 1}.safetensors", f"state-{step + 1}.safetensors"):
        (folder / name).unlink()


# ---- sample.py

def sample(run, *args, text=None):
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), *map(str, args)], cwd=run, capture_output=True, text=True, input=text)
    return done.returncode, done.stdout, done.stderr


def test_sample_describes_a_folder(run, tmp_path):
    """As the reference prints it; file names may be Chinese."""
    for name, colour in (("红-red.png", "red"), ("蓝.png", "blue")):
        (tmp_path / name).write_bytes(picture(colour))
    code, out, _ = sample(run, "--stage", "vlm", "--image", tmp_path, "--prompt", "quick brown fox?", "--temperature", 0, "--max-new-tokens", 8)
    assert code == 0 and [line for line in out.splitlines() if line.startswith("[Image]")] == ["[Image]: 红-red.png", "[Image]: 蓝.png"]
    code, out, _ = sample(run, "--stage", "vlm", "--phase", 1, "--image", tmp_path / "蓝.png", "--max-new-tokens", 4)
    assert code == 0 and out.count("[Image]") == 1


def test_sample_says_what_is_wrong(run, tmp_path, clip):
    (tmp_path / "text.png").write_text("no picture")
    code, _, err = sample(run, "--stage", "vlm", "--image", tmp_path / "none.png")
    assert code == 2 and "no such file" in err
    code, _, err = sample(run, "--stage", "vlm", "--image", tmp_path / "text.png")
    assert code == 2 and "text.png: not an image" in err and "Traceback" not in err
    (tmp_path / "red.png").write_bytes(picture("red"))
    code, _, err = sample(run, "--stage", "pretrain", "--image", tmp_path / "red.png")
    assert code == 2 and "reads text only" in err
    encoder_folder(clip, seed=1)
    try:
        code, _, err = sample(run, "--stage", "vlm", "--image", tmp_path / "red.png")
        assert code == 2 and "another encoder than this model was trained with" in err
    finally:
        encoder_folder(clip, seed=0)
    try:
        clip.rename(tmp_path / "elsewhere")
        code, _, err = sample(run, "--stage", "vlm", "--image", tmp_path / "red.png")
        assert code == 2 and "where it lies now can be said with --clip" in err.splitlines()[-1]
        code, out, err = sample(run, "--stage", "vlm", "--image", tmp_path / "red.png", "--clip", tmp_path / "elsewhere", "--max-new-tokens", 4)
        assert code == 0 and "[Image]: red.png" in out, err
    finally:
        (tmp_path / "elsewhere").rename(clip)
    code, out, _ = sample(run, "--stage", "vlm", "--prompt", "天地", "--max-new-tokens", 4)
    assert code == 0, "a model with eyes still answers without a picture"


def talk(tokenizer, lines, monkeypatch, model, **more):
    """Lines typed at the terminal -> the Writer that answered them."""
    writer = sample_module.Writer("", model, tokenizer, Sampling(temperature=0), 8, True, **more)
    monkeypatch.setattr("builtins.input", lambda _, typed=iter(lines): next(typed, ""))
    sample_module.converse([writer])
    return writer


def test_a_question_that_is_too_long_does_not_end_the_conversation(encoder, tokenizer, monkeypatch, capsys):
    """A picture cannot be cut off like text: that one question is refused in a line, and the next one is answered."""
    model = seeing(encoder, tokenizer)
    lines = ["/image a.png", "天地" * 300, "/image b.png", "天?"]
    writer = talk(tokenizer, lines, monkeypatch, model, look=lambda paths: torch.zeros(1, encoder.patches, encoder.width))
    assert "shorten the prompt" in capsys.readouterr().out
    assert [turn["role"] for turn in writer.history] == ["user", "assistant"] and len(writer.pictures) == 1


def test_forgotten_turns_take_their_pictures_along(encoder, tokenizer, monkeypatch, capsys):
    """Pictures that stay behind would be shown in the places of later ones."""
    seen = iter(range(1, 99))
    writer = talk(tokenizer, [line for i in range(8) for line in ("/image a.png", "天?")], monkeypatch, seeing(encoder, tokenizer),
                  look=lambda paths: torch.full((1, encoder.patches, encoder.width), float(next(seen))))
    places = sum(part is None for turn in writer.history if turn["role"] == "user" for part in turn["content"])
    assert places == len(writer.pictures) < 8 and [int(features[0, 0, 0]) for features in writer.pictures] == list(range(9 - places, 9))
    said = capsys.readouterr()
    assert "turns are forgotten" in said.err and "places for pictures" not in said.out


def test_flags_of_the_eyes(run, pictures, monkeypatch):
    monkeypatch.chdir(run)
    with pytest.raises(ValueError, match="--clip"):
        train.main({"stage": "sft", "clip": "x", "data": str(pictures)})
    encoder_folder(run / "other", seed=7)
    with pytest.raises(ValueError, match="another encoder than this model was trained with"):  # and not the old one, silently
        train.main({"stage": "vlm", "phase": "2", "init": "out/demo/vlm-1", "run": "new", "data": str(pictures), "clip": "other", "seq_len": 96})
    with pytest.raises(ValueError, match="has no phases"):
        train.main({"stage": "sft", "phase": "1"})
    with pytest.raises(ValueError, match="needs one made by python -m data_prep.chat"):
        train.main({"stage": "sft", "data": str(pictures), "seq_len": 64})


def test_text_use_never_imports_open_clip(run):
    """It costs ten seconds."""
    code = ("import sys; sys.argv = ['sample.py', '--run', 'demo', '--stage', 'vlm', '--prompt', 'x', '--max-new-tokens', '2']; sys.path.insert(0, %r)\n"
            "import sample\nsample.main()\nassert 'open_clip' not in sys.modules" % str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], cwd=run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
