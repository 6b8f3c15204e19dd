"""See the codes of a trained VQ-VAE in the browser, and change them: `python demo.py --run results`.

Shapes: C channels, H x W pixels, N images; a level, or one of its scales, has a grid of h x w codes out of K
    image   (C, H, W) uint8
    levels  a list with the indices of each level or scale, top first: (N, h, w) int64, or (h, w) of one image
"""

import argparse
import base64
import html
import io
import math
import os
import socket
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness.cli import command, make_parser, number, say, user_errors
from harness.data import chunks, dataset_of, first_images
from harness.figures import code_colors, psnr
from harness.folder import FORMATS, decode, pillow_warnings, reason_of
from harness.machine import out_of_memory, pick_device
from harness.storage import checkpoint_path, load_checkpoint

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from model import VQVAE, load_model
from prior import Prior
from reconstruct import encode, render
from sample import COMPLETIONS, GUIDANCE, TEMPERATURE, TOP_P, draw_codes, matching_prior

try:
    import gradio as gr
except ImportError:
    gr = None  # everything but the page itself works without it

ASSETS = Path(__file__).parent / "assets"
RUNS = ("results", "pretrained/mnist")  # the first that holds a checkpoint is shown
MAX_BYTES, MAX_PIXELS = 5 * 2**20, 16 * 10**6  # of an upload
EXAMPLES, EXAMPLE_PIXELS = 1000, 2**22  # at most this many images, and this many pixels, per palette
PALETTE = 1024  # at most this many codes in a palette: the most used ones
SHOWN, DRAWN = 32, 20  # images to pick from, and new ones drawn at once
LOOPBACK = ("127.0.0.1", "localhost", "::1")
UNDO = 100  # changes that can be taken back
PICTURES = {
    "curves.png": "The losses, the error on test images, and how many codes are in use.",
    "recon_*.png": "Test images, each above its reconstruction.",
    "codebook.png": "The codes among the encoder's outputs, and how often each is used.",
    "prior_curves.png": "How well the prior predicts the next code.",
}


class Page(NamedTuple):
    """State that all visitors share and that never changes."""

    model: VQVAE
    prior: Prior | None
    checkpoint: dict
    examples: Tensor  # (N, C, H, W) uint8
    colors: list[np.ndarray]  # (K, 3) of each level
    palettes: list[tuple[list[int], Tensor]]  # for each level: its codes, sorted, and their patches
    missing: dict[str, str]  # why there is no "prior", or no "test images"


class Edit(NamedTuple):
    """The state of one visitor's editor."""

    image: Tensor | None  # None: the prior drew these codes
    levels: list[Tensor]
    chosen: tuple[int, ...]  # for each level: the position that the next click on its palette changes
    earlier: tuple[list[Tensor], ...] = ()  # the levels before each change


# Loading


