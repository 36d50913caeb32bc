"""The page, in Python and in a browser; the command; the rows for TensorBoard."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import maskcf_fast as mf
from maskcf_fast.core.tensors import save_tensors
from maskcf_fast.data import scan_images
from maskcf_fast.data.transforms import resize_and_crop
from maskcf_fast.methods import FILLS, CounterfactualDistiller, MaskStrategy, strategy_names
from maskcf_fast.methods.label_map import LabelMap
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer, preset
from maskcf_fast.training.build import build_method
from maskcf_fast.training.settings import DataConfig, MethodConfig, ModelConfig, TrainConfig, to_yaml
from maskcf_fast.visualization.board import board_images, rows_for_board
from maskcf_fast.visualization.draws import Draws
from maskcf_fast.visualization.maps import counterfactuals, explain_labels
from maskcf_fast.visualization.plots import heat_maps, kept_patches
from maskcf_fast.visualize import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium or Chrome to open the page with")
ODD = "<script>alert(1)<!-- @DATA@.png"  # a file's name, and what must not become of it
VOID = {"meta", "img", "input"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, image_folders):
    """A finished run of a random model, whose strategy cuts by top-k."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir()
    torch.manual_seed(3)
    model = ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 3))
    save_tensors(folder / "model.safetensors", model.state_dict())
    settings = TrainConfig(
        model=ModelConfig("tiny"),
        data=DataConfig(image_folders["train"]),
        method=MethodConfig(strategy="context-single", top_k=5),
    )
    (folder / "config.yaml").write_text(to_yaml(settings))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory, write_images):
    """Two images of each class, and one of none, with an odd name."""
    root = write_images(tmp_path_factory.mktemp("looked-at") / "pictures", 2, 7)
    (root / "other").mkdir()
    pixels = np.random.default_rng(1).integers(0, 255, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "other" / ODD)
    return root


def visualize(run, images, *options):
    return main(["--run", str(run), "--images", str(images), "--device", "cpu", *options])


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def array(text, kind):
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), kind).copy())


def pixels_of(uri):
    kind, text = uri.split(",")
    assert kind == "data:image/png;base64"
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(text)))))


def donors_of(data, fill):
    return torch.stack([array(image["fills"][fill]["donors"], "<u2").long() for image in data["images"]])


@pytest.fixture(scope="module")
def page(run, images):
    assert visualize(run, images) == 0
    return (run / "visualize" / "index.html").read_text()


class Balance(html.parser.HTMLParser):
    """Every element that is opened is closed, in order; and what is loaded or linked."""

    def __init__(self, page):
        super().__init__()
        self.open, self.addresses, self.ids = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_from_outside(page):
    found = Balance(page)
    assert found.open == []
    assert found.addresses == []
    assert len(set(found.ids)) == len(found.ids)
    assert page.count("<script") == 2
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|@[A-Z]+@", page.replace("@DATA@.png", ""))
    assert "default-src 'none'" in page
    assert len(page) < 100_000  # of seven small images


