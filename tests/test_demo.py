"""What the page computes, without a browser; then the page itself, in headless Chromium."""

import base64
import contextlib
import copy
import io
import math
import shutil
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

from harness.folder import read_images

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, build_page, environment, far_from_zero, started, train
from PIL import Image

import demo
import sample
from model import VQVAE


@pytest.fixture(scope="session")
def page(prior_run):
    return demo.load_page(str(prior_run))


@pytest.fixture(scope="session")
def two_levels():
    torch.manual_seed(0)
    model = VQVAE(3, (28, 30), codebook_size=16, code_dim=8, width=8, blocks=1, levels=2, kmeans_start=False)
    for level in model.levels:
        torch.nn.init.normal_(level.quantizer.codebook)
    return model.eval()


def random_levels(model, count=3):
    height, width = (-(-side // model.strides[0]) * model.strides[0] for side in model.image_size)
    return [torch.randint(0, 16, (count, height // stride, width // stride)) for stride in model.strides]


def file_of(pixels, kind="PNG"):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def decoded(model, levels):
    """What the decoder makes of the codes (h, w) of one image, (C, H, W) uint8."""
    with torch.no_grad():
        return (model.decode([codes[None] for codes in levels])[0] * 255).round().to(torch.uint8)


# Without a browser


@pytest.mark.parametrize("level", [0, 1])
def test_palette_shows_mean_patches(two_levels, level):
    """Summed by a loop over where a code stands; code 5 is in no image, and is shown among its own kind."""
    levels, stride = random_levels(two_levels, 30), two_levels.strides[level]
    levels[level][levels[level] == 5] = 6
    codes, patches = demo.make_palette(two_levels, levels, level)
    assert sorted(codes) == list(range(16))
    with torch.no_grad():
        whole = [stride * side for side in levels[level].shape[1:]]
        images = (two_levels.decode(levels, whole) * 255).round()
        alone = [None, None]
        alone[level] = torch.full((1, 4, 4), 5)
        field = (two_levels.decode(alone, [4 * stride] * 2) * 255).round()
    for code, patch in zip(codes, patches):
        places = [[i * stride for i in place] for place in (levels[level] == code).nonzero()[:, 1:].tolist()]
        of_image = (levels[level] == code).nonzero()[:, 0].tolist()
        found = [images[n, :, y : y + stride, x : x + stride] for n, (y, x) in zip(of_image, places)]
        expected = sum(found) / len(found) if found else field[0, :, stride : 2 * stride, stride : 2 * stride]
        assert (patch - expected).abs().max() <= 0.51


@pytest.mark.parametrize("level", [0, 1, 2])
def test_palette_of_scales_shows_mean_patches(level):
    """Summed by a loop; the side of a patch is rounded up, where the scale does not divide the image."""
    torch.manual_seed(0)
    model = VQVAE(3, (12, 20), 16, 8, 8, 1, scales="1,2x3,3x5", kmeans_start=False).eval()
    torch.nn.init.normal_(model.levels[0].quantizer.codebook)
    levels = [torch.randint(0, 12, (30, *size)) for size in model.scales]
    codes, patches = demo.make_palette(model, levels, level)
    height, width = model.scales[level]
    side = [20, 7, 4][level]
    with torch.no_grad():
        images = (model.decode(levels) * 255).round()
    images = F.interpolate(images, (height * side, width * side), mode="bilinear")
    for code, patch in zip(codes, patches):
        places = (levels[level] == code).nonzero().tolist()
        found = [images[n, :, y * side :, x * side :][:, :side, :side] for n, y, x in places]
        assert not found or (patch - sum(found) / len(found)).abs().max() <= 0.51
    assert sorted(codes) == list(range(16)) and patches.shape == (16, 3, side, side)


def test_palette_neighbours_look_alike(two_levels):
    _, patches = demo.make_palette(two_levels, random_levels(two_levels, 20), 1)
    flat = patches.flatten(1).float()
    distances = torch.cdist(flat, flat)
    assert distances.diagonal(1).mean() < 0.8 * distances.sum() / (16 * 15)


def test_large_codebook_shows_its_most_used(two_levels, monkeypatch):
    monkeypatch.setattr(demo, "PALETTE", 4)
    monkeypatch.setitem(two_levels.levels[0].quantizer._buffers, "ema_counts", torch.arange(16.0))
    codes, patches = demo.make_palette(two_levels, random_levels(two_levels), 0)
    assert sorted(codes) == [12, 13, 14, 15] and len(patches) == 4


def test_changed_code_changes_the_image(page):
    edit = demo.edit_image(page.model, page.examples[0])
    assert torch.equal(edit.levels[0], page.model.encode(page.examples[:1] / 255)[0][0])
    changed = demo.replace_code(demo.choose(edit, 0, 8), 0, 3)
    expected = edit.levels[0].clone()
    expected[1, 1] = 3
    assert torch.equal(changed.levels[0], expected)
    assert torch.equal(demo.render(page.model, [expected[None]])[0], decoded(page.model, [expected]))


def test_back_undoes_each_change(page):
    edits = [demo.edit_image(page.model, page.examples[0])]
    before = edits[0].levels[0].clone()
    for place, code in ((0, 1), (1, 2), (1, 3)):
        edits.append(demo.replace_code(demo.choose(edits[-1], 0, place), 0, code))
    edit = edits[-1]
    for earlier in (*edits[2::-1], edits[0]):
        edit = demo.undo(edit)
        assert torch.equal(edit.levels[0], earlier.levels[0])
    assert torch.equal(edit.levels[0], before)


def test_choice_stays_within_the_grid(page):
    """Whatever position a request names."""
    edit = demo.edit_image(page.model, page.examples[0])
    assert [demo.choose(edit, 0, position).chosen for position in (-1, 48, 49)] == [(0,), (48,), (48,)]


def test_each_level_keeps_its_choice(two_levels):
    edit = demo.edit_image(two_levels, torch.zeros(3, 28, 30, dtype=torch.uint8))
    edit = demo.replace_code(demo.choose(demo.choose(edit, 0, 1), 1, 7), 0, 9)
    assert edit.chosen == (1, 7) and edit.levels[0].flatten()[1] == 9


def test_caption_tells_psnr_and_bits(page):
    edit = demo.edit_image(page.model, page.examples[0])
    _, _, grid, made, size = demo.show_edit(page, edit)
    error = (decoded(page.model, edit.levels) / 255 - edit.image / 255).square().mean().item()
    assert f"{10 * math.log10(1 / error):.1f} dB" in made
    assert "49 codes of 5 bits: 245 bits; the pixels take 6,272" in size  # K = 32
    assert grid.count("<button") == 49


def test_upload_is_prepared_like_other_images(page, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    (tmp_path / "photo.png").write_bytes(content := file_of(pixels))
    expected = read_images([tmp_path / "photo.png"], 1, (28, 28), "white")[0][0]
    assert torch.equal(demo.read_image(content, page), expected)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (bytes(6 * 2**20), "has 6.0 MB"),
        (file_of(np.zeros((4097, 4097), np.uint8)), "16,785,409 pixels"),
        (b"no image", "cannot be shown"),
        (file_of(np.zeros((20, 20), np.uint8))[:-30], "cannot be shown"),
    ],
    ids=["bytes", "pixels", "text", "cut"],
)
def test_bad_upload_is_refused(page, content, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        demo.read_image(content, page)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_upload_is_deleted_once_read(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"content")
    assert demo.take(str(tmp_path / "photo.png")) == b"content" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("chosen, label", [(0, 0), (7, 7), (-1, 10)])
def test_draw_matches_sample(page, chosen, label):
    """Of ten classes or, by -1, of any; the classes of this prior differ."""
    prior = far_from_zero(copy.deepcopy(page.prior))
    levels = demo.draw(page.model, prior, 3, chosen, seed=5, temperature=0.9)
    expected = sample.draw(page.model, prior, torch.full((3,), label), seed=5, temperature=0.9)
    assert torch.equal(demo.render(page.model, levels), expected)


def test_completion_keeps_the_first_codes(page):
    codes = page.model.encode(page.examples[:1] / 255)[0].flatten()
    (levels,) = demo.draw(page.model, page.prior, 8, given=codes[:30])
    assert levels.shape == (8, 7, 7)
    assert (levels.flatten(1)[:, :30] == codes[:30]).all() and len(levels.unique(dim=0)) > 1


def test_depth_leaves_out_lower_levels(two_levels):
    levels = random_levels(two_levels)
    with torch.no_grad():
        top = (two_levels.decode([levels[0], None]) * 255).round().to(torch.uint8)
    shown = demo.show_samples(two_levels, levels, 1)
    assert all(demo.data_url(demo.png(image)) in shown for image in top)
    assert demo.show_samples(two_levels, levels, 2) != shown


def test_page_changes_and_shows_every_scale(scales_run):
    page = demo.load_page(str(scales_run))
    model, sides = page.model, (1, 2, 4, 7)
    edit = demo.edit_image(model, page.examples[0])
    assert [tuple(codes.shape) for codes in edit.levels] == [(s, s) for s in sides] and edit.chosen == (0, 3, 10, 24)
    for level, side in enumerate(sides):
        codes, patches = page.palettes[level]
        assert sorted(codes) == list(range(32)) and patches.shape == (32, 1, 28 // side, 28 // side)
        changed = demo.replace_code(edit, level, (int(edit.levels[level].flatten()[edit.chosen[level]]) + 1) % 32)
        differing = [(a != b).sum() for a, b in zip(changed.levels, edit.levels)]
        assert sum(differing) == differing[level] == 1
        assert len(demo.show_edit(page, changed)) == 4 + len(sides)
        shown = demo.show_samples(model, [codes[None] for codes in edit.levels], level + 1)
        with torch.no_grad():
            expected = model.decode([codes[None] for codes in edit.levels[: level + 1]])
        assert demo.data_url(demo.png((expected[0] * 255).round().to(torch.uint8))) in shown
    assert [shown.count("disabled") for shown in demo.show_kept(page, edit.levels, 5)] == [0, 0, 16, 49]


def test_names_are_shown_as_text():
    """Of a folder or a class, say: they are no HTML."""
    assert demo.sentence("<b> & c") == "<p>&lt;b&gt; &amp; c</p>" and "<b>" not in demo.figure("", "<b>")


def test_left_out_codes_are_blank(page):
    codes = torch.arange(6).view(2, 3)
    (shown,) = demo.show_kept(page, [codes], 4)
    assert shown.count("disabled") == 2 and "4 codes are kept" in shown


def test_page_opens_without_a_prior(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    page = demo.load_page(str(run))
    assert page.prior is None and f"train_prior.py --run {run}" in page.missing["prior"]
    assert "test images" not in page.missing


@pytest.fixture
def app(finished_run):
    """The page of a run without a prior, which nobody serves."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    return build_page(finished_run)


@pytest.mark.filterwarnings("ignore")  # of gradio's own
def test_page_without_prior_says_how(app):
    texts = [str(component["props"].get("value")) for component in app.get_config_file()["components"]]
    assert sum("first train a prior: python" in text for text in texts) == 2


@pytest.mark.filterwarnings("ignore")  # of gradio's own
def test_clicks_are_answered_one_after_another(app):
    """In a browser they would have to come within milliseconds to be mixed up."""
    clicks = [function for function in app.fns.values() if function.targets]
    assert len(clicks) > 5 and {function.concurrency_limit for function in clicks} == {1}
    assert len({function.concurrency_id for function in clicks}) == 1


def test_lost_test_images_are_replaced(folder, tmp_path):
    train(tmp_path / "run", "--steps=2", f"--dataset={folder}")
    shutil.rmtree(folder)
    page = demo.load_page(str(tmp_path / "run"))
    assert "does not exist" in page.missing["test images"] and page.examples.shape == (1, 3, 12, 16)


def test_moved_test_images_are_found(folder, tmp_path):
    train(tmp_path / "run", "--steps=2", f"--dataset={folder}")
    moved = folder.rename(tmp_path / "moved")
    page = demo.load_page(str(tmp_path / "run"), str(moved))
    assert "test images" not in page.missing and len(page.examples) == 10


def test_prior_stands_in_for_test_images(generating_run, monkeypatch):
    def unavailable(*args):
        raise ValueError("mnist is not in data")

    monkeypatch.setattr(demo, "dataset_of", unavailable)
    page = demo.load_page(str(generating_run))
    assert len(page.examples) == demo.DRAWN and "mnist is not in data" in page.missing["test images"]


def test_missing_gradio_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(demo, "gr", None)
    with pytest.raises(SystemExit, match="2"):
        demo.main(demo.parse_args([]))
    error = capsys.readouterr().err
    assert "pip install -r requirements-demo.txt" in error and error.count("\n") == 1


HOSTS = {"127.0.0.1": False, "::1": False, "[::1]": False, "0.0.0.0": True, "::": True}


@pytest.mark.parametrize("host, warned", HOSTS.items())
def test_open_host_warns(tmp_path, monkeypatch, capsys, host, warned):
    monkeypatch.setattr(demo, "gr", object())
    with pytest.raises(SystemExit, match="2"):  # the folder holds no run
        demo.main(demo.parse_args([f"--run={tmp_path}", f"--host={host}"]))
    assert ("WARNING" in capsys.readouterr().err) == warned


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a socket that Python itself forgets
@pytest.mark.parametrize("host, port", [("203.0.113.1", None), ("127.0.0.1", "taken"), ("[]", None), ("é..b", None)])
def test_address_that_cannot_be_served_is_one_line(monkeypatch, capsys, host, port):
    """gradio would try it for minutes, or name a flag of its own."""
    monkeypatch.setattr(demo, "gr", object())
    with socket.create_server(("127.0.0.1", 0)) as other:
        flags = [f"--host={host}"] + [f"--port={other.getsockname()[1]}"] * (port is not None)
        with pytest.raises(SystemExit, match="2"):
            demo.main(demo.parse_args(flags))
    assert f"cannot be served at --host {host}" in capsys.readouterr().err


@pytest.mark.parametrize("host, name", [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_address_is_one_that_gradio_understands(monkeypatch, host, name):
    seen = {}
    monkeypatch.setattr(demo, "gr", SimpleNamespace(themes=SimpleNamespace(Base=dict)))
    demo.launch(SimpleNamespace(launch=lambda **options: seen.update(options)), host, 7999)
    assert seen["server_name"] == name and seen["server_port"] == 7999
    assert seen["max_file_size"] == demo.MAX_BYTES  # or a visitor could fill the disk


def test_lack_of_memory_is_no_bug(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(demo, "gr", SimpleNamespace(Warning=lambda text, title: shown.append(text), skip=list))
    monkeypatch.setattr(demo.gr, "EventData", object, raising=False)

    def draw(_data):
        raise MemoryError

    demo.listen(lambda call, *_, **__: call(None), draw, [], ["picture"])
    assert "memory is used up" in shown[0] and not capsys.readouterr().err


def test_own_run_comes_before_the_pretrained(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo.parse_args([]).run == "results"
    shutil.copytree(finished_run, tmp_path / "pretrained" / "mnist")
    assert demo.parse_args([]).run == "pretrained/mnist"
    shutil.copytree(finished_run, tmp_path / "results")
    assert demo.parse_args([]).run == "results"


# In a browser


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser test: playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no browser test: there is no Chromium; Debian: apt install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(prior_run, chromium, tmp_path_factory):
    """The address of demo.py's page, and the folder that it keeps uploads in."""
    if demo.gr is None:
        pytest.skip("no browser test: gradio is not installed")
    uploads = tmp_path_factory.mktemp("uploads")
    command = [sys.executable, ROOT / "demo.py", f"--run={prior_run}"]
    variables = environment(TMPDIR=str(uploads), CUDA_VISIBLE_DEVICES="")
    with started(command, seconds=600, stderr=subprocess.PIPE, env=variables) as process:  # of all tests below
        line = process.stdout.readline()
        assert line.startswith("open http://127.0.0.1:"), line
        yield line.split()[1], uploads
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert not [path for path in uploads.rglob("*") if path.is_file()]


@pytest.fixture
def tab(chromium, server):
    """A visitor's page, none of whose requests goes to another host."""
    requests = []
    with contextlib.closing(chromium.new_context(viewport={"width": 390, "height": 844})) as context:
        opened = context.new_page()
        opened.on("request", lambda request: requests.append(request.url))
        opened.goto(server[0])
        opened.locator("#codes-0 button").first.wait_for()
        yield opened
    foreign = [to for to in requests if not to.startswith((server[0], "data:", "blob:"))]
    assert len(requests) > 10 and not foreign


def shown(opened):
    """The codes (h, w) in the editor, and the pixels (H, W) of the picture beside them."""
    codes = torch.tensor([int(text) for text in opened.locator("#codes-0 button").all_inner_texts()])
    source = opened.locator("#made img").get_attribute("src").split(",")[1]
    return codes.view(7, 7), np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))


def after(opened, action):
    """Wait until an action has changed the editor; check its picture against the decoder's."""
    before = opened.locator("#codes-0 figure").inner_html()
    action()
    script = "html => document.querySelector('#codes-0 figure').innerHTML !== html"
    opened.wait_for_function(script, arg=before, polling=20)
    return shown(opened)


def same_picture(page, codes, picture):
    return np.array_equal(decoded(page.model, [codes])[0].numpy(), picture)


def test_click_changes_one_code(page, tab):
    first, _ = shown(tab)
    after(tab, tab.locator('#examples [data-index="3"]').click)
    codes, picture = shown(tab)
    assert torch.equal(codes, page.model.encode(page.examples[3:4] / 255)[0][0]) and same_picture(page, codes, picture)
    after(tab, tab.locator('#codes-0 [data-index="10"]').click)
    changed, picture = after(tab, tab.locator(f'#palette-0 [data-index="{(int(codes[1, 3]) + 1) % 32}"]').click)
    assert (changed != codes).nonzero().tolist() == [[1, 3]] and same_picture(page, changed, picture)
    undone, _ = after(tab, tab.locator("#back").click)
    assert torch.equal(undone, codes) and not torch.equal(undone, first)


def test_quick_clicks_are_taken_in_order(page, tab):
    """As fast as the browser clicks, without waiting for an answer between them."""
    codes, _ = shown(tab)
    wanted = [(int(codes.flatten()[place]) + 1) % 32 for place in (3, 20, 40)]
    for place, code in zip((3, 20, 40), wanted):
        tab.locator(f'#codes-0 [data-index="{place}"]').click()
        tab.locator(f'#palette-0 [data-index="{code}"]').click()
    tab.get_by_text(f"chosen: {wanted[2]}, in row 6, column 6").wait_for()
    changed, picture = shown(tab)
    assert changed.flatten()[[3, 20, 40]].tolist() == wanted and same_picture(page, changed, picture)


def test_keys_change_a_code(page, tab):
    codes, _ = shown(tab)
    tab.locator('#codes-0 [aria-pressed="true"]').focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowDown")
    after(tab, lambda: tab.keyboard.press("Enter"))
    assert tab.evaluate("document.activeElement.dataset.index") == "32"  # the focus stays, row 5 and column 5
    tab.locator("#palette-0 button").first.focus()
    code = int(codes[4, 4])
    while int(tab.evaluate("document.activeElement.dataset.index")) == code:
        tab.keyboard.press("ArrowRight")
    changed, picture = after(tab, lambda: tab.keyboard.press("Space"))
    assert (changed != codes).nonzero().tolist() == [[4, 4]] and same_picture(page, changed, picture)


def test_drawn_image_opens_in_the_editor(page, tab):
    tab.get_by_role("tab", name="Draw", exact=True).click()
    tab.locator("#go").click()
    tab.locator("#samples button").first.wait_for()
    assert tab.locator("#samples button").count() == demo.DRAWN
    codes, picture = after(tab, tab.locator('#samples [data-index="2"]').click)
    expected = demo.draw(page.model, page.prior, demo.DRAWN, seed=0)
    assert torch.equal(codes, expected[0][2]) and same_picture(page, codes, picture)
    tab.locator("#made").wait_for(state="visible")


def test_completion_opens_in_the_editor(page, tab):
    before, _ = shown(tab)
    tab.get_by_role("tab", name="Complete", exact=True).click()
    tab.locator("#kept button").first.wait_for()
    assert tab.locator("#kept button:enabled").count() == 24
    tab.locator("#finish").click()
    tab.locator("#endings button").first.wait_for()
    assert tab.locator("#endings button").count() == 8
    codes, picture = after(tab, tab.locator('#endings [data-index="5"]').click)
    assert torch.equal(codes.flatten()[:24], before.flatten()[:24]) and same_picture(page, codes, picture)


def test_training_pictures_are_shown(tab):
    tab.get_by_role("tab", name="Training", exact=True).click()
    tab.locator(".training img").first.wait_for()
    widths = tab.locator(".training img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(widths) == 4 and min(widths) > 100


def test_upload_and_drawing_are_encoded(page, tab, server, tmp_path):
    """What was uploaded is on no disk afterwards."""
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    (tmp_path / "own.png").write_bytes(file_of(pixels))
    tab.locator("#own button").first.click()
    codes, picture = after(tab, lambda: tab.locator('input[type="file"]').set_input_files(tmp_path / "own.png"))
    assert torch.equal(codes, page.model.encode(torch.from_numpy(pixels)[None, None] / 255)[0][0])
    assert same_picture(page, codes, picture)
    assert not [path for path in server[1].rglob("*") if path.is_file() and path.stat().st_size]

    tab.locator("#canvas canvas").scroll_into_view_if_needed()
    box = tab.locator("#canvas canvas").bounding_box()
    tab.mouse.move(box["x"] + 60, box["y"] + 60)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 200, box["y"] + 200, steps=5)
    tab.mouse.up()
    codes, picture = after(tab, tab.get_by_text("Use the drawing").click)
    source = tab.locator("#editor img").first.get_attribute("src").split(",")[1]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))
    assert drawn[14, 14] > 250 and drawn[3, 24] == 0  # white on black
    assert torch.equal(codes, page.model.encode(torch.from_numpy(drawn.copy())[None, None] / 255)[0][0])
    assert same_picture(page, codes, picture)


def test_bad_upload_is_one_sentence(tab, tmp_path):
    (tmp_path / "own.png").write_bytes(b"no image")
    before = shown(tab)
    tab.locator("#own button").first.click()
    tab.locator('input[type="file"]').set_input_files(tmp_path / "own.png")
    toast = tab.locator(".toast-body")
    toast.wait_for()
    assert "The file cannot be shown: not an image" in toast.inner_text() and "Traceback" not in tab.content()
    assert torch.equal(shown(tab)[0], before[0])


def test_visitors_do_not_share_edits(tab, chromium, server):
    before, _ = shown(tab)
    other = chromium.new_page()
    other.goto(server[0])
    after(other, other.locator('#examples [data-index="5"]').click)
    after(tab, tab.locator('#codes-0 [data-index="0"]').click)
    assert torch.equal(shown(tab)[0], before)
    other.close()


def test_phone_needs_no_sideways_scrolling(tab):
    for name in ("Change", "Draw", "Complete", "Training"):
        tab.get_by_role("tab", name=name, exact=True).click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