def load_page(run: str, data_dir: str | None = None, device: torch.device | str = "cpu") -> Page:
    """Load a run, with its prior and its test images if it has them.

    Raises:
        ValueError: the run holds no VQ-VAE.
    """
    checkpoint, missing, prior = load_checkpoint(run), {}, None
    model = load_model(checkpoint, device)
    try:
        prior = matching_prior(run, checkpoint, model)
    except ValueError as error:
        how = command("train_prior.py", "--run", Path(run), start="python")
        missing["prior"] = f"To draw new images, first train a prior: {how} ({error})."
    try:
        images = dataset_of(checkpoint, Path(run), data_dir).test_images
        examples = first_images(images, min(EXAMPLES, max(SHOWN, EXAMPLE_PIXELS // math.prod(model.image_size))))
        levels = encode(model, examples)
    except (ValueError, OSError) as error:
        missing["test images"] = f"There are no test images here ({error})."
        if prior:
            levels = draw(model, prior, DRAWN)
        else:
            levels = encode(model, torch.zeros(1, model.channels, *model.image_size, dtype=torch.uint8))
        examples = render(model, levels)
    colors = [code_colors(codebook.cpu()) for codebook in model.codebooks()]
    palettes = [make_palette(model, levels, level) for level in range(len(levels))]
    return Page(model, prior, checkpoint, examples, colors, palettes, missing)


def make_palette(model: VQVAE, levels: list[Tensor], level: int) -> tuple[list[int], Tensor]:
    """Return a level's codes, sorted so that neighbours look alike, and what they draw: patches (n, C, S, S) uint8.

    A patch is the mean over all positions of the code in `levels` (N, h, w). A code that never occurs there is decoded
    from a grid filled with that code.
    """
    grid, uses = tuple(levels[level].shape[1:]), model.levels[level % len(model.levels)].quantizer.ema_counts.cpu()
    whole = [model.strides[-1] * side for side in levels[-1].shape[1:]]  # height and width of the images, with padding
    codes = uses.topk(min(PALETTE, len(uses))).indices
    field, size = (grid, whole) if model.scales else ((4, 4), [4 * model.strides[level]] * 2)
    alone = [None] * len(levels)
    alone[level] = codes[:, None, None].expand(-1, *field)
    middle = (field[0] - 1) // 2 * field[1] + (field[1] - 1) // 2  # away from the edge
    means = patches_of(render(model, alone, size), field).unflatten(0, (len(codes), -1))[:, middle]
    place = torch.full((len(uses),), len(codes))  # each code's place in the palette; all others share a last one
    place[codes] = torch.arange(len(codes))
    sums, counts = torch.zeros(len(codes) + 1, *means.shape[1:]), torch.zeros(len(codes) + 1)
    for part in chunks(len(levels[0]), model.image_size):
        found = [indices[part] for indices in levels]
        places = place[found[level].flatten()]
        sums.index_add_(0, places, patches_of(render(model, found, whole), grid))
        counts += places.bincount(minlength=len(counts))
    seen = counts[:-1] > 0
    means[seen] = sums[:-1][seen] / counts[:-1][seen, None, None, None]

    # Sort greedily: start with the brightest code, then always take the most similar of the remaining ones
    flat = means.flatten(1)
    distances, order = torch.cdist(flat, flat), [int(flat.sum(1).argmax())]
    for _ in range(len(codes) - 1):
        distances[:, order[-1]] = torch.inf
        order.append(int(distances[order[-1]].argmin()))
    return codes[order].tolist(), means[order].round().to(torch.uint8)


def patches_of(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut images (N, C, H, W) into float patches (N h w, C, S, S), row by row, for the places of a grid (h, w)."""
    size = math.ceil(max(images.shape[2] / grid[0], images.shape[3] / grid[1]))
    images, whole = images.float(), [size * side for side in grid]
    if list(images.shape[2:]) != whole:
        images = F.interpolate(images, whole, mode="bilinear")
    return images.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def read_image(content: bytes, page: Page) -> Tensor:
    """Decode an image file to the model's input size and channels, (C, H, W) uint8.

    Raises:
        ValueError: it is too large, or not an image.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"The file has {len(content) / 2**20:.1f} MB; choose one of at most {MAX_BYTES // 2**20} MB.")
    try:
        with pillow_warnings():
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                pixels = math.prod(opened.size)
            if pixels > MAX_PIXELS:
                raise ValueError(f"it has {pixels:,} pixels; the limit is {MAX_PIXELS:,}")
            model, background = page.model, page.checkpoint["args"]["background"]
            return decode(io.BytesIO(content), model.channels, model.image_size, background)
    except Exception as error:  # damaged files surface as almost any exception
        raise ValueError(f"The file cannot be shown: {reason_of(error)}.") from None


# Images and codes


def draw(model: VQVAE, prior: Prior, count: int, label: int = -1, given: Tensor | None = None, **options) -> list:
    """Draw the levels of `count` new images of class `label` (-1: any class), continuing the codes `given` (t,)."""
    labels = torch.full((count,), prior.classes if label < 0 else label)
    given = None if given is None else given.expand(count, -1)
    return [level.cpu() for level in draw_codes(model, prior, labels, given=given, **options)]


def start_edit(levels: list[Tensor], image: Tensor | None = None) -> Edit:
    """Start from the codes (h, w) of an image, with the one in the middle of each level chosen."""
    return Edit(image, levels, tuple(len(codes) // 2 * codes.shape[1] + codes.shape[1] // 2 for codes in levels))


def edit_image(model: VQVAE, image: Tensor) -> Edit:
    return start_edit([level[0] for level in encode(model, image[None])], image)


def choose(edit: Edit, level: int, position: int) -> Edit:
    chosen = list(edit.chosen)
    chosen[level] = min(max(0, position), edit.levels[level].numel() - 1)
    return edit._replace(chosen=tuple(chosen))


def replace_code(edit: Edit, level: int, code: int) -> Edit:
    """Put a code at the chosen position of a level."""
    levels = [codes.clone() for codes in edit.levels]
    levels[level].view(-1)[edit.chosen[level]] = code
    return edit._replace(levels=levels, earlier=(*edit.earlier, edit.levels)[-UNDO:])


def undo(edit: Edit) -> Edit:
    return edit._replace(levels=edit.earlier[-1], earlier=edit.earlier[:-1]) if edit.earlier else edit


def size_in_bits(model: VQVAE, levels: list[Tensor]) -> str:
    """Compare the size of an image's codes (h, w) with that of its pixels, in bits."""
    count, bits = sum(codes.numel() for codes in levels), math.log2(model.levels[0].quantizer.codebook_size)
    pixels = model.channels * math.prod(model.image_size) * 8
    return f"{count} codes of {bits:.3g} bits: {count * bits:,.0f} bits; the pixels take {pixels:,}."


# What the page shows


def png(image: Tensor) -> bytes:
    content = io.BytesIO()
    to_pil_image(image).save(content, "PNG")
    return content.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def sentence(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def figure(content: str | bytes, caption: str) -> str:
    """Return a picture, a PNG or what HTML draws, above its caption."""
    caption = html.escape(caption)
    content = f'<img src="{data_url(content)}" alt="{caption}">' if isinstance(content, bytes) else content
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def tile(index: int, name: str, style: str, text: str = "", pressed: bool = False) -> str:
    """Return a button of a grid; the arrow keys go from one to the next, a click sends its index."""
    state = f'tabindex="{-1 + pressed}" aria-pressed="{str(pressed).lower()}"'
    return f'<button data-index="{index}" title="{name}" {state} style="{style}">{text}</button>'


def image_tiles(images: Tensor, names: Sequence[str], indices: Sequence[int]) -> str:
    """Show images (N, C, H, W) as a grid of tiles."""
    styles = [f"background-image:url({data_url(png(image))})" for image in images]
    shown = [tile(*row, pressed=i == 0) for i, row in enumerate(zip(indices, names, styles))]
    return f'<div class="tiles" style="--ratio:{images.shape[3] / images.shape[2]}">{"".join(shown)}</div>'


def code_tiles(codes: Tensor, colors: np.ndarray, chosen: int | None = None, keep: int | None = None) -> str:
    """Show codes (h, w) in their colours, with their numbers; positions from `keep` on are left blank."""
    shown = []
    for i, code in enumerate(codes.flatten().tolist()):
        name = f"row {i // codes.shape[1] + 1}, column {i % codes.shape[1] + 1}: code {code}"
        ink = "white" if colors[code] @ (0.299, 0.587, 0.114) < 0.5 else "black"
        style = "background:rgb({:.0f},{:.0f},{:.0f});color:{}".format(*255 * colors[code], ink)
        kept = keep is None or i < keep
        shown.append(tile(i, name, style, str(code), i == chosen) if kept else "<button disabled></button>")
    height, width = codes.shape
    return f'<div class="codes" style="--columns:{width};--ratio:{width / height}">{"".join(shown)}</div>'


def show_edit(page: Page, edit: Edit) -> list:
    """Return what the editor shows: the edit, the image, each level's codes, the reconstruction, its size in bits."""
    grids = []
    for i, (name, codes, chosen) in enumerate(zip(page.model.map_names, edit.levels, edit.chosen)):
        code, (row, column) = int(codes.flatten()[chosen]), divmod(chosen, codes.shape[1])
        caption = f"{name} codes; chosen: {code}, in row {row + 1}, column {column + 1}".strip().capitalize()
        mark = f'<style>#palette-{i} [data-index="{code}"] {{ outline: var(--mark); z-index: 1 }}</style>'
        grids.append(figure(code_tiles(codes, page.colors[i], chosen), caption) + mark)
    made = render(page.model, [codes[None] for codes in edit.levels])[0]
    image, caption = figure("", "No image: the prior drew these codes"), "The image decoded from them"
    if edit.image is not None:
        image = figure(png(edit.image), "Image")
        caption = f"Reconstruction: {psnr(made / 255, edit.image / 255):.1f} dB PSNR"
    return [edit, image, *grids, figure(png(made), caption), sentence(size_in_bits(page.model, edit.levels))]


def show_samples(model: VQVAE, levels: list[Tensor], depth: int) -> str:
    """Return tiles of the images decoded from the first `depth` levels (N, h, w)."""
    known = [codes if i < depth else None for i, codes in enumerate(levels)]
    indices = range(len(levels[0]))
    return image_tiles(render(model, known), [f"image {i + 1}: change its codes" for i in indices], indices)


def show_kept(page: Page, levels: list[Tensor], keep: int) -> list[str]:
    """Return each level's codes (h, w), of which the first `keep` are kept."""
    shown = []
    for codes, colors in zip(levels, page.colors):
        shown.append(figure(code_tiles(codes, colors, keep=keep), f"{min(max(keep, 0), codes.numel())} codes are kept"))
        keep -= codes.numel()
    return shown


def show_training(run: str) -> str:
    """Return the pictures that training has left in a run's folder."""
    found = {
        text: sorted(Path(run).glob(name), key=lambda path: (len(path.name), path)) for name, text in PICTURES.items()
    }
    shown = "".join(figure(paths[-1].read_bytes(), text) for text, paths in found.items() if paths)
    none = sentence("There are none in this folder; train.py writes them to the folder of your own run.")
    return f'<div class="training">{shown or none}</div>'


def describe(page: Page, run: str) -> str:
    """Say what is shown, in the words of the README."""
    args, (height, width) = page.checkpoint["args"], page.model.image_size
    grids = " and ".join("x".join(map(str, grid)) for grid in page.model.grids(page.model.image_size))
    return (
        f"This VQ-VAE was trained on {args['dataset']} (in {run}). It turns an image of {height}x{width} pixels into "
        f"{grids} codes out of {args['codebook_size']}, and those back into the image."
    )


# The page


def build(page: Page, run: str):
    """Make the page of a run."""
    with gr.Blocks(title="The codes of a VQ-VAE", analytics_enabled=False, delete_cache=(60, 60)) as app:
        text(f"<h1>The codes of a VQ-VAE</h1>{sentence(describe(page, run))}")
        with gr.Tabs(selected="edit") as tabs:
            with gr.Tab("Change", id="edit"):
                editor = edit_tab(page)
            with gr.Tab("Draw", id="draw"):
                new = f"The prior draws the codes of {DRAWN} new images. Click one to change its codes."
                text(sentence(page.missing.get("prior", new)))
                if page.prior is not None:
                    draw_tab(page, editor, tabs)
            with gr.Tab("Complete", id="complete") as tab:
                rest = f"The prior keeps the first codes of the current image and draws the rest {COMPLETIONS} times."
                text(sentence(page.missing.get("prior", rest)))
                if page.prior is not None:
                    complete_tab(page, editor, tabs, tab)
            with gr.Tab("Training", id="training"):
                text(sentence("Pictures from train.py and train_prior.py.") + show_training(run))
    return app


def edit_tab(page: Page) -> list:
    """Make the editor of an image's codes; return the components that `show_edit` fills."""
    model, first = page.model, edit_image(page.model, page.examples[0])
    edit, image, *grids, made, size = show_edit(page, first)

    pick = "The encoder turns it into a grid of codes, and the decoder turns these back into an image."
    text(f"<h2>Pick an image</h2>{sentence(page.missing.get('test images', pick))}")
    shown = range(min(SHOWN, len(page.examples)))
    names = [f"image {i + 1}" for i in shown]
    examples = tiles(image_tiles(page.examples[:SHOWN], names, shown), elem_id="examples")
    with gr.Accordion("Or upload one, or draw one", open=False, elem_id="own"):
        limits = f"{MAX_BYTES // 2**20} MB and {MAX_PIXELS // 10**6} million pixels"
        text(sentence(f"At most {limits}; cropped to the shape of the training images. The upload is deleted at once."))
        upload = gr.UploadButton("Upload an image", size="sm", file_types=["image"], elem_id="upload")
        options = {"height": model.image_size[0], "width": model.image_size[1], "color": model.channels > 1}
        canvas = text(elem_id="canvas", js_on_load=script("demo_canvas.js"), **options)

    change = "Click a code in the grid, then another one in the palette: the image changes at once."
    text(f"<h2>Change its codes</h2>{sentence(change)}")
    edit = gr.State(edit)
    with gr.Row(elem_id="editor"):
        image = text(image)
        grids = [tiles(grid, elem_id=f"codes-{i}", elem_classes="grid") for i, grid in enumerate(grids)]
        made = text(made, elem_id="made")
    editor = [edit, image, *grids, made, text(size)]
    back = gr.Button("Back: undo the last change", size="sm", elem_id="back")

    def on(event, function, *inputs):  # show the edit that the function returns
        listen(event, lambda *values: show_edit(page, function(*values)), inputs, editor)

    on(examples.select, lambda event: edit_image(model, page.examples[event.index]))
    on(upload.upload, lambda _, path: edit_image(model, read_image(take(path), page)), upload)
    on(canvas.submit, lambda event: edit_image(model, read_image(base64.b64decode(event.image), page)))
    on(back.click, lambda _, edit: undo(edit), edit)
    for i, (name, grid, (codes, patches)) in enumerate(zip(model.map_names, grids, page.palettes)):
        patch = "Each code as the patch that it draws on average; neighbours look alike."
        text(f"<h3>{f'{name} palette'.strip().capitalize()}</h3>{sentence(patch)}")
        shown = image_tiles(patches, [f"code {code}" for code in codes], codes)
        palette = tiles(shown, elem_id=f"palette-{i}", elem_classes="palette")
        on(grid.select, lambda event, edit, i=i: choose(edit, i, event.index), edit)
        on(palette.select, lambda event, edit, i=i: replace_code(edit, i, event.index), edit)
    return editor


def draw_tab(page: Page, editor: list, tabs):
    """Make the controls that draw new images."""
    model, names = page.model, page.checkpoint["identity"]["class_names"] or []
    with gr.Row():
        classes = [("any", -1), *((name, i) for i, name in enumerate(names))]
        label = gr.Dropdown(classes, value=-1, label="Class", info="What the images are to show.")
        seed = seed_box()
    with gr.Row():
        options = [
            slider("Temperature", "Below 1: likelier codes.", 0.1, 2, TEMPERATURE, 0.05),
            slider("Top-p", "Below 1: without the least likely codes.", 0.05, 1, TOP_P, 0.01),
            slider("Guidance", "Above 1: more typical of the class.", 0, 4, GUIDANCE, 0.05),
        ]
    go = gr.Button("Draw", variant="primary", elem_id="go")
    count, name = len(model.map_names), "scales" if model.scales else "levels"
    info = f"How many {name} of codes to decode, coarsest first."
    depth = slider(name.capitalize(), info, 1, max(2, count), count, 1, visible=count > 1)
    drawn, samples = gr.State(), tiles(elem_id="samples", elem_classes="large")

    def draw_new(_, depth, label, seed, *values):
        chosen = dict(zip(("temperature", "top_p", "guidance"), values))
        levels = draw(model, page.prior, DRAWN, label, seed=int(seed or 0) % 2**63, **chosen)
        return levels, show_samples(model, levels, depth)

    def show_depth(_, levels, depth):
        return show_samples(model, levels, depth) if levels else ""

    listen(go.click, draw_new, [depth, label, seed, *options], [drawn, samples], "minimal")
    listen(depth.change, show_depth, [drawn, depth], [samples])
    open_tiles(page, samples, drawn, editor, tabs)


def complete_tab(page: Page, editor: list, tabs, tab):
    """Make the controls that complete the image in the editor."""
    edit, total = editor[0], page.prior.length
    with gr.Row():
        info = f"How many codes to keep, {'in whole scales' if page.model.scales else 'row by row'}; the rest is drawn."
        keep, seed = slider("Codes to keep", info, 0, total, total // 2, 1), seed_box()
    finish = gr.Button("Complete", variant="primary", elem_id="finish")
    with gr.Row(elem_id="kept"):
        kept = [text(elem_classes="grid") for _ in page.model.map_names]
    drawn, endings = gr.State(), tiles(elem_id="endings", elem_classes="large")

    def complete(_, edit, keep, seed):
        given = torch.cat([codes.flatten() for codes in edit.levels])[: page.prior.whole_steps(keep)]
        levels = draw(page.model, page.prior, COMPLETIONS, given=given, seed=int(seed or 0) % 2**63)
        return levels, show_samples(page.model, levels, len(levels))

    def show(_, edit, keep):
        shown = show_kept(page, edit.levels, page.prior.whole_steps(keep))
        return shown if len(shown) > 1 else shown[0]

    listen(finish.click, complete, [edit, keep, seed], [drawn, endings], "minimal")
    listen(tab.select, show, [edit, keep], kept)
    listen(keep.change, show, [edit, keep], kept)
    open_tiles(page, endings, drawn, editor, tabs)


def open_tiles(page: Page, tiles, drawn, editor: list, tabs):
    """When a tile is clicked, open its codes in the editor."""

    def show(event, levels):
        edit = start_edit([codes[event.index] for codes in levels])
        return [*show_edit(page, edit), gr.Tabs(selected="edit")]

    listen(tiles.select, show, [drawn], [*editor, tabs])


# Parts of the page


def script(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def text(value: str = "", js_on_load: str | None = None, **options):
    return gr.HTML(value, js_on_load=js_on_load, apply_default_css=False, **options)


def tiles(value: str = "", **options):
    return text(value, script("demo_tiles.js"), **options)


def slider(label: str, info: str, low: float, high: float, value: float, step: float, **options):
    return gr.Slider(low, high, value, step=step, label=label, info=info, buttons=[], min_width=240, **options)


def seed_box():
    info = "The same seed draws the same images."
    return gr.Number(0, precision=0, label="Seed", info=info)


def listen(event, function, inputs, outputs, progress="hidden"):
    """Call a function with the event's data and the inputs' values; an error becomes one sentence in the page."""

    def call(data: gr.EventData, *values):
        try:
            return function(data, *values)
        except (ValueError, OSError) as error:
            message = str(error)
        except Exception as error:
            message = "The memory is used up; try again when other programs have ended."
            if not out_of_memory(error):
                traceback.print_exc()
                message = "This failed because of a bug in demo.py; the terminal that runs it shows the details."
        gr.Warning(html.escape(message), title="Not done")
        return [gr.skip()] * len(outputs) if len(outputs) > 1 else gr.skip()

    # One event at a time: else a palette click could be handled before the click that chose its position.
    order = {"concurrency_id": progress, "concurrency_limit": 1, "trigger_mode": "multiple"}
    event(call, [*inputs], [*outputs], show_progress=progress, api_visibility="private", **order)


def take(path: str) -> bytes:
    """Read an upload, and delete it."""
    try:
        return Path(path).read_bytes()
    finally:
        Path(path).unlink(missing_ok=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("Serve a page that shows the codes of a run of train.py and lets you change them.")
    runs = [run for run in RUNS if checkpoint_path(run).is_file()]
    parser.add_argument("--run", default=[*runs, RUNS[0]][0], help="folder of the run")
    parser.add_argument("--data-dir", help="folder of the data set, if it has moved; named sets are downloaded to it")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0: open to the network")
    parser.add_argument("--port", type=number(int, 1, 65536), help="port to serve on; default: first free from 7860")
    return parser.parse_args(argv)


def main(args: argparse.Namespace):
    with user_errors(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if gr is None:
            raise ValueError("the page needs gradio: pip install -r requirements-demo.txt")
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads, which are deleted with it
        host = args.host.strip("[]") or args.host  # around an IPv6 address; "" would be every network
        if host not in LOOPBACK:
            say(f"*** WARNING: anyone who can reach {host} can use this page: it has no password", error=True)
        check_address(host, args.port)
        app = build(load_page(args.run, args.data_dir, pick_device()[0]), args.run)
        launch(app, host, args.port)
        say(f"open {app.local_url} in a browser; press Ctrl-C to stop")
        app.block_thread()


def check_address(host: str, port: int | None):
    """Raise ValueError if nothing can be served there: gradio would try a wrong host for minutes."""
    try:
        socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, TypeError) as error:  # TypeError: a name that cannot be encoded
        where = f"--host {host}" + (f" --port {port}" if port else "")
        raise ValueError(f"the page cannot be served at {where} ({error}); choose another address or port") from error


def launch(app: "gr.Blocks", host: str, port: int | None):
    """Serve the page, without any request to another host."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    app.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        theme=gr.themes.Base(primary_hue="blue", **fonts),
        css_paths=ASSETS / "demo.css",
        max_file_size=MAX_BYTES,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )


if __name__ == "__main__":
    main(parse_args())