def test_page_holds_what_the_model_sees(page, run, images):
    data = data_of(page)
    assert (data["size"], data["grid"]) == (32, 4)
    names = [f"{name}/{i:03d}.jpg" for name in ("cat", "dog", "owl") for i in range(2)]
    assert [image["name"] for image in data["images"]] == sorted([*names, f"other/{ODD}"])
    pixels = torch.stack([pixels_of(image["source"]) for image in data["images"]])
    truth = [resize_and_crop(Image.open(images / image["name"]), 32) for image in data["images"]]
    assert np.array_equal(pixels, np.stack(truth))

    model = ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 3))
    model.load_state_dict(load_file(run / "model.safetensors"))
    share, chosen = model(pixels).softmax(1).max(1)
    classes = ["cat", "dog", "owl"]
    labels = [image["name"].split("/")[0] for image in data["images"]]
    labels = [label if label in classes else None for label in labels]
    assert [image["label"] for image in data["images"]] == labels
    assert labels.count(None) == 1
    assert [image["prediction"] for image in data["images"]] == [classes[i] for i in chosen]
    assert torch.allclose(torch.tensor([image["probability"] for image in data["images"]]), share, atol=1e-6)

    # The map, by the method's own step.
    target = torch.tensor([int(chosen[i]) if label is None else classes.index(label) for i, label in enumerate(labels)])
    step = CounterfactualDistiller(model, VisionTransformer("tiny"), "object-single")(pixels, target)
    cam = torch.stack([array(image["cam"], "<f4") for image in data["images"]])
    assert torch.allclose(cam, step.cam, rtol=1e-4, atol=1e-8)
    heats = torch.stack([pixels_of(image["heat"]) for image in data["images"]])
    assert np.array_equal(heats, heat_maps(pixels, cam))

    assert [strategy["name"] for strategy in data["strategies"]] == list(strategy_names())
    cuts = {s["name"]: (s["threshold"], s["top_k"], s["rate"]) for s in data["strategies"]}
    for name in strategy_names():
        own = MaskStrategy.from_name(name, **({"top_k": 5} if name == "context-single" else {}))
        assert cuts[name] == (own.threshold, own.top_k, own.rate)
    donors = {name: donors_of(data, name) for name in ("single", "multi")}
    assert sorted(donors["single"][:, 0].tolist()) == list(range(7))
    assert (donors["single"] == donors["single"][:, :1]).all()
    assert (donors["multi"] != donors["multi"][:, :1]).any()
    for i, image in enumerate(data["images"]):
        assert not any((each[i] == i).any() for each in donors.values())
        assert image["fills"]["none"] == {}
        assert array(image["noise"], "<f4").shape == (16,)


def test_pictures(page, run):
    files = sorted((run / "visualize").glob("*.png"))
    assert [file.name[:8] for file in files[:2]] == ["001-000.", "002-001."]
    assert len(files) == 7
    for file in files:
        picture = np.array(Image.open(file).convert("RGB"))
        assert picture.shape[1] > 4 * picture.shape[0]
        assert (np.abs(picture.astype(int) - (230, 97, 1)).sum(2) < 150).mean() > 0.02  # masks


def test_draws_are_what_the_strategies_draw():
    draws = Draws.draw(5, 49, torch.Generator().manual_seed(4))
    for name in strategy_names():
        draw, strategy = draws.of(MaskStrategy.from_name(name)), MaskStrategy.from_name(name)
        assert (draw.donors is not None) == strategy.filling.other_images
        assert (draw.mask is None) == (not name.startswith("random"))
        if draw.donors is not None:
            assert draw.donors.shape == ((5,) if strategy.fill == "single" else (5, 49))
    single, multi = draws.donors["single"], draws.donors["multi"]
    assert sorted(single.tolist()) == list(range(5))
    assert not (single == torch.arange(5)).any()
    assert not (multi == torch.arange(5)[:, None]).any()
    alone = Draws.draw(1, 49, torch.Generator().manual_seed(4))
    assert not alone.donors["single"].any()
    assert not alone.donors["multi"].any()
    # Without donors, noise is the first thing that a strategy draws.
    strategy = MaskStrategy.from_name("random-none")
    noise = torch.rand(5, 49, generator=torch.Generator().manual_seed(6))
    expected = strategy.draw(5, 49, generator=torch.Generator().manual_seed(6)).mask
    assert torch.equal(replace(draws, noise=noise).of(strategy).mask, expected)


