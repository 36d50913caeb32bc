"""Models of other libraries, by name: their own configuration and weights give their own outputs."""

import json

import pytest
import torch
from families import assert_same, pixels, randomise, save, small_trunks, with_text
from safetensors.torch import load_file, save_file

from maskcf_fast.core.tensors import save_tensors
from maskcf_fast.models import VisionTransformer, load_backbone, load_source, preset
from maskcf_fast.models.sources import load_classifier, load_named, load_text_tower
from maskcf_fast.models.weights import architecture_metadata
from maskcf_fast.training.build import build_model
from maskcf_fast.training.runs import read_run
from maskcf_fast.training.trainer import Trainer

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def test_hugging_face_whole_clip_in_shards_and_as_a_pickle(tmp_path):
    with_text("CLIP", tmp_path)
    _, state = load_source(f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: state[name] for name in own}, tmp_path / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = load_source(f"hf:{tmp_path}")[1]
    (tmp_path / "model.safetensors.index.json").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    pickled = load_source(f"hf:{tmp_path}")[1]
    for other in (sharded, pickled):
        assert other.keys() == state.keys()
        assert all(torch.equal(other[name], state[name]) for name in state)


SIGLIP_TEXT = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize("side", [32, 35], ids=["whole patches", "a margin"])
def test_hugging_face_whole_siglip(tmp_path, capsys, side):
    """Beside its text tower, and with a margin that no patch covers, as in so400m-patch14-384."""
    config = transformers.SiglipConfig(text_config=SIGLIP_TEXT, vision_config={**SIZES, "image_size": side})
    theirs = randomise(transformers.SiglipModel(config))
    theirs.save_pretrained(tmp_path)

    images, normalised = pixels(count=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    padded = torch.nn.functional.pad(normalised, (0, side - 32) * 2, value=9.0)
    assert_same(load_named(f"hf:{tmp_path}")(images), theirs.vision_model(pixel_values=padded).pooler_output)
    assert ("patches cover 32 of 35 pixels" in capsys.readouterr().err) == (side == 35)
    config, state = load_source(f"hf:{tmp_path}")
    assert (config.activation, config.mlp_width, config.eps, config.pool) == ("gelu_tanh", 3072, 1e-6, "attention")
    state["vision_model.head.attention.in_proj_weight"] = torch.zeros(3 * 64, 63)
    del state["vision_model.head.layernorm.bias"]
    with pytest.raises(ValueError, match=r"missing pool.ln.bias \[64\]\s+pool.attn.qkv.weight is \[192, 63\], the"):
        load_backbone(VisionTransformer(config), state)


CODE = "raise SystemExit('this must not run')"


@pytest.mark.parametrize("load", ["tower", "classifier", "text tower"])
def test_a_folders_own_code_is_never_run_and_nobody_is_asked(tmp_path, monkeypatch, load):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    names = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForImageClassification": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    (tmp_path / "code.py").write_text(CODE)
    name = f"hf:{tmp_path}"
    call = {
        "tower": lambda: load_source(name),
        "classifier": lambda: load_classifier(name, pretrained=True, prompts=(), device=torch.device("cpu")),
        "text tower": lambda: load_text_tower(name, "cpu"),
    }[load]
    with pytest.raises(ValueError, match="cannot be loaded"):
        call()


@pytest.mark.parametrize("asks", ["code", "kwargs"])
def test_nor_that_of_a_tokenizer_of_open_clip(tmp_path, monkeypatch, asks):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    save("open_clip", "VisionTransformer", tmp_path)
    file = tmp_path / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "mine"
    if asks == "kwargs":
        config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    file.write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Mine", None]}}))
    (tmp_path / "code.py").write_text(CODE)
    with pytest.raises(ValueError, match="asks to run code" if asks == "kwargs" else "cannot be loaded"):
        load_text_tower(f"open_clip:local-dir:{tmp_path}", "cpu")


@pytest.mark.parametrize(
    ("library", "file", "settings"),
    [
        ("timm", "config.json", {"architecture": "vit_base_patch16_224", "model_args": {"depth": 10**9}}),
        ("timm", "config.json", {"architecture": "vit_base_patch16_224", "model_args": {"embed_dim": 10**9}}),
        ("open_clip", "open_clip_config.json", {"model_cfg": {"vision_cfg": {"layers": 10**9}}}),
        ("open_clip", "open_clip_config.json", {"model_cfg": {"vision_cfg": {"width": 1e300}}}),
        ("hf", "config.json", {"model_type": "vit", "num_hidden_layers": 10**9}),
        ("hf", "config.json", {"model_type": "vit", "hidden_size": 10**9}),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_the_library_builds(tmp_path, library, file, settings):
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config.json says \w+=(1000000000|1e\+300), of at most"):
        load_source(f"{library}:{'' if library == 'hf' else 'local-dir:'}{tmp_path}")
    (tmp_path / file).write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"config.json holds no JSON that can be read"):
        load_source(f"{library}:{'' if library == 'hf' else 'local-dir:'}{tmp_path}")


def test_explain_and_zeroshot_take_the_activation_of_the_weights(tmp_path, monkeypatch):
    """As `load_source` does: of weights whose tag says quick_gelu, in a model that says nothing."""
    _, quick = save("open_clip", "VisionTransformer", tmp_path, quick_gelu=True)
    torch.save(quick.state_dict(), tmp_path / "w.pt")
    cfg = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    del cfg["quick_gelu"]
    tag = {"file": str(tmp_path / "w.pt"), "quick_gelu": True, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-Toy", cfg)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-Toy", {"openai": tag})
    prompts, images = ["a cat", "a dog"], torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        text = quick.encode_text(open_clip.get_tokenizer("ViT-B-32")(prompts))
        image = torch.nn.functional.normalize(quick.encode_image(images), dim=-1)
        expected = quick.logit_scale.exp() * image @ torch.nn.functional.normalize(text, dim=-1).T
        torch.testing.assert_close(load_text_tower("open_clip:ViT-Toy/openai", "cpu").encode(prompts), text)
        loaded = load_classifier(
            "open_clip:ViT-Toy/openai", pretrained=True, prompts=prompts, device=torch.device("cpu")
        )
        torch.testing.assert_close(loaded.logits(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("vit_base_patch16_224", {"reg_tokens": 4}, "its registers have position embeddings"),
        ("vit_base_patch16_224", {"global_pool": "max"}, "its feature is pooled by 'max'"),
        ("deit_base_distilled_patch16_224", {}, "it is a VisionTransformerDistilled, neither"),
        ("vit_base_patch16_siglip_224", {"class_token": True}, "its attention pool leaves out a class token"),
        ("vit_base_patch16_224", {"act_layer": "relu"}, "its activation is ReLU"),
        ("vit_base_patch16_224", {"norm_layer": "rmsnorm"}, "its blocks have norms other than"),
        ("vit_tiny_r_s16_p8_224", {"img_size": 128}, "its first layer is a HybridEmbed, no convolution"),
        ("vit_small_patch16_rope_mixed_224", {}, "its rotary positions are RotaryEmbeddingMixed"),
        ("eva02_tiny_patch14_224", {"use_post_norm": True}, "its blocks are not timm's plain"),
        ("VisionTransformer", {"pool_type": "avg"}, "its feature is pooled from all tokens"),
        ("VisionTransformer", {"qk_norm": True}, "its blocks are CustomResidualAttentionBlocks"),
        ("vit_base_patch32_siglip_256", {"timm_proj": "linear"}, "its vision tower has a head of its own: drop, proj"),
    ],
)
def test_what_the_compact_transformer_cannot_express(tmp_path, monkeypatch, kind, options, message):
    library = "open_clip" if kind == "VisionTransformer" or "timm_proj" in options else "timm"
    if "timm_proj" in options:
        small_trunks(monkeypatch)
    name, _ = save(library, kind, tmp_path, **options)
    with pytest.raises(ValueError, match=f"not supported because {message}"):
        load_source(name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.SiglipVisionConfig(**SIZES, vision_use_head=False), "its attention pool is left out"),
        (lambda: transformers.Siglip2VisionConfig(), "its images are of any shape"),
        (lambda: transformers.DINOv3ViTConfig(**SIZES, mlp_bias=False), "only some of its layers have a bias"),
        (lambda: transformers.ViTConfig(**SIZES, hidden_act="relu"), "its activation is relu"),
        (lambda: transformers.BertConfig(), "bert is none of clip, metaclip_2, siglip"),
    ],
)
def test_hugging_face_models_that_are_refused(tmp_path, config, message):
    config().save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"not supported because {message}"):
        load_source(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip:ViT-B-32", r"open_clip:MODEL/PRETRAINED, hf:ID_OR_FOLDER or timm:MODEL.TAG, got.*mean 'open_clip'"),
        ("open_clip:ViT-B-23/openai", r"no model 'ViT-B-23'; did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32/opnai", r"needs one of .*got 'opnai'; did you mean 'openai'"),
        ("timm:vit_base_patch16_clip_223.openai", r"no model.*did you mean 'vit_base_patch16_clip_224'"),
        ("timm:vit_base_patch16_clip_224.opnai", r"(?s)opnai"),
        ("hf:/absent/folder", "cannot be loaded"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        load_source(name)


def test_tensors_that_do_not_fit_their_configuration_are_named(tmp_path):
    config, state = load_source(save("timm", "vit_base_patch16_224", tmp_path)[0])
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(3, 64)
    state["blocks.1.extra"] = torch.zeros(2)
    del state["norm.bias"]
    message = r"(?s)missing ln_post\.bias \[64\].*unexpected blocks\.1\.extra \[2\].*blocks\.1\.fc\.weight is \[3, 64\]"
    with pytest.raises(ValueError, match=message):
        load_backbone(VisionTransformer(config), state)
    assert "norm.bias" in load_file(tmp_path / "model.safetensors")


def test_a_run_starts_from_a_named_model_and_is_rebuilt_from_its_own_file(tmp_path, change):
    source = tmp_path / "source"
    source.mkdir()
    name, _ = save("timm", "vit_small_patch14_dinov2", source)
    config = change(model={"name": name, "weights": None, "head_kind": "linear"}, optim={"epochs": 1, "lr": 1e-4})
    trainer = Trainer(config, quiet=True)
    student = trainer.method.student
    assert student.backbone.config == load_source(name)[0]
    assert torch.equal(
        student.backbone.blocks[0].scale_1, load_file(source / "model.safetensors")["blocks.0.ls1.gamma"]
    )
    trainer.run()
    (source / "model.safetensors").unlink()  # a run's own file says all that is needed
    run = read_run(config.out)
    rebuilt = run.tuned()
    again = change(model={"name": name, "weights": run.weights, "head_kind": "linear"}, out=tmp_path / "again")
    assert torch.equal(Trainer(again, quiet=True).method.student(images := torch.rand(2, 3, 32, 32)), rebuilt(images))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(rebuilt(images), student.eval()(images))
    with pytest.raises(ValueError, match="cannot be loaded"):
        run.initial()


def test_a_name_and_weights_exclude_each_other(change):
    with pytest.raises(ValueError, match=r"--model.name brings its own weights: leave out --model.weights"):
        change(model={"name": "timm:x"}).validate()


def test_settings_are_checked_against_the_named_model(tmp_path, change):
    name, _ = save("timm", "vit_base_patch16_224", tmp_path)
    config = change(model={"name": name, "weights": None}, method={"top_k": 17})
    with pytest.raises(ValueError, match="top_k=17 exceeds the 16 patches of timm:"):
        Trainer(config, quiet=True)


def test_a_weights_file_of_another_architecture_is_refused(change, tmp_path):
    """Activation and normalisation change no tensor's shape."""
    other = preset("tiny", activation="quick_gelu", std=(0.5, 0.5, 0.5))
    save_tensors(tmp_path / "x.safetensors", VisionTransformer(other).state_dict(), architecture_metadata(other))
    config = change(model={"weights": tmp_path / "x.safetensors"}).model
    with pytest.raises(ValueError, match=r"activation is quick_gelu, not gelu, std is \(0.5, 0.5, 0.5\), not"):
        build_model(config, 3, seed=0)


def test_a_timm_file_as_weights_of_a_preset_gives_no_head(tmp_path, change):
    """Its ``head.weight`` is the projection."""
    save("timm", "vit_base_patch16_clip_224", tmp_path, embed_dim=96, depth=4, num_classes=64)
    config = change(model={"weights": tmp_path / "model.safetensors"}).model
    model = build_model(config, 64, seed=0)
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(model.backbone.projection.T, state["head.weight"])
    assert not torch.equal(model.head.weight, state["head.weight"])


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion2b_s34b_b79k", False)])
def test_open_clips_activation_is_that_of_the_weights(monkeypatch, tag, quick):
    create = open_clip.create_model

    def without_weights(name, pretrained=None, **options):
        return create(name, None, **options)

    monkeypatch.setattr(open_clip, "create_model", without_weights)
    config, state = load_source(f"open_clip:ViT-B-32/{tag}")
    assert config.activation == ("quick_gelu" if quick else "gelu")
    assert (config.image_size, config.patch_size, config.output_dim) == (224, 32, 512)
    assert state["conv1.weight"].shape == (768, 3, 32, 32)


def test_timms_other_activation_is_pointed_out(capsys, monkeypatch):
    create = timm.create_model
    small = {"embed_dim": 64, "depth": 1, "num_heads": 4}
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, **small))
    assert load_source("timm:vit_base_patch16_clip_224.openai")[0].activation == "gelu"
    assert "timm has as vit_base_patch16_clip_quickgelu_224" in capsys.readouterr().err
    assert load_source("timm:vit_base_patch16_clip_quickgelu_224.openai")[0].activation == "quick_gelu"
    assert capsys.readouterr().err == ""