def test_counterfactuals_patch_by_patch():
    images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    cam = torch.rand(3, 4)
    draws = Draws.draw(3, 4, torch.Generator().manual_seed(0))
    for name in ("object-single", "context-multi", "object-none"):
        strategy = MaskStrategy.from_name(name)
        mask, made = counterfactuals(strategy, images, cam, draws.of(strategy))
        for n in range(3):
            for p in range(4):
                at = (slice(p // 2 * 4, p // 2 * 4 + 4), slice(p % 2 * 4, p % 2 * 4 + 4))
                donor = {"single": draws.donors["single"][n], "multi": draws.donors["multi"][n, p], "none": 0}[
                    strategy.fill
                ]
                filling = torch.full((4, 4, 3), 230) if strategy.fill == "none" else images[donor][at]
                assert torch.equal(made[n][at], (filling if mask[n, p] else images[n][at]).to(torch.uint8))


def test_heat_map_follows_the_definition():
    images = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    from matplotlib import colormaps

    heat = heat_maps(images, torch.tensor([[0.0, 1.0, 2.0, 4.0], [float("nan"), 1.0, 1.0, 1.0]]))
    colour = np.array(colormaps["inferno"](0.25)[:3])  # the upper right patch
    assert np.allclose(heat[0, 0, 2], 0.4 * images[0, 0, 2].float().mean().item() + 153 * colour, atol=1.5)
    black = np.array(colormaps["inferno"](0.0)[:3])
    assert np.allclose(heat[1, 3, 3], 0.4 * images[1, 3, 3].float().mean().item() + 153 * black, atol=1.5)


# In the browser.


HARNESS = """<script>
(async (given) => {@BODY@})(@GIVEN@).catch((error) => ({ error: String(error) })).then((value) => {
  const result = Object.assign(document.createElement("pre"), { id: "result" });
  result.textContent = encodeURIComponent(JSON.stringify(value));
  document.body.append(result);
});
</script></body>"""


def in_browser(page, tmp_path, script, given):
    """The value of an async function body ``script`` in the page, with ``given`` as its argument."""
    harness = HARNESS.replace("@GIVEN@", json.dumps(given)).replace("@BODY@", script)
    path = tmp_path / "tested.html"
    path.write_text(page.replace("</body>", harness))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    options = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900", path.as_uri()]
    for _ in range(3):  # on a busy machine the browser's time may be over before the page has answered
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
        found = re.search(r'<pre id="result">([^<]*)</pre>', done.stdout)
        if found:
            break
    assert found, done.stderr[-2000:]
    result = json.loads(unquote(found[1]))
    assert "error" not in result, result
    return result


@needs_chromium
def test_selection_in_the_browser_is_select_patches(page, tmp_path):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(60, 49, generator=generator) ** 3 * 10.0 ** torch.randint(-9, 4, (60, 1), generator=generator)
    maps[10:20] = (maps[10:20] * 1e3).round() / 4  # ties
    maps[20:30] = torch.randint(0, 4, (10, 49), generator=generator).float()
    maps[30] = 0
    maps[31, 3], maps[32, 4] = float("nan"), float("inf")
    # Scores a hair's breadth above, at and below the cut: in float64 some of them would fall on the other side.
    cuts = [0.0, 0.1, 0.3, 0.6, 0.87, 1.0]
    for i, cut in enumerate(cuts):
        rows = maps[40 + i]
        rows[0] = 1.0
        scale = torch.tensor(1.0) + 1e-8
        at = torch.tensor(cut) * scale
        up, down = (torch.nextafter(at, torch.tensor(x)) for x in (2.0, -1.0))
        rows[1:] = torch.rand(48, generator=generator)
        rows[1], rows[2], rows[3] = at, up, down.clamp(min=0)
    # And scores that round to the cut exactly, some of them from above.
    cuts += (maps[46:56, 7] / (maps[46:56].amax(1) + 1e-8)).tolist()
    given = {
        "maps": base64.b64encode(maps.numpy().astype("<f4").tobytes()).decode(),
        "cuts": cuts,
        "ks": [0, 1, 7, 48, 49],
        "rates": [0.0, 0.3, 0.5, 0.75, 1.0],
    }
    script = """
        const all = numbers(given.maps, Float32Array), rows = [];
        for (let i = 0; i < all.length; i += 49) rows.push(all.slice(i, i + 49));
        const bits = (mask) => mask.map(Number).join("");
        const over = (values, select) => values.map((v) => rows.map((row) => bits(select(row, v))));
        const regions = ["object", "context"];
        return {
          threshold: regions.map((r) => over(given.cuts, (row, v) => selectByThreshold(row, v, r))),
          topK: regions.map((r) => over(given.ks, (row, v) => selectTopK(row, v, r))),
          none: over(given.rates, (row, v) => selectRandom(row, v, true)),
          single: over(given.rates, (row, v) => selectRandom(row, v, false)),
        };"""
    result = in_browser(page, tmp_path, script, given)

    def masks(rows):
        return torch.tensor([[bit == "1" for bit in row] for row in rows])

    for region, by_cut, by_k in zip(("object", "context"), result["threshold"], result["topK"], strict=True):
        for cut, rows in zip(given["cuts"], by_cut, strict=True):
            assert torch.equal(masks(rows), mf.select_patches(maps, threshold=cut, region=region))
        for k, rows in zip(given["ks"], by_k, strict=True):
            assert torch.equal(masks(rows), mf.select_patches(maps, top_k=k, region=region))
    for rate, dropped, drawn in zip(given["rates"], result["none"], result["single"], strict=True):
        usable = Draws(dict.fromkeys(FILLS), maps)
        for fill, rows in (("none", dropped), ("single", drawn)):
            expected = usable.of(MaskStrategy("random", fill, rate=rate)).mask
            assert torch.equal(masks(rows), expected)


@needs_chromium
def test_page_draws_the_counterfactual_images(page, tmp_path):
    """Every canvas as Python makes it: at first, after each slider, and after going back."""
    script = """
        const { page, entries } = await started;
        const shot = () => {
          entries.forEach((entry) => entry.card.scrollIntoView());
          return entries.map((entry) => entry.pairs.map((pair) => {
            const canvas = pair.querySelector(".filled");
            const bytes = canvas.getContext("2d").getImageData(0, 0, page.size, page.size).data;
            return btoa(String.fromCharCode(...bytes));
          }));
        };
        const move = (id, value) => {
          const slider = document.getElementById(id);
          slider.value = value;
          entries.forEach((entry) => { entry.visible = true; });
          slider.dispatchEvent(new Event("input"));
        };
        const shots = [shot()];
        move("threshold", 0.45); shots.push(shot());
        move("top-k", 6); move("rate", 0.2); shots.push(shot());
        const words = entries[0].pairs.map((pair) => pair.querySelector("span").textContent);
        document.getElementById("own").click(); shots.push(shot());
        document.getElementById("redraw").click();
        const redrawn = page.images.map((image) => [...image.fills.single.donors, ...image.fills.multi.donors]);
        const heading = entries[4].card.querySelector("h2").textContent;
        return { shots, words, heading, redrawn, max: document.getElementById("top-k").max,
                 overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth };"""
    result = in_browser(page, tmp_path, script, None)
    data = data_of(page)
    pixels = torch.stack([pixels_of(image["source"]) for image in data["images"]])
    cam, noise = (torch.stack([array(image[key], "<f4") for image in data["images"]]) for key in ("cam", "noise"))
    draws = Draws({"single": donors_of(data, "single"), "multi": donors_of(data, "multi"), "none": None}, noise)
    own = [MaskStrategy(**{k: v for k, v in s.items() if k not in ("name", "exactly")}) for s in data["strategies"]]
    moved = [
        own,
        [s if s.rate is not None else replace(s, threshold=0.45, top_k=None) for s in own],
        [replace(s, rate=0.2) if s.rate is not None else replace(s, threshold=None, top_k=6) for s in own],
        own,
    ]
    for shot, strategies in zip(result["shots"], moved, strict=True):
        for j, strategy in enumerate(strategies):
            mask, made = counterfactuals(strategy, pixels, cam, draws.of(strategy))
            drawn = torch.stack([array(shot[i][j], np.uint8).view(32, 32, 4) for i in range(len(pixels))])
            if strategy.fill != "none":
                assert torch.equal(drawn[..., :3], made), strategy.name
                assert (drawn[..., 3] == 255).all()
            else:
                left_out = torch.from_numpy((kept_patches(np.zeros((7, 32, 32, 3), np.uint8), mask) == 230)[..., 0])
                assert torch.equal(drawn[..., 3] == 0, left_out)
                assert torch.equal(drawn[..., :3][~left_out], pixels[~left_out])
    assert result["words"][0].startswith("highest 6 · 6 of 16 · from ")
    assert result["words"][3].startswith("lowest 6 · 6 of 16")
    assert result["words"][6].startswith("rate 0.2 · ")
    assert result["heading"] == f"5 · other/{ODD}"
    assert result["max"] == "16"
    assert sorted(donors[0] for donors in result["redrawn"]) == list(range(7))
    for i, donors in enumerate(result["redrawn"]):
        assert i not in donors
        assert set(donors) <= set(range(7))
    assert result["overflow"] == 0


# The command.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategies", "object-singel"], "unknown strategy 'object-singel'.*did you mean 'object-single'"),
        (["--run", "/absent"], "/absent is no run"),
        (["--images", "/absent"], "there is no folder of images /absent: check --images"),
        (["--images", "{bare}"], "there are no images in .*bare .files ending in .*png"),
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--seed", str(2**31)], "--seed must be from 0 to"),
        (["--count", "1"], "object-single takes patches of other images.*raise --count.*--strategies object-none"),
        (["--weights", "best"], "has no best.safetensors"),
        (["--classes", "/absent.txt"], "/absent.txt: no such file"),
        (["--strategies"], "--strategies names none"),
    ],
)
def test_mistakes_are_one_message(run, images, tmp_path, capsys, options, message):
    out, bare = tmp_path / "look", tmp_path / "bare"
    bare.mkdir()
    options = [option.format(run=run, bare=bare) for option in options]
    assert visualize(run, images, "--out", str(out), *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error, re.DOTALL), error
    assert not out.exists()


def test_few_strategies_one_image_and_a_broken_one(run, images, tmp_path, capsys):
    folder = tmp_path / "owl"
    shutil.copytree(images / "owl", folder)
    (folder / "000.jpg").write_bytes(b"no image")
    out = folder / "look"
    for _ in range(2):  # the second time, pictures of the first lie among the images
        assert visualize(run, folder, "--out", str(out), "--strategies", "object-none", "context-none") == 0
        data = data_of((out / "index.html").read_text())
        assert [image["name"] for image in data["images"]] == ["001.jpg"]
        assert data["images"][0]["label"] == "owl"  # the folder itself is called so
        assert [strategy["name"] for strategy in data["strategies"]] == ["object-none", "context-none"]
    assert "skipped: " in capsys.readouterr().err
    (folder / "001.jpg").write_bytes(b"")
    assert visualize(run, folder, "--out", str(out)) == 1
    assert "none of the 2 images" in capsys.readouterr().err
    assert visualize(run, run / "config.yaml", "--out", str(out)) == 1
    assert re.search("skipped: .*config.yaml: not an image.*\nerror: none of the 1 images", capsys.readouterr().err)


def test_count_is_spread_over_the_classes(run, image_folders, tmp_path):
    options = ["--count", "3", "--strategies", "random-single", "--out", str(tmp_path / "look")]
    assert visualize(run, image_folders["id"], *options) == 0
    data = data_of((tmp_path / "look" / "index.html").read_text())
    assert [image["label"] for image in data["images"]] == ["cat", "dog", "owl"]


# The rows for TensorBoard.


def test_board_takes_the_map_that_the_method_takes(image_folders):
    torch.manual_seed(0)
    student, teacher = (ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 3)) for _ in range(2))
    images, labels = board_images(scan_images(image_folders["id"]), 32)
    shown = []
    for source in ("student", "teacher"):
        method = CounterfactualDistiller(student, teacher, "object-single", cam_source=source)
        rows = rows_for_board(method, images, labels, torch.Generator().manual_seed(0))
        cam = method(images, labels, generator=torch.Generator().manual_seed(0)).cam
        heats = rows[:528, 132:264].unflatten(0, (4, 132))[:, 4::4, 4::4]
        assert np.abs(heats.numpy().astype(int) - heat_maps(images, cam)).max() <= 1
        shown.append(heats)
    assert not torch.equal(*shown)


@pytest.mark.parametrize(("name", "columns"), [("counterfactual", 3), ("ft", 2), ("lp", 2), ("fd", 2), ("kd", 2)])
def test_rows_for_board(image_folders, name, columns):
    torch.manual_seed(0)
    student = ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 3))
    method = build_method(MethodConfig(name, strategy="object-multi"), student).train()
    manifest = scan_images(image_folders["id"])
    images, labels = board_images(manifest, 32)
    assert labels.tolist() == [0, 1, 1, 2]
    first = resize_and_crop(Image.open(manifest.root / manifest.paths[1]), 32)
    assert np.array_equal(images[0], first)

    before = torch.get_rng_state()
    rows = rows_for_board(method, images, labels, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert student.training
    assert all(p.grad is None for p in method.parameters())

    assert rows.dtype == torch.uint8
    assert rows.shape == (4 * 132 + 4, columns * 132 + 4, 3)
    cells = [[rows[r * 132 + 4 : r * 132 + 132 : 4, c * 132 + 4 : c * 132 + 132 : 4] for c in range(columns)]
             for r in range(4)]  # fmt: skip
    assert torch.equal(torch.stack([row[0] for row in cells]), images)
    cam, _ = explain_labels(student, LabelMap("relevance", "logit", 0, student.backbone.config), images, labels)
    assert np.array_equal(torch.stack([row[1] for row in cells]), heat_maps(images, cam))
    if columns == 3:
        draws = Draws.draw(4, 16, torch.Generator().manual_seed(5))
        mask = mf.select_patches(cam, threshold=0.6)
        refilled = mf.refill_patches(images.permute(0, 3, 1, 2), mask, draws.donors["multi"]).permute(0, 2, 3, 1)
        assert torch.equal(torch.stack([row[2] for row in cells]), refilled)
        assert mask.any()


@pytest.mark.parametrize("of_run", [True, False])
@pytest.mark.parametrize("option", [None, True, False])
def test_images_are_turned_as_in_the_run(run, tmp_path, of_run, option):
    shutil.copytree(run, tmp_path / "run")
    settings = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(settings.replace("exif: true", f"exif: {str(of_run).lower()}"))
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    options = [] if option is None else ["--exif", str(option)]
    assert visualize(tmp_path / "run", tmp_path / "a.png", "--strategies", "object-none", *options) == 0
    data = data_of((tmp_path / "run" / "visualize" / "index.html").read_text())
    upright = of_run if option is None else option
    assert np.array_equal(pixels_of(data["images"][0]["source"]), pixels[::-1, ::-1] if upright else pixels)


def test_the_page_of_a_run_at_another_image_size(run, images, tmp_path):
    """48 px and 36 patches: of the pictures, the maps, the donors and what the board shows."""
    folder = tmp_path / "larger"
    folder.mkdir()
    model = ImageClassifier(VisionTransformer(preset("tiny", image_size=48)), CosineClassifier(64, 3))
    save_tensors(folder / "model.safetensors", model.state_dict())
    text = (run / "config.yaml").read_text()
    assert text.count("image_size: null") == 1
    (folder / "config.yaml").write_text(text.replace("image_size: null", "image_size: 48"))
    assert visualize(folder, images) == 0
    data = data_of((folder / "visualize" / "index.html").read_text())
    assert {len(array(image["cam"], "<f4")) for image in data["images"]} == {36}
    assert donors_of(data, "multi").shape == (len(data["images"]), 36)
    assert pixels_of(data["images"][0]["source"]).shape == (48, 48, 3)
